"""A folder that stands for a store on a URL: look-ups ask it, and archives are fetched when they are needed.

CACHE/.stores/<store>/<name>.tar.gz  a few bytes that say what lies there; another file where something else does
CACHE/.stores/<store>/.listing       the tag of what was listed last
CACHE/.stores/<store>/.copies/<...>/ what is fetched of an archive (part), or what it held once it was (sha256)

All servers of one user and machine share it. Each of these folders is changed by whoever has it locked.
"""

import asyncio
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from serve.errors import StoreUnreachable
from serve.store.locks import EXCLUSIVE, Stalled, locked, try_lock
from serve.store.remote import Holding, Packed, RemoteError, remote, run
from serve.store.unpack import SUFFIXES, InvalidArchive
from serve.store_url import StoreUrl

logger = logging.getLogger(__name__)

LOOK_EVERY, LOOK_AT_LEAST_EVERY = 30.0, 300.0  # seconds between two looks; the latter while the store is not reached
ASK_AGAIN = 3.0  # seconds within which a name that is not known makes nobody ask the store once more
LISTING_SECONDS = 20.0
TRIES = 5  # in a row that bring nothing
FIRST_PAUSE = 0.25  # seconds between the first two of these; then twice as long each time
PACE = 64 << 10  # bytes per second, in the mean, that a store has to send
_PARTS = 3  # unfinished copies that are kept beside the one that is fetched
_TELL_EVERY = 30.0  # seconds between two lines about a long fetch


