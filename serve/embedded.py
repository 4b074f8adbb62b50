"""A server inside another process, without a door of its own: Ray's replica, a test, a program that brings its own."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from starlette.types import ASGIApp, Receive, Scope, Send

from serve import preflight, startup
from serve.errors import EngineUnavailable
from serve.gateway.door import reply
from serve.logs.writer import logging_begun
from serve.residency.memory import Device
from serve.settings import Settings

logger = logging.getLogger(__name__)

_NOT_NOW = "this server is starting or stopping: try again in a few seconds"


class Embedded:
    """An ASGI application for one device, with a TorchServe of its own; it answers http between start() and stop().

    settings: `state` is a folder that no other server uses; host, port and what is TLS's are for whoever listens. Any
    number of them may run on a machine, and share the store.
    """

    def __init__(self, settings: Settings, device: Device | None = None) -> None:
        """device: the one that CUDA_VISIBLE_DEVICES names, or the host, unless given."""
        self._settings, self._device = settings, device
        self._stack = contextlib.AsyncExitStack()
        self._application: ASGIApp | None = None
        self._running = 0
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Builds demo archives where they are due and missing, and returns once requests are answered.

        Raises preflight.Unusable, which names the setting, SystemExit where an archive cannot be built, and
        EngineUnavailable where TorchServe does not start; nothing is left behind then.
        """
        settings = self._settings
        await asyncio.to_thread(preflight.check_machine, settings)
        device = self._device or startup.device_here()
        catalog = await asyncio.to_thread(startup.catalog_of, settings, logger.info)
        memory = startup.memory_of(settings, device, logger.info)
        async with contextlib.AsyncExitStack() as stack:
            log = stack.enter_context(logging_begun(settings))
            application, supervisor = startup.assemble(settings, catalog, memory, log.engine_said)
            stack.callback(supervisor.end)
            await stack.enter_async_context(application.router.lifespan_context(application))
            self._application, self._stack = application, stack.pop_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, of http alone."""
        if self._application is None:
            await reply(scope["path"], EngineUnavailable(_NOT_NOW))(scope, receive, send)
            return
        with self._counted():
            await self._application(scope, receive, send)

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests, and returns once none runs, or after so many seconds; whether none does."""
        self._application = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._running:
                    self._idle.clear()
                    await self._idle.wait()
        return not self._running

    async def stop(self) -> None:
        """Ends what still runs, TorchServe and its workers; a second call does nothing."""
        self._application = None
        await self._stack.aclose()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._idle.set()
