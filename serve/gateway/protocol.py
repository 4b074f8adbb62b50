"""HTTP/1 as it comes in: uvicorn's own protocol, within bounds.

uvicorn speaks it through httptools (llhttp, the parser of Node.js), which reads strictly: a folded line, a NUL, two
Content-Lengths or one beside Transfer-Encoding are errors. What uvicorn lacks is added here: bounds on request line,
headers, trailers, chunk framing, pipelined requests, connections and silence; an offered upgrade (h2c, websocket) that
is ignored as RFC 9110 wants it; a refused body's sender can read the answer; errors in the API's own shape.

Weighed and left: uvicorn's h11 has a bound for the head alone, but takes 3 MB of body in Python, several times as slow.
hypercorn is h11 as well; it bounds silence, not connections, and its HTTP/2 would be one more door. granian (Rust) is
fast, but has its own loop, and neither a bound for the number of headers nor a shape for its errors. nginx in front has
all of it, but is one more process to install, start and stop on a workstation.
"""

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.errors import UNEXPECTED, EngineUnavailable, PalimpsestError
from serve.gateway.connections import Doorkeeper
from serve.gateway.line import Line
from serve.gateway.refusal import Refused
from serve.logs.record import Record, request_id

logger = logging.getLogger(__name__)

REQUEST_LINE = 8 * 1024  # bytes
HEADERS = 100
HEAD_BYTES = 32 * 1024  # of a request line and headers together; of trailers; of chunks' framing beyond 7 per byte
PIPELINED = 16  # requests that wait behind the one that is being answered
HEAD_SECONDS = 30.0  # from the connection, or the first byte of a later request, to the end of its head
IDLE_SECONDS = 75.0  # from a reply to the next request

_FRAMING = 8  # bytes on the wire for one of the body: "1", CR, LF, the byte, CR, LF and some
_ENDLESS = 2**63
_UPGRADE = {b"upgrade", b"http2-settings"}


