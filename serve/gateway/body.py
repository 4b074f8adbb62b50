"""A request's body, read as it comes in."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import Request

from serve.errors import BodyTimeout, RequestTooLarge

TIME_LIMIT = 300.0  # seconds from the first look at a body to its last byte: 128 MiB at 3.6 Mbit/s


class Body:
    """Iterating gives its pieces from the start, the second time as well: a request may have to be sent again.

    Raises RequestTooLarge as soon as the body is known to be too large, BodyTimeout where it takes too long, and
    starlette's ClientDisconnect.
    """

    def __init__(self, request: Request, max_mib: int) -> None:
        self._stream = request.stream()
        self._limit = max_mib * 2**20
        self._pieces: list[bytes] = []
        self._size = 0
        length = request.headers.get("content-length", "")
        self.length = int(length) if length.isdecimal() else None
        if self.length is not None and self.length > self._limit:
            raise self._too_large()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        deadline = asyncio.get_running_loop().time() + TIME_LIMIT
        while piece := await self._next(deadline):
            yield piece

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self])

    async def _next(self, deadline: float) -> bytes:
        """The next piece, which is kept; nothing at the end."""
        try:
            async with asyncio.timeout_at(deadline):
                while not (piece := await anext(self._stream)):
                    continue
        except StopAsyncIteration:
            return b""
        except TimeoutError:
            raise BodyTimeout(f"the request's body did not arrive within {TIME_LIMIT:g} s") from None
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > self._limit:
            raise self._too_large()
        return piece

    def _too_large(self) -> RequestTooLarge:
        limit = self._limit // 2**20
        return RequestTooLarge(f"the request is larger than {limit} MiB: send a smaller picture, or binary multipart")
