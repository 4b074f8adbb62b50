"""A bound in bytes that requests wait for, in turn."""

import asyncio
from collections import deque
from contextlib import suppress

from serve.errors import QueueFull
from serve.memory_file import MemoryFile

RETRY_AFTER = 5  # seconds


class Budget:
    """`total` bytes at once. wait: seconds until who waits is refused. what: for the message, with the setting."""

    def __init__(self, total: int, wait: float, what: str) -> None:
        self.total, self.used = total, 0
        self._wait, self._what = wait, what
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def reserve(self, size: int) -> int:
        """Waits for its turn, then for room, and returns what it took: `size`, or `total` where that is less.

        Raises QueueFull.
        """
        size = min(size, self.total)
        if not self._waiters and self.used + size <= self.total:
            self.used += size
            return size
        turn = asyncio.get_running_loop().create_future()
        self._waiters.append((size, turn))
        try:
            async with asyncio.timeout(self._wait):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.release(size)
            else:
                with suppress(ValueError):  # it was its turn, and it no longer waited
                    self._waiters.remove((size, turn))
                self._admit()
            if isinstance(error, TimeoutError):
                raise QueueFull(f"{self._what}: try again", RETRY_AFTER) from None
            raise
        return size

    def release(self, size: int) -> None:
        self.used -= size
        self._admit()

    def _admit(self) -> None:
        while self._waiters and self.used + self._waiters[0][0] <= self.total:
            size, turn = self._waiters.popleft()
            if not turn.done():
                self.used += size
                turn.set_result(None)


class Unread:
    """Bytes that lie ready for whoever asked for them. Past `total` no further request is begun."""

    def __init__(self, total: int, wait: float) -> None:
        """wait: seconds that a request waits for room."""
        self.total, self.used, self._wait = total, 0, wait
        self._changed = asyncio.Event()

    @property
    def full(self) -> bool:
        return self.used >= self.total

    async def room(self) -> None:
        """Waits until it is not full; raises QueueFull."""
        try:
            async with asyncio.timeout(self._wait):
                while self.full:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            full = "too many replies are not read by their clients (PALIMPSEST_TRANSIT_MIB): try again"
            raise QueueFull(full, RETRY_AFTER) from None

    def count(self, file: MemoryFile) -> None:
        """Counts the file's bytes until it is closed. It never grows again."""
        size = file.size
        self.used += size

        def taken() -> None:
            self.used -= size
            self._changed.set()

        file.on_close = taken
