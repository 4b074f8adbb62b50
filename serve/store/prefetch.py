"""Brings archives into the page cache before anyone asks for them: a load then reads memory, not the disk."""

import asyncio
import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from serve.errors import PalimpsestError
from serve.state_file import keep
from serve.store.catalog import Archive, Catalog

LOOK_EVERY = 30.0  # seconds between two looks whether the server is idle
_MOST = 500  # archives that are looked at, the most used first
_CHUNK = 4 << 20  # bytes read at a time: what a request may have to wait for


class Usage:
    """How often each archive was asked for, by name, kept in `file` between runs.

    Halved at every start, so that what was popular long ago gives way.
    """

    MAX_ENTRIES = 2000

    def __init__(self, file: Path) -> None:
        self._file = file
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            self._counts = Counter({name: float(count) / 2 for name, count in json.loads(file.read_text()).items()})
            return
        self._counts = Counter[str]()

    def count(self, name: str) -> None:
        self._counts[name] += 1

    def by_count(self) -> list[str]:
        """The most used first."""
        return [name for name, _ in self._counts.most_common()]

    def save(self) -> None:
        keep(self._file, dict(self._counts.most_common(self.MAX_ENTRIES)))


class Prefetch:
    """Reads the most used archives at the start, and again when the server was used and is idle.

    room: bytes of host memory that may be filled. idle: whether no request
    runs or waits.
    """

    def __init__(
        self,
        catalog: Catalog,
        usage: Usage,
        room: Callable[[], int],
        idle: Callable[[], bool],
    ) -> None:
        self._catalog, self._usage, self.room, self._idle = catalog, usage, room, idle
        self._used = True
        self.bytes_read = 0

    def on_use(self, archive: Archive) -> None:
        self._usage.count(archive.name)
        self._used = True

    async def run(self) -> None:
        """Works until it is cancelled."""
        while True:
            if self._used and self._idle():
                self._used = False
                await self._read_most_used()
                self._usage.save()
            await asyncio.sleep(LOOK_EVERY)

    def close(self) -> None:
        """Keeps what was learned."""
        self._usage.save()

    async def warm(self, archive: Archive, only_while: Callable[[], bool] = lambda: True) -> int:
        """Reads all files of the archive and returns their bytes; less where only_while became false."""
        stop = threading.Event()
        reading = asyncio.ensure_future(asyncio.to_thread(_read, archive, only_while, stop))
        try:
            read = await asyncio.shield(reading)
        except asyncio.CancelledError:
            stop.set()
            await reading
            raise
        self.bytes_read += read
        return read

    async def _read_most_used(self) -> None:
        room = self.room()
        for archive in await asyncio.to_thread(self._archives, self._usage.by_count()):
            with contextlib.suppress(OSError):  # it has left the store
                if await asyncio.to_thread(archive.size) <= room:
                    room -= await self.warm(archive, self._idle)

    def _archives(self, first: list[str]) -> list[Archive]:
        """first: names of those that come before whatever else is in the store."""
        found: dict[Path, Archive] = {}
        for name in islice(dict.fromkeys([*first, *self._catalog.names()]), _MOST):
            with contextlib.suppress(PalimpsestError):  # it has left the store
                archive = self._catalog.find(name)
                found.setdefault(archive.path, archive)
        return list(found.values())


def _read(archive: Archive, only_while: Callable[[], bool], stop: threading.Event) -> int:
    total, buffer = 0, bytearray(_CHUNK)
    for file in archive.files():
        with contextlib.suppress(OSError), file.open("rb", buffering=0) as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            while count := source.readinto(buffer):
                total += count
                if stop.is_set() or not only_while():
                    return total
    return total
