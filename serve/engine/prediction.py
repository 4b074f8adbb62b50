"""A request to a handler that is sent while its body still comes in."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from serve.engine.torchserve import Answer
from serve.errors import EngineUnavailable, NotReached


class Prediction:
    """TorchServe hands a request to the worker once it has all of it, so the last piece waits for finish().

    That is called when the model is held: a client that sends slowly keeps no model busy.
    """

    def __init__(self, send: Callable[[str, AsyncIterator[bytes]], Awaitable[Answer]]) -> None:
        """send: passes a body on to a model and returns its answer."""
        self._send = send
        self._pieces: deque[bytes] = deque()
        self._more, self._finished = asyncio.Event(), False
        self._task: asyncio.Task[Answer] | None = None

    def feed(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._more.set()

    def begin(self, model: str) -> asyncio.Task[Answer]:
        """Sends what has been fed, and what will be. Once only: later calls return the same task."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(model))
        return self._task

    def finish(self, model: str) -> asyncio.Task[Answer]:
        """Sends the rest. The task raises NotReached where no worker has seen the request, or what `send` raises."""
        self._finished = True
        self._more.set()
        return self.begin(model)

    def close(self) -> None:
        """Ends it wherever it is: TorchServe drops a request of which the end is missing."""
        if self._task is not None:
            self._task.cancel()
            # What went wrong before finish() is no news: nobody asked for the answer yet.
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self, model: str) -> Answer:
        try:
            return await self._send(model, self._body())
        except EngineUnavailable as error:
            if self._finished:
                raise
            raise NotReached(error.message) from error

    async def _body(self) -> AsyncIterator[bytes]:
        while self._pieces or not self._finished:
            # finish() may come during any yield or wait: what to wait for is asked anew after each.
            if len(self._pieces) > (0 if self._finished else 1):
                yield self._pieces.popleft()
            else:
                self._more.clear()
                await self._more.wait()
