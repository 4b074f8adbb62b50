"""Unpacked archives on disk: content-addressed, bounded, those unused longest removed first."""

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from serve.store.unpack import CHUNK, InvalidArchive, Stopped, Unpacked, UnpackLimits, unpack


class CacheFull(Exception):
    """What is in use leaves no room; the message has the numbers."""


@dataclass(frozen=True)
class Entry:
    """One unpacked archive in the cache. size: bytes of its files. used: nanoseconds, as time.time_ns()."""

    path: Path
    size: int
    used: int


@dataclass(frozen=True)
class Staged:
    """A hashed file, unpacked where nothing else looks; unpacked is None where the cache has its content already."""

    digest: str
    unpacked: Unpacked | None
    entries: list[Entry]
    folder: Path
    cleanup: ExitStack


class Cache:
    """Unpacked archives, FOLDER/<start of the file's sha256>/, each complete or not there at all.

    An entry's modification time is its last use, so that the order of use outlives the server. FOLDER/.unpack-*/ is
    an unpacking under way; one whose process died is removed by the next. Two servers may share a folder, but either
    may remove what the other has in use.

    bound: bytes of all entries. While an archive is unpacked the disk holds that one more.
    """

    def __init__(self, folder: Path, bound: int, limits: UnpackLimits) -> None:
        self.folder, self._bound, self._limits = folder, bound, limits
        self._stopped = threading.Event()
        self._used: int | None = None  # bytes of all entries, once they were looked at

    def entry(self, digest: str) -> Path:
        return self.folder / digest[:32]

    def used(self) -> int:
        """Bytes of all entries, as far as this process knows; the first look reads the folder."""
        if self._used is None:
            self._used = sum(entry.size for entry in self._entries()) if self.folder.is_dir() else 0
        return self._used

    def touch(self, entry: Path) -> bool:
        """Marks an entry as used now; False where there is no such entry."""
        now = time.time_ns()
        try:
            os.utime(entry, ns=(now, now))
        except FileNotFoundError:
            return False
        return True

    def stop(self) -> None:
        """Ends every stage() under way, and those to come, with Stopped."""
        self._stopped.set()

    def stage(self, path: Path) -> Staged:
        """Hashes the file and unpacks it, which takes a while and may run in a thread; the caller must end `cleanup`.

        Raises InvalidArchive, OSError or Stopped, and leaves nothing behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        with open(path, "rb") as file, ExitStack() as stack:
            before = os.fstat(file.fileno())
            digest = self._sha256(file)
            folder = stack.enter_context(self._temporary_folder())
            unpacked = None if self.entry(digest).exists() else self._unpack(file, folder)
            after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise InvalidArchive("it changed while it was read: it is still being copied")
            return Staged(digest, unpacked, self._entries(), folder, stack.pop_all())

    def admit(self, staged: Staged, in_use: Collection[Path]) -> None:
        """Makes a staged archive an entry, instead of those unused longest where there is no room for both.

        Only renames, so that it can be called where in_use can't change meanwhile. Raises CacheFull or OSError.
        """
        self._used = sum(entry.size for entry in staged.entries)
        if staged.unpacked:
            for entry in self._removals(staged.unpacked.size, staged.entries, in_use):
                self._used -= entry.size
                with suppress(FileNotFoundError):  # another server's doing
                    os.rename(entry.path, staged.folder / entry.path.name)
            try:
                os.rename(staged.unpacked.root, self.entry(staged.digest))
                self._used += staged.unpacked.size
            except OSError:
                if not self.entry(staged.digest).exists():
                    raise
        self.touch(self.entry(staged.digest))

    def _removals(self, size: int, entries: list[Entry], in_use: Collection[Path]) -> Iterator[Entry]:
        excess = sum(entry.size for entry in entries) + size - self._bound
        idle = [entry for entry in entries if entry.path not in in_use]
        if sum(entry.size for entry in idle) < excess:
            used = sum(entry.size for entry in entries if entry.path in in_use)
            raise CacheFull(f"it needs {size:,} bytes, and {used:,} of the cache's {self._bound:,} are in use")
        for entry in sorted(idle, key=lambda entry: entry.used):
            if excess <= 0:
                return
            excess -= entry.size
            yield entry

    def _entries(self) -> list[Entry]:
        entries = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another server's doing
                if not path.name.startswith("."):
                    entries.append(Entry(path, _size(path), path.stat().st_mtime_ns))
        return entries

    def _sha256(self, file: BinaryIO) -> str:
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            if self._stopped.is_set():
                raise Stopped
            digest.update(chunk)
        return digest.hexdigest()

    def _unpack(self, file: BinaryIO, folder: Path) -> Unpacked:
        out = folder / "content"
        out.mkdir()
        limits = replace(self._limits, size=min(self._limits.size, self._bound))
        return unpack(file, out, limits, self._stopped.is_set)

    @contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        """Locked while it is in use: the kernel drops the lock with the process, however that ends."""
        folder = Path(tempfile.mkdtemp(prefix=".unpack-", dir=self.folder))
        with _locked(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _sweep(self) -> None:
        for folder in self.folder.glob(".unpack-*"):
            with suppress(FileNotFoundError, BlockingIOError), _locked(folder):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """BlockingIOError where another open file of this or any process has the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
