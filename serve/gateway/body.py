"""A request's body, received into memory that a worker can open."""

import asyncio
from collections.abc import Iterator

from fastapi import Request
from starlette.types import Message, Receive

from serve.budget import Budget
from serve.errors import BadRequest, BodyTimeout, RequestTooLarge
from serve.memory_file import MemoryFile

TIME_LIMIT = 300.0  # seconds from the first look at a body to its last byte: 128 MiB at 3.6 Mbit/s
SILENCE = 30.0  # seconds without a byte
PACE = 32 * 1024  # bytes a second that it arrives with at least, the first SILENCE seconds aside: its place is taken
SMALL = 2**20
"""Bytes of a body that are counted apart, so that clicks need not wait behind photographs."""
RECEIVED = "palimpsest.received"
"""In the scope of a request whose body was received before its route asks for it: a Received."""


class Bodies:
    """All bodies that are in memory, together `total` bytes at most; an eighth of it is for small ones.

    A body takes its place before it is read, all that it may have, and gives it back when its file is closed.
    """

    def __init__(self, total: int, max_mib: int, wait: float) -> None:
        """max_mib: of one. wait: seconds that one waits for its place."""
        self._max = max_mib * 2**20
        what = "too many request bodies are on their way (PALIMPSEST_TRANSIT_MIB)"
        self._small, self._large = Budget(total // 8, wait, what), Budget(total - total // 8, wait, what)

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._small.used + self._large.used

    async def receive(self, request: Request) -> MemoryFile:
        """The whole body, for the caller to close. Nobody can change it any more.

        Raises RequestTooLarge as soon as it is known to be too large, BodyTimeout, QueueFull where there is no place in
        time, BadRequest where it does not come to its promised length, and starlette's ClientDisconnect.
        """
        received: Received | None = request.scope.get(RECEIVED)
        if received is not None:
            return received.take()
        promised = request.headers.get("content-length", "")
        length = int(promised) if promised.isdecimal() else None
        if length is not None and length > self._max:
            raise self._too_large()
        place = _Place()
        file = MemoryFile()
        file.on_close = place.give_back
        try:
            await self._fill(file, request, length, place)
            file.seal()
        except BaseException:
            file.close()
            raise
        return file

    async def _fill(self, file: MemoryFile, request: Request, length: int | None, place: "_Place") -> None:
        small = length is None or length <= SMALL
        await place.take(self._small if small else self._large, SMALL if length is None else length)
        size, limit = 0, SMALL if length is None else self._max
        now = asyncio.get_running_loop().time
        began = now()
        stream = request.stream()
        while True:
            try:
                in_pace = began + SILENCE + size / PACE
                async with asyncio.timeout_at(min(began + TIME_LIMIT, now() + SILENCE, in_pace)):
                    piece = await anext(stream, None)
            except TimeoutError:
                raise BodyTimeout(
                    f"the request's body did not arrive within {TIME_LIMIT:g} s, nothing of it came for {SILENCE:g} s,"
                    f" or less than {PACE >> 10} KiB a second after these"
                ) from None
            if piece is None:
                break
            size += len(piece)
            if size > self._max:
                raise self._too_large()
            if size > limit:  # it did not say how long it is, and is no small one
                await place.take(self._large, self._max)
                limit = self._max
            file.write(piece)
        if length is not None and size != length:
            raise BadRequest(f"the body ended after {size} of {length} bytes")
        if length is None:
            place.shrink(size)

    def _too_large(self) -> RequestTooLarge:
        limit = self._max // 2**20
        return RequestTooLarge(f"the request is larger than {limit} MiB: send a smaller picture, or binary multipart")


class Received:
    """A body that somebody had to see before its route, which may take it as it is, or receive it again."""

    def __init__(self, file: MemoryFile, rest: Receive) -> None:
        """rest: tells what comes after the body."""
        self._file: MemoryFile | None = file
        self._pieces: Iterator[bytes] | None = file.pieces()
        self._rest = rest

    def take(self) -> MemoryFile:
        """For the caller to close."""
        assert self._file is not None
        file, self._file, self._pieces = self._file, None, None
        return file

    async def receive(self) -> Message:
        if self._pieces is None:
            return await self._rest()
        piece = next(self._pieces, None)
        if piece is None:
            self._pieces = None
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    def close(self) -> None:
        if self._file is not None:
            self.take().close()


class _Place:
    """What one body has taken of the budgets."""

    def __init__(self) -> None:
        self._taken: list[tuple[Budget, int]] = []

    async def take(self, budget: Budget, size: int) -> None:
        self._taken.append((budget, await budget.reserve(size)))

    def shrink(self, size: int) -> None:
        """Gives back what the last one took for more than `size` bytes."""
        budget, taken = self._taken.pop()
        self._taken.append((budget, min(size, taken)))
        budget.release(max(0, taken - size))

    def give_back(self) -> None:
        for budget, size in self._taken:
            budget.release(size)
        self._taken.clear()
