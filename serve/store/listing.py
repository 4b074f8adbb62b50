"""The names of all archives in a store, without reading the whole store each time."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serve.store.unpack import MANIFEST, SUFFIXES

# Nanoseconds after a folder's last change within which another may leave no trace in its time.
_UNSETTLED = 2 * 10**9
_SMALL = 200  # archives and folders of a store that may be read wherever its names are wanted


@dataclass(frozen=True)
class _Folder:
    """What a folder held when it was read. identity: inode and time of its last change; None: too new to be trusted.

    children: all that can be a name, suffixes cut off; archives: those that are one; folders: those that may hold some.
    """

    identity: tuple[int, int] | None
    children: frozenset[str]
    archives: list[str]
    folders: list[str]


class Listing:
    """A folder is read again when its time has changed. may_be_archive: by the whole name. Belongs to any thread.

    An archive whose manifest goes while the rest of it stays is listed until something beside it changes.
    """

    def __init__(self, store: Path, may_be_archive: Callable[[str], bool]) -> None:
        self._store, self._may_be_archive = str(store), may_be_archive
        self._folders: dict[str, _Folder] = {}
        self._names: list[str] = []
        self._was_read = False
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Lists all archives, sorted. It reads all folders at first, and later asks each for its time."""
        with self._lock:
            before, self._folders = self._folders, {}
            self._read(before, "")
            if self._folders != before or not self._was_read:
                self._names = sorted(name for folder in self._folders.values() for name in folder.archives)
                self._was_read = True
            return self._names

    def glance(self) -> list[str]:
        """Lists them as names() does, or returns the last list where that could take a while."""
        may_wait = not self._was_read or len(self._names) + len(self._folders) <= _SMALL
        return self.names() if may_wait and not self._lock.locked() else self._names

    def _read(self, before: dict[str, _Folder], prefix: str) -> None:
        path = os.path.join(self._store, prefix)
        try:
            status = os.stat(path)
            identity = status.st_ino, status.st_mtime_ns
            folder = before.get(prefix)
            if folder is None or folder.identity != identity or any(_is_archive(path, f) for f in folder.folders):
                settled = time.time_ns() - status.st_mtime_ns > _UNSETTLED
                folder = self._list(path, prefix, identity if settled else None, folder)
        except OSError:  # a file, or one that has gone
            return
        self._folders[prefix] = folder
        for child in folder.folders:
            self._read(before, f"{prefix}{child}/")

    def _list(self, path: str, prefix: str, identity: tuple[int, int] | None, before: _Folder | None) -> _Folder:
        known = set(before.archives) if before else set()
        entries = set(os.listdir(path))
        children, archives, folders = set(), [], []
        for child in {_stem(entry) for entry in entries}:
            name = prefix + child
            if not (before and child in before.children) and not self._may_be_archive(name):
                continue
            children.add(child)
            is_folder = child in entries and ((name in known) or _is_archive(path, child))
            if is_folder or any(
                f"{child}{suffix}" in entries and os.path.isfile(os.path.join(path, f"{child}{suffix}"))
                for suffix in SUFFIXES
            ):
                archives.append(name)
            if child in entries and not is_folder:
                folders.append(child)
        return _Folder(identity, frozenset(children), sorted(archives), sorted(folders))


def _stem(entry: str) -> str:
    return next((entry.removesuffix(suffix) for suffix in SUFFIXES if entry.endswith(suffix)), entry)


def _is_archive(path: str, child: str) -> bool:
    return os.path.isfile(os.path.join(path, child, MANIFEST))
