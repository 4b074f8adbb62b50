"""A server inside another process, without a door of its own: Ray's replica, a test, a program that brings its own."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from serve import preflight, startup
from serve.errors import EngineUnavailable
from serve.gateway.door import reply
from serve.gateway.peers import ALONE, Peers
from serve.gateway.services import Services
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

    def __init__(
        self,
        settings: Settings,
        device: Device | None = None,
        peers: Peers = ALONE,
    ) -> None:
        """device: the one that CUDA_VISIBLE_DEVICES names, or the host, unless given. peers: at the same address."""
        self._settings, self._device, self._peers = settings, device, peers
        self._stack = contextlib.AsyncExitStack()
        self._application: FastAPI | None = None
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
            application, supervisor = startup.assemble(settings, catalog, memory, log.engine_said, self._peers)
            stack.callback(supervisor.end)
            await stack.enter_async_context(application.router.lifespan_context(application))
            self._application, self._stack = application, stack.pop_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: http and lifespan, which starts and stops it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
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

    @property
    def runs(self) -> bool:
        return self._application is not None

    @property
    def services(self) -> Services:
        """RuntimeError where it does not run."""
        if self._application is None:
            raise RuntimeError(_NOT_NOW)
        services: Services = self._application.state.services
        return services

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.start()
        except BaseException as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._idle.set()
