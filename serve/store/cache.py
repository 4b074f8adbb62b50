"""Unpacked archives on disk: content-addressed, bounded, those unused longest removed first."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from serve.store.digests import sha256
from serve.store.locks import EXCLUSIVE, SHARED, locked, try_lock
from serve.store.unpack import InvalidArchive, Unpacked, UnpackLimits, unpack

logger = logging.getLogger(__name__)

_UNPACKING = ".unpack-"
_DIGITS = 32  # hexadecimal, of an entry's name


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
    """A hashed file, unpacked where nothing else looks; unpacked is None where the cache has its content already.

    hold: a descriptor that keeps others from removing it. folder: for what has to make room. cleanup: gives back what
    stage() took, this process's right to change the cache included.
    """

    digest: str
    unpacked: Unpacked | None
    hold: int
    folder: Path
    cleanup: ExitStack


class Cache:
    """Unpacked archives, FOLDER/<start of the file's sha256>/, each complete or not there at all.

    Any number of servers may share the folder, all of one user and one machine. An entry that one of them uses is held
    with a shared lock, which the kernel drops with the process; who removes an entry takes it for himself alone. Who
    adds and removes entries has FOLDER itself locked; who unpacks, FOLDER/.unpack-<entry>/, so that each content is
    unpacked once. One of those that nobody has locked is a dead process's, and the next unpacking removes it.

    An entry's modification time is its last use, so that the order of use outlives the server.

    bound: bytes of all entries. While an archive is unpacked the disk holds that one more. stopped: once it is set,
    every stage() under way, and those to come, end with Stopped.
    """

    def __init__(self, folder: Path, bound: int, limits: UnpackLimits, stopped: threading.Event | None = None) -> None:
        self.folder, self._bound, self._limits = folder, bound, limits
        self._stopped = stopped or threading.Event()
        self._holds: dict[Path, int] = {}  # descriptors
        self._sizes: dict[str, int] = {}  # bytes of entries by name: what is in them never changes

    def entry(self, digest: str) -> Path:
        return self.folder / digest[:_DIGITS]

    def used(self) -> int:
        """Bytes of all entries, whoever made them. Reads the folder: not for the event loop."""
        return sum(entry.size for entry in self._entries()) if self.folder.is_dir() else 0

    def hold(self, entry: Path) -> bool:
        """Marks an entry as used now and keeps others from removing it; False where there is no such entry."""
        if entry not in self._holds:
            lock = _hold(entry)
            if lock is None:
                return False
            self._holds[entry] = lock
        now = time.time_ns()
        os.utime(self._holds[entry], ns=(now, now))
        return True

    def hold_only(self, in_use: Collection[Path], spared: float = 0.0) -> int:
        """Holds those entries that are in use and lets others remove the rest; returns how many are held.

        spared: seconds since its last use within which an entry is held on.
        """
        oldest = time.time_ns() - int(spared * 1e9)
        for entry in self._holds.keys() - set(in_use):
            if os.fstat(self._holds[entry]).st_mtime_ns <= oldest:
                os.close(self._holds.pop(entry))
        for entry in in_use:
            if entry.parent == self.folder and entry not in self._holds:
                self.hold(entry)
        return len(self._holds)

    def staged(self, digest: str) -> Staged | None:
        """As stage() where the cache has the content already; None where it has not. May wait: for a thread."""
        with ExitStack() as stack:
            stack.enter_context(self._changing())
            hold = _hold(self.entry(digest))
            if hold is None:
                return None
            stack.callback(os.close, hold)
            return Staged(digest, None, hold, self.folder, stack.pop_all())

    def stage(self, path: Path, expected: str = "") -> Staged:
        """Hashes the file and unpacks it, which takes a while and may run in a thread; the caller must end `cleanup`.

        expected: its sha256, where that is known. Where another server unpacks the same content, waits for it. Raises
        InvalidArchive, OSError, Stopped or Stalled, and leaves nothing behind.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        with open(path, "rb") as file, ExitStack() as stack:
            before = os.fstat(file.fileno())
            digest = sha256(file, self._stopped)
            if expected and digest != expected:
                raise InvalidArchive(f"its sha256 is {digest}, and should be {expected}")
            folder = stack.enter_context(self._unpacking_folder(digest, path.name))
            with self._changing():  # else it might be looked at for removal just now
                hold = _hold(self.entry(digest))
            unpacked = self._unpack(file, folder) if hold is None else None
            if hold is None:
                assert unpacked is not None
                hold = _hold(unpacked.root)
                assert hold is not None
            stack.callback(os.close, hold)
            after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise InvalidArchive("it changed while it was read: it is still being copied")
            stack.enter_context(self._changing())
            return Staged(digest, unpacked, hold, folder, stack.pop_all())

    def admit(self, staged: Staged, in_use: Collection[Path]) -> Path:
        """Makes a staged archive an entry, which is held, instead of those unused longest where there is no room.

        Only renames, so that it can be called where in_use can't change meanwhile. Raises CacheFull or OSError.
        """
        entry = self.entry(staged.digest)
        self.hold_only(in_use)
        if staged.unpacked:
            with self._removable(staged.unpacked.size) as removable:
                for each in removable:
                    os.rename(each.path, staged.folder / each.path.name)
            os.rename(staged.unpacked.root, entry)
        self._holds.setdefault(entry, os.dup(staged.hold))
        self.hold(entry)
        return entry

    def take_over(self, old: Path) -> None:
        """Moves what an earlier version unpacked into a folder of the store here, or removes it.

        Not for the event loop. OSError where neither can be done.
        """
        if not old.is_dir() or old.resolve() == self.folder.resolve():
            return
        taken = 0
        with self._changing():
            for path in old.iterdir():
                if not path.name.startswith(".") and _renamed(path, self.folder / path.name):
                    taken += 1
        shutil.rmtree(old)
        logger.warning(
            "%s is no longer used: %d unpacked archives moved to %s, the rest removed", old, taken, self.folder
        )

    @contextmanager
    def _removable(self, size: int) -> Iterator[list[Entry]]:
        """Entries that have to go for so many bytes to fit, none of which anybody uses, or can from now on."""
        entries = self._entries()
        excess = sum(entry.size for entry in entries) + size - self._bound
        found: list[Entry] = []
        with ExitStack() as locks:
            for entry in sorted(entries, key=lambda entry: entry.used):
                lock = try_lock(entry.path, EXCLUSIVE) if excess > 0 else None
                if lock is not None:
                    locks.callback(os.close, lock)
                    found.append(entry)
                    excess -= entry.size
            if excess > 0:
                used = sum(entry.size for entry in entries) - sum(entry.size for entry in found)
                raise CacheFull(f"it needs {size:,} bytes, and {used:,} of the cache's {self._bound:,} are in use")
            yield found

    def _entries(self) -> list[Entry]:
        entries = []
        with os.scandir(self.folder) as found:
            for each in found:
                with suppress(FileNotFoundError):  # another server's doing
                    if not each.name.startswith("."):
                        used = each.stat().st_mtime_ns
                        size = self._sizes.get(each.name) or _size(Path(each.path))
                        entries.append(Entry(Path(each.path), size, used))
        self._sizes = {entry.path.name: entry.size for entry in entries}
        return entries

    def _unpack(self, file: BinaryIO, folder: Path) -> Unpacked:
        for left in folder.iterdir():  # by a process that died
            shutil.rmtree(left)
        out = folder / "content"
        out.mkdir()
        limits = replace(self._limits, size=min(self._limits.size, self._bound))
        return unpack(file, out, limits, self._stopped.is_set)

    @contextmanager
    def _unpacking_folder(self, digest: str, name: str) -> Iterator[Path]:
        folder = self.folder / f"{_UNPACKING}{digest[:_DIGITS]}"

        def waits() -> None:
            logger.info("%s: another server unpacks it: waiting for that", name)

        with locked(folder, self._stopped, lambda: _size(folder), waits):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone among all servers while entries are looked at for removal and added."""
        with locked(self.folder, self._stopped, lambda: self.folder.stat().st_mtime_ns):
            yield

    def _sweep(self) -> None:
        for folder in self.folder.glob(f"{_UNPACKING}*"):
            lock = try_lock(folder, EXCLUSIVE)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _hold(entry: Path) -> int | None:
    """As try_lock, shared with other users; None also where another user of the machine made the folder."""
    lock = try_lock(entry, SHARED)
    if lock is not None and os.fstat(lock).st_uid != os.geteuid():
        os.close(lock)
        return None
    return lock


def _renamed(path: Path, target: Path) -> bool:
    """False where it is there already, or on another disk."""
    try:
        os.rename(path, target)
    except OSError:
        return False
    return True


def _size(folder: Path) -> int:
    """Bytes of its files, of which some may go meanwhile."""
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, file)).st_size
    return total
