"""How replies leave: piece by piece, as fast as the client takes them, and never for longer than a bound."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

from fastapi import Response
from starlette.types import Receive, Scope, Send

from contract.timings import HEADER, server_timing
from serve.engine.answer import Answer
from serve.memory_file import PIECE

logger = logging.getLogger(__name__)

STALLED = 30.0  # seconds in which a client takes nothing
TIME_LIMIT = 300.0  # seconds from the first byte of what lies ready to its last


class Transfer(Response):
    """A reply of which each piece waits until the client has taken most of the one before.

    A client that takes nothing for STALLED seconds, or has not taken all within TIME_LIMIT, is cut off.
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        close: Callable[[], None],
        headers: Mapping[str, str],
        status: int = 200,
        length: int | None = None,
    ) -> None:
        """close: called at the end, whatever it is. length: of all pieces together, where it is known."""
        self._pieces, self._close = pieces, close
        size = {} if length is None else {"content-length": str(length)}
        super().__init__(None, status, {**headers, **size})
        if length is None:
            del self.headers["content-length"]

    @classmethod
    def of(cls, answer: Answer, headers: Mapping[str, str] = {}) -> "Transfer":
        """The answer as it is, with what it took and further headers."""
        pieces, timing = paced(answer.pieces()), {HEADER: server_timing(answer.timings)}
        return cls(pieces, answer.close, {**answer.headers, **timing, **headers}, answer.status, answer.length)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_until_gone(receive))
        try:
            async with asyncio.timeout(STALLED):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for piece in self._pieces:
                if gone.done():
                    return
                async with asyncio.timeout(STALLED):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            async with asyncio.timeout(STALLED):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            # The server closes a connection whose reply was left unfinished.
            logger.warning("a client did not take its reply in time: it was cut off")
        finally:
            gone.cancel()
            self._close()
            await self._pieces.aclose()  # type: ignore[attr-defined]


async def paced(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """What lies ready, in pieces of useful size; others get their turn in between. TimeoutError past TIME_LIMIT."""
    deadline = asyncio.get_running_loop().time() + TIME_LIMIT
    for piece in _joined(pieces):
        yield piece
        await asyncio.sleep(0)
        if asyncio.get_running_loop().time() > deadline:
            raise TimeoutError


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    small: list[bytes] = []
    size = 0
    for piece in pieces:
        small.append(piece)
        size += len(piece)
        if size >= PIECE:
            yield b"".join(small)
            small, size = [], 0
    if small:
        yield b"".join(small)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
