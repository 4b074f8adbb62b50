"""What is outermost: every request has an id, every answer says it, and every end is written down and counted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import UNEXPECTED, PalimpsestError
from serve.gateway.door import reply
from serve.gateway.metrics import Metrics
from serve.gateway.traces import Traces
from serve.logs import record
from serve.logs.record import Headers, Record
from serve.logs.writer import write_request

CLIENT_LEFT = 499  # to nobody, and to who waits for a job that another request has cancelled
QUIET = ("/ping", "/metrics", "/v1/state")
"""Routes that are asked all the time: they have a line only where something is wrong."""


class Watcher:
    """Writes down and counts. traces: None where nobody collects them."""

    def __init__(self, metrics: Metrics, traces: Traces | None) -> None:
        self._metrics, self._traces = metrics, traces

    @contextmanager
    def watching(self, request: Record, headers: Headers) -> Iterator[None]:
        """From a request's beginning to its end, whose outcome is known by then. headers: names in lower case."""
        span = self._traces.begin(request, headers) if self._traces else None
        self._metrics.running.inc()
        try:
            yield
        finally:
            self._metrics.running.dec()
            self._write(request)
            if self._traces and span is not None:
                self._traces.end(span, request)

    def refused(self, request: Record) -> None:
        """A request that was answered before the application."""
        request.outcome = "error"
        self._write(request)

    def _write(self, request: Record) -> None:
        request.ended = time.perf_counter()
        self._metrics.on_request(request)
        if request.route not in QUIET or request.outcome != "ok":
            write_request(request)


class Watched:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, watcher: Watcher) -> None:
        self._app, self._watcher = app, watcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Record(record.request_id(scope["headers"]), scope["method"])
        record.begin(request)
        exchange = _Exchange(request, receive, send)
        with self._watcher.watching(request, scope["headers"]):
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except Exception:
                # uvicorn logs it, in this context. Where not even the application's last resort answered, this does.
                if not request.status:
                    await reply(scope["path"], PalimpsestError(UNEXPECTED))(scope, exchange.receive, exchange.send)
                raise
            finally:
                request.outcome = exchange.outcome()


class _Exchange:
    """receive and send of one request, with what went through them."""

    def __init__(self, request: Record, receive: Receive, send: Send) -> None:
        self._request, self._receive, self._send = request, receive, send
        self._id = (record.HEADER.encode(), request.id.encode())
        self._ended = self._left = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._request.received += len(message.get("body", b""))
        elif not self._ended:
            self._left = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._request.status = message["status"]
            message = {**message, "headers": [*message["headers"], self._id]}
        else:
            self._request.sent += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
        await self._send(message)

    def outcome(self) -> str:
        status = self._request.status
        if self._left and (status == CLIENT_LEFT or not self._ended):
            return "client_left"
        if not self._ended:
            return "cut_off"
        return "cancelled" if status == CLIENT_LEFT else "ok" if status < 400 else "error"
