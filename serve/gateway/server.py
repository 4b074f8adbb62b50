"""The server around the application: uvicorn with bounded connections and a clean end."""

import asyncio
import functools
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from serve.gateway import proxies, tls
from serve.gateway.connections import Doorkeeper, most_connections, raise_descriptor_limit
from serve.gateway.protocol import Connection
from serve.logs.record import Record
from serve.settings import Settings

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 5.0  # for requests that are given up to be answered, and as many for the answers to leave
FAREWELL_SECONDS = 0.5  # for clients to close their connections


class Server(uvicorn.Server):
    """application: create_app's. on_ready: called once it serves.

    SIGINT or SIGTERM ends it: running requests get `stop_timeout` seconds, or until the second signal; then 503. The
    application's lifespan ends in any case.
    """

    def __init__(self, application: FastAPI, settings: Settings, on_ready: Callable[[], None] = lambda: None) -> None:
        """Raises tls.TlsError."""
        doorkeeper = Doorkeeper(most_connections(raise_descriptor_limit()), proxies.networks(settings.proxies))
        super().__init__(
            uvicorn.Config(
                application,
                host=settings.host,
                port=settings.port,
                http=_protocol(settings, doorkeeper, application.state.watcher.refused),
                ws="none",
                # Else any process of this machine could name another's address as its own.
                proxy_headers=bool(settings.proxies),
                forwarded_allow_ips=settings.proxies,
                server_header=False,
                log_config=None,  # its loggers are as any other
                log_level="warning",
                access_log=False,
            )
        )
        self._application, self._stop_timeout, self._on_ready = application, settings.stop_timeout, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._application.openapi()  # takes 60 ms: not while requests wait
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Instead of uvicorn's, which answers what it cancels in text/plain, logs it as errors, and skips the
        application's own clean-up at the second Ctrl-C."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        tasks, connections = self.server_state.tasks, cast(set[Connection], self.server_state.connections)
        await _until(lambda: not tasks or self.force_exit, self._stop_timeout)
        if tasks:
            logger.warning("%d requests did not end in time: they get 503", len(tasks))
            for task in list(tasks):
                task.cancel()
        await _until(lambda: not tasks, LAST_WORDS_SECONDS)
        await _until(lambda: not any(connection.unsent() for connection in connections), LAST_WORDS_SECONDS)
        await _until(lambda: not connections, FAREWELL_SECONDS)
        for connection in list(connections):
            connection.drop()
        await self.lifespan.shutdown()


def _protocol(settings: Settings, doorkeeper: Doorkeeper, on_refused: Callable[[Record], None]) -> Any:
    """What makes a protocol for each connection."""
    if settings.tls_cert is None or settings.tls_key is None:
        return functools.partial(Connection, doorkeeper, on_refused)
    certificate = tls.Certificate(settings.tls_cert, settings.tls_key)
    return functools.partial(tls.Handshake, certificate, doorkeeper, on_refused)


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