class Connection(HttpToolsProtocol):
    """One client's connection. Its task waits for one request at a time; those pipelined behind it queue up."""

    def __init__(self, doorkeeper: Doorkeeper, on_refused: Callable[[Record], None], **uvicorn: Any) -> None:
        """on_refused: told of every request that is refused here, and never comes to the application."""
        self._body: list[bytes] = []
        # Called for every chunk, 43,000 times for 256 KB of one-byte chunks: a method of ours would take 13 ms more.
        self.on_body = self._body.append  # type: ignore[assignment]
        super().__init__(**uvicorn)
        self._doorkeeper, self._on_refused = doorkeeper, on_refused
        self._timer: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None
        self._refusal: Refused | None = None  # to be told once all requests before it are answered
        self._upgrade = False  # the head that has just ended offers one
        self._in_head = self._in_body = False
        self._turned = False  # whether a head began, or a head or body ended, in the piece that is being parsed
        self._head_bytes = self._head_fed = self._fields = self._framing = 0
        self._body_left = 0  # bytes that are known to be the body's
        self._idle = True  # nothing of a request has come in yet
        self._deaf = False  # nothing that comes in is read any more

    # The transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._line = Line(transport, self.loop, self._on_close)
        super().connection_made(self._line)  # type: ignore[arg-type]
        if self._doorkeeper.admit(self, self.client[0] if self.client else ""):
            self._arm(HEAD_SECONDS, self._line.close)
        elif self._doorkeeper.may_say_no(self):
            self._tell(Refused(503, "too_many_connections", "too many connections: try again in a few seconds", 5))
        else:
            self._line.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deaf = True
        self._line.lost()
        self._disarm()
        self._doorkeeper.gone(self)
        self._abandon()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._line.heard()
        if self._idle and not self._deaf:
            self._idle = False
            self._arm(HEAD_SECONDS, self._head_too_slow)
        rest = memoryview(data)
        while rest and not self._deaf:
            # What can be nothing but a body needs no bounds, and each of its pieces is copied once more.
            size = max(HEAD_BYTES, self._body_left)
            piece, rest = rest[:size], rest[size:]
            self._parse(piece)

    def shutdown(self) -> None:
        """uvicorn's, when the server stops: what runs may end, an unfinished head gets its answer."""
        if self._running is None and self._in_head and not self._deaf:
            self._refuse(Refused(503, EngineUnavailable.code, "the server is stopping: try again in a few seconds", 5))
        else:
            super().shutdown()

    def unsent(self) -> int:
        return self._line.unsent()

    def drop(self) -> None:
        self._deaf = True
        self._line.abort()

    def _on_close(self) -> bool:
        """Returns whether the client may still be sending."""
        still_sends = self._in_body or self._in_head or self._deaf or bool(self.pipeline)
        self._deaf = True
        self._disarm()
        self.flow.resume_reading()
        self._doorkeeper.waits(self)
        return still_sends

    def _arm(self, seconds: float, action: Any) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Parsing

    def _parse(self, piece: memoryview) -> None:
        """Reads the next bytes: HEAD_BYTES at most, or what is left of a body of known length."""
        self._turned = False
        after_upgrade: int | None = None
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            after_upgrade = upgrade.args[0]
        except httptools.HttpParserCallbackError as error:
            self._refuse(_own(error))
            return
        except httptools.HttpParserError as error:
            self._refuse(self._unreadable(str(error)))
            return
        if after_upgrade is not None:  # handled out here, or the next error's context would be this one
            self._parse_without_upgrade(piece[after_upgrade:])
            return
        received = self._pass_body_on()
        if self._in_body and not self._turned:
            self._framing = max(0, self._framing + len(piece) - _FRAMING * received)
            if self._framing > HEAD_BYTES:
                self._refuse(Refused(431, "headers_too_large", f"over {HEAD_BYTES} bytes of trailers or chunk framing"))
        elif not self._in_body and not self._turned:
            self._head_fed += len(piece)
            if self._head_fed > HEAD_BYTES:
                self._refuse(_too_large_head())

    def _parse_without_upgrade(self, rest: memoryview) -> None:
        """Starts again with the head that offered the upgrade, less the offer: the parser would take no body."""
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(t for t in map(bytes.strip, value.split(b",")) if t.lower() not in _UPGRADE)
            if name not in _UPGRADE:
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._upgrade = False
        for piece in (memoryview(b"\r\n".join([*lines, b"", b""])), rest):
            if piece and not self._deaf:
                self._parse(piece)

    def _unreadable(self, reason: str) -> Refused:
        if self._in_head and self.url == b"*" and "PRI" in reason:
            return Refused(505, "http_version", "HTTP/2 is not served here: use HTTP/1.1")
        return Refused(400, "bad_request", f"this is not valid HTTP/1.1: {reason}")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._turned = True
        self._head_bytes = self._head_fed = self._fields = self._framing = 0

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > REQUEST_LINE:
            raise Refused(414, "address_too_long", f"the address has more than {REQUEST_LINE} bytes")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._head_bytes += len(name) + len(value) + len(": \r\n")
        if self._fields > HEADERS:
            raise Refused(431, "headers_too_large", f"there are more than {HEADERS} headers")
        if self._head_bytes > HEAD_BYTES:
            raise _too_large_head()
        if self._in_head:  # else a trailer, which nobody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_head(self.parser.get_method(), self.parser.get_http_version())
        self._in_head, self._turned = False, True
        self._upgrade = self.parser.should_upgrade()
        if not self._upgrade:
            self._in_body = True
            self._body_left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
            super().on_headers_complete()

    def _check_head(self, method: bytes, version: str) -> None:
        if version not in ("1.0", "1.1"):
            raise Refused(505, "http_version", f"HTTP/{version} is not served here: use HTTP/1.1")
        if method == b"CONNECT":
            raise Refused(501, "not_implemented", "this is no proxy: CONNECT is not served")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (not hosts and version == "1.1"):
            raise Refused(400, "bad_request", f"there must be one Host header, and there are {hosts}")
        if self.url == b"*" and method == b"OPTIONS":
            self.url = b"/"  # asks about the server as a whole
        if not (httptools.parse_url(self.url).path or b"").startswith(b"/"):
            raise Refused(400, "bad_request", "the address has no path")
        if len(self.pipeline) >= PIPELINED:
            raise Refused(400, "too_many_requests", f"more than {PIPELINED} requests wait on this connection")

    def on_message_complete(self) -> None:
        if self._upgrade:
            return
        self._pass_body_on()
        self._in_body, self._turned, self._body_left = False, True, 0
        super().on_message_complete()

    def _pass_body_on(self) -> int:
        """Returns how many bytes."""
        body = b"".join(self._body)
        self._body.clear()
        self._body_left = max(0, self._body_left - len(body))
        if body and self.cycle is not None:
            super().on_body(body)
        return len(body)

    # Answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._disarm()
        self._doorkeeper.busy(self)
        super()._start_asgi_task(cycle, functools.partial(self._run, cycle, app))

    async def _run(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
        endless = False  # no chunks before HTTP/1.1: a reply of unknown length ends with the connection

        async def send_on(message: Any) -> None:
            nonlocal endless
            if message["type"] == "http.response.start":
                if cycle.more_body:
                    cycle.keep_alive = False  # an answer ahead of the request's end is the last one
                names = {name.lower() for name, _ in message.get("headers", ())}
                endless = scope["http_version"] == "1.0" and b"content-length" not in names
                if endless:
                    cycle.chunked_encoding, cycle.expected_content_length = False, _ENDLESS
            elif endless and not message.get("more_body"):
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        try:
            await app(scope, receive, send_on)
        except asyncio.CancelledError:  # the server stops, amid a reply
            self._abandon()
            self._line.abort()

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._running = None
        if self._line.is_closing():
            return
        if self.pipeline:
            self.flow.resume_reading()
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._tell(self._refusal)
        else:
            self.flow.resume_reading()
            self._doorkeeper.waits(self)
            self._idle = not self._in_head
            self._arm(*((HEAD_SECONDS, self._head_too_slow) if self._in_head else (IDLE_SECONDS, self._line.close)))

    def _head_too_slow(self) -> None:
        self._refuse(Refused(408, "request_timeout", f"the request's head did not arrive within {HEAD_SECONDS:g} s"))

    def _refuse(self, refusal: Refused) -> None:
        """Ends the reading; whatever was asked before is answered first."""
        self._deaf = True
        self._body.clear()
        if self._in_body and self.cycle is self._running:
            started = self._running is not None and self._running.response_started
            self._abandon()
            if started:
                self._line.close()
            else:
                self._tell(refusal)
            return
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # the request whose body is broken
        if self._running is None:
            self._tell(refusal)
        else:
            self._refusal = refusal

    def _abandon(self) -> None:
        """Tells whatever answers that nobody is there any more."""
        for cycle in filter(None, (self._running, self.cycle)):
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()
        self.flow.resume_writing()

    def _tell(self, refusal: Refused) -> None:
        self._deaf = True
        # Of a head that was refused nothing is believed.
        request = Record(request_id(()), "")
        request.status = refusal.status
        request.fails(refusal.code)
        self._line.write(refusal.reply(self.server_state.default_headers, request.id))
        self._on_refused(request)
        self._line.close()


def _own(error: httptools.HttpParserCallbackError) -> Refused:
    """What a callback of ours raised."""
    cause = error.__context__
    if isinstance(cause, Refused):
        return cause
    if isinstance(cause, httptools.HttpParserError):
        return Refused(400, "bad_request", "the address cannot be read")
    logger.error("a request could not be read", exc_info=cause)
    return Refused(500, PalimpsestError.code, UNEXPECTED)


def _too_large_head() -> Refused:
    return Refused(431, "headers_too_large", f"request line and headers together have more than {HEAD_BYTES} bytes")