class Mirror:
    """is_name: whether an archive can be called so. most: bytes that a packed archive may have. stopped: ends all work.

    folder: to be looked at as any store.
    """

    def __init__(
        self, url: StoreUrl, cache: Path, is_name: Callable[[str], bool], most: int, stopped: threading.Event
    ) -> None:
        self.url, self._is_name, self._most, self._stopped = url, is_name, most, stopped
        # Not by its secrets: they may change, and what was fetched stays.
        self.folder = cache / ".stores" / hashlib.sha256(str(url).rstrip("/").encode()).hexdigest()[:16]
        self._remote = remote(url)
        self._asked = 0.0
        self._asking: asyncio.Task[None] | None = None
        self.reached = True  # when it was last asked
        self.fetched_bytes = 0
        self._under_way: dict[str, tuple[int, int]] = {}

    @property
    def is_known(self) -> bool:
        """Whether the store was ever listed."""
        return (self.folder / ".listing").is_file()

    def sync(self) -> None:
        """Asks the store what it holds. Raises StoreUnreachable and Stopped. Not for the event loop."""
        try:
            with locked(self.folder, self._stopped, lambda: None):
                found = run(self._remote.holding(self._tag()), self._stopped, LISTING_SECONDS)
                if found is not None:
                    self._take(found)
        except (RemoteError, Stalled) as error:
            raise self.unreachable(str(error)) from None
        except OSError as error:
            raise self.unreachable(f"{self.folder} cannot be written ({error.strerror})") from None

    async def refresh(self) -> None:
        """As sync(), for all that ask meanwhile, and at most every ASK_AGAIN seconds: else as the last one ended."""
        now = time.monotonic()
        if self._asking is None or (self._asking.done() and now - self._asked > ASK_AGAIN):
            self._asked = now
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # if nobody waits for it
        try:
            await asyncio.shield(self._asking)
        except StoreUnreachable as error:
            raise StoreUnreachable(error.message) from None  # the task's own would grow with each who is told

    async def follow(self) -> None:
        """Keeps up with the store until it is cancelled."""
        wait = LOOK_EVERY
        while True:
            with suppress(StoreUnreachable):
                await self.refresh()
            wait = LOOK_EVERY if self.reached else min(2 * wait, LOOK_AT_LEAST_EVERY)
            await asyncio.sleep(wait)

    async def _ask(self) -> None:
        try:
            await asyncio.to_thread(self.sync)
        except StoreUnreachable as error:
            if self.reached:
                logger.warning("%s; what is in the cache is served", error.message)
            self.reached = False
            raise
        if not self.reached:
            logger.info("the store %s is reached again", self.url)
        self.reached = True

    @contextmanager
    def copy(self, file: Path) -> Iterator["Copy"]:
        """Of what a file of the folder stands for, for this process alone. Raises OSError, Stalled and Stopped."""
        archive = Packed(**json.loads(file.read_text()))
        if archive.size > self._most:
            raise InvalidArchive(f"it has {archive.size:,} bytes, and PALIMPSEST_CACHE_MIB allows {self._most:,}")
        copy = Copy(archive, self._copies / _key(archive), self)

        def waits() -> None:
            logger.info("%s: another server fetches it: waiting for that", archive.name)

        with locked(copy.folder, self._stopped, copy.begun, waits):
            yield copy

    def fetch(self, archive: Packed, part: Path) -> None:
        """Brings what the part lacks. Raises RemoteError, InvalidArchive, OSError and Stopped."""
        self._drop_old_parts(part)
        missing = archive.size - _size(part)
        if missing > shutil.disk_usage(part.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        logger.info("%s: fetching %d of %d bytes from %s", archive.name, missing, archive.size, self.url)
        began = time.monotonic()
        try:
            with open(part, "ab") as file:
                run(self._receive(archive, file), self._stopped, 60 + archive.size / PACE)
        except OSError:  # the disk is full, say: others need it
            part.unlink(missing_ok=True)
            raise
        finally:
            self._under_way.pop(_stem(archive.name), None)
        logger.info("%s: fetched in %.1f s", archive.name, time.monotonic() - began)

    def under_way(self, name: str) -> tuple[int, int]:
        """Of an archive that is being fetched: the bytes that are here, and all of them; else 0, 0."""
        return self._under_way.get(name, (0, 0))

    def unreachable(self, reason: str) -> StoreUnreachable:
        return StoreUnreachable(f"the store {self.url} cannot be used: {reason}")

    @property
    def _copies(self) -> Path:
        return self.folder / ".copies"

    def _tag(self) -> str:
        try:
            return (self.folder / ".listing").read_text()
        except FileNotFoundError:
            return ""

    def _take(self, found: Holding) -> None:
        """Makes the folder show it. Killed in the middle, the next one does it all: the tag comes last."""
        wanted = {archive.name: archive for archive in found.archives if self._is_served(archive.name)}
        (self.folder / ".listing").unlink(missing_ok=True)
        for name in self._shown() - wanted.keys():
            self._remove(name)
        for name, archive in wanted.items():
            self._show(name, archive)
        self._drop_old_copies(wanted)
        (self.folder / ".listing").write_text(found.tag)

    def _is_served(self, name: str) -> bool:
        # A folder that is called as a file could be in the way of one.
        named_as_files = any(folder.endswith(SUFFIXES) for folder in name.split("/")[:-1])
        return name.endswith(SUFFIXES) and self._is_name(_stem(name)) and not named_as_files

    def _shown(self) -> set[str]:
        names = set()
        for path, folders, files in os.walk(self.folder):
            folders[:] = [each for each in folders if not each.startswith(".")]
            names |= {
                os.path.relpath(os.path.join(path, file), self.folder) for file in files if file.endswith(SUFFIXES)
            }
        return names

    def _show(self, name: str, archive: Packed) -> None:
        """Another file where it is another archive: that is how the catalog notices."""
        file, text = self.folder / name, json.dumps(archive._asdict())
        with suppress(FileNotFoundError):
            if file.read_text() == text:
                return
        new = self.folder / ".new"
        new.write_text(text)
        file.parent.mkdir(parents=True, exist_ok=True)
        os.replace(new, file)

    def _remove(self, name: str) -> None:
        file = self.folder / name
        file.unlink(missing_ok=True)
        with suppress(OSError):  # the first that is not empty
            for folder in file.parents:
                if folder == self.folder:
                    break
                folder.rmdir()

    def _drop_old_copies(self, wanted: Mapping[str, Packed]) -> None:
        keys = {_key(archive) for archive in wanted.values()}
        for folder in self._copies.glob("*"):
            if folder.name not in keys:
                _drop(folder)

    def _drop_old_parts(self, but: Path) -> None:
        parts = [part for part in self._copies.glob("*/part") if part != but]
        for part in sorted(parts, key=_changed, reverse=True)[_PARTS:]:
            _drop(part.parent)

    async def _receive(self, archive: Packed, file: BinaryIO) -> None:
        """Goes on where the line dropped."""
        fruitless, told = 0, time.monotonic()
        while (before := file.tell()) < archive.size:
            reason = "it ends too early"
            try:
                async with aclosing(self._remote.read(archive, before)) as pieces:
                    async for piece in pieces:
                        file.write(piece)
                        self.fetched_bytes += len(piece)
                        self._under_way[_stem(archive.name)] = file.tell(), archive.size
                        if file.tell() > archive.size:
                            raise InvalidArchive(
                                f"the store sends more than the {archive.size:,} bytes that it promised"
                            )
                        if time.monotonic() - told > _TELL_EVERY:
                            told = time.monotonic()
                            logger.info("%s: %d of %d bytes are here", archive.name, file.tell(), archive.size)
            except RemoteError as error:
                reason = str(error)
            file.flush()
            fruitless = 0 if file.tell() > before else fruitless + 1
            if fruitless == TRIES:
                raise RemoteError(reason)
            if file.tell() < archive.size:
                await asyncio.sleep(FIRST_PAUSE * 2**fruitless)
        if not await self._remote.is_current(archive):
            file.truncate(0)
            raise RemoteError(f"{archive.name} was replaced while it was fetched")


class Copy:
    """One version of one archive on its way here, in a folder that this process has locked."""

    def __init__(self, archive: Packed, folder: Path, mirror: Mirror) -> None:
        self.archive, self.folder, self._mirror = archive, folder, mirror
        self.part = folder / "part"

    @property
    def sha256(self) -> str:
        """As the store says, or as it was when it was fetched before; else empty."""
        with suppress(FileNotFoundError):
            return self.archive.sha256 or (self.folder / "sha256").read_text()
        return ""

    def begun(self) -> int:
        """Bytes that are here."""
        return _size(self.part)

    def fetch(self) -> None:
        """Brings what is missing. Raises RemoteError, InvalidArchive, OSError and Stopped; the part stays there."""
        self._mirror.fetch(self.archive, self.part)

    def drop(self) -> None:
        """What is here is of no use."""
        self.part.unlink(missing_ok=True)

    def done(self, sha256: str) -> None:
        """It is unpacked: what it held stays, so that nobody fetches it again while that is in the cache."""
        (self.folder / "sha256").write_text(sha256)
        self.drop()


def _stem(name: str) -> str:
    """Without the suffix, which it has."""
    return next(name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))


def _key(archive: Packed) -> str:
    return hashlib.sha256(repr(archive).encode()).hexdigest()[:32]


def _drop(folder: Path) -> None:
    """Unless somebody is at it."""
    lock = try_lock(folder, EXCLUSIVE)
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _size(file: Path) -> int:
    with suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


def _changed(file: Path) -> float:
    with suppress(FileNotFoundError):
        return file.stat().st_mtime
    return 0.0
