"""What every request passes before it is routed, and every reply on its way out; in microseconds.

A page of another origin must neither change anything here nor read anything: the server trusts whoever reaches it, and
that is every page that the user's browser shows. Cross-site requests that change state are refused by what browsers say
of themselves (Sec-Fetch-Site, else Origin), unless their origin is one that may (origins.py). Reading is left to the
same-origin policy, which a page evades whose name's address changes to this machine's (DNS rebinding), so that the Host
must be a name by which this server is known.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import NamedTuple

from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import BadRequest, BodyTimeout, EngineUnavailable, PalimpsestError, RequestTooLarge
from serve.gateway import sagemaker
from serve.gateway.access import fairuse
from serve.gateway.access.fairuse import FairUse
from serve.gateway.access.guard import KEY, Guard
from serve.gateway.body import RECEIVED
from serve.gateway.openai import errors as openai_errors
from serve.gateway.origins import DEFAULT_PORT, Origins
from serve.logs import record

SMALL_BODY = 64 * 1024  # bytes, wherever no picture is taken
SMALL_BODY_SECONDS = 30.0
RETRY_AFTER = b"5"  # seconds, in a 429 or 503 that names none: a handler's own

_PICTURES = re.compile(r"/(predictions|endpoints)/|/models/.+/invoke$|/v1/(images|images/edits|segment|erase|replace)$")
_CHANGING = {"POST", "PUT", "PATCH", "DELETE"}
_SAME = {b"same-origin", b"none"}  # none: the user's own doing, as an address typed in
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]\\]+)(:\d{1,5})?", re.ASCII)
# Names that the public DNS does not serve, so that no page can come from there and move here.
_PRIVATE = ("localhost", ".localhost", ".local", ".internal")
_CONTRADICTORY = b""  # what is said twice is nothing that a browser says
_SHOWN = 80

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class UnknownHost(BadRequest):
    status, code = 421, "unknown_host"


class CrossSite(BadRequest):
    status, code = 403, "cross_site"


class Hosts:
    """The names by which clients may call this server.

    Always: IP addresses, names without a dot (this machine's, those of a container network), names under localhost,
    local and internal; this machine's name; and `names`, of which one that begins with a dot stands for all below it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        given = [name.strip().lower().rstrip(".") for name in names]
        self._names = {socket.gethostname().lower(), *(name for name in given if name)}
        self._suffixes = (*_PRIVATE, *(name for name in given if name.startswith(".")))

    def knows(self, host: str) -> bool:
        """host: a Host header's value."""
        match = _HOST.fullmatch(host.lower())
        if match is None:
            return False
        name = match[1].removesuffix(".")
        return name in self._names or "." not in name.strip("[]") or name.endswith(self._suffixes) or _is_address(name)


class _Told(NamedTuple):
    """What of a request's headers matters here."""

    host: bytes | None
    origin: bytes | None
    site: bytes | None
    body: int | None  # bytes that the request promises; None where it does not say how many


class Door:
    """An ASGI application around another.

    hosts: those that it answers to. origins: other sites whose pages may change something. guard: asks for keys where
    there are any. fair_use: what each key may have.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts, origins: Origins, guard: Guard, fair_use: FairUse) -> None:
        self._app, self._hosts, self._origins, self._guard, self._fair_use = app, hosts, origins, guard, fair_use

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"
        started = events = False

        async def send_on(message: Message) -> None:
            nonlocal started, events
            if message["type"] == "http.response.start":
                started = True
                events = (b"content-type", b"text/event-stream") in [(n, v[:17]) for n, v in message["headers"]]
                message = {**message, "headers": _completed(message["headers"], message["status"])}
            elif head:
                message = {**message, "body": b""}
            await send(message)

        path, method = scope["path"].rstrip("/") or "/", "GET" if head else scope["method"]
        inner = {**scope, "path": path, "method": method}
        try:
            told = _told(scope)
            self._check(scope, told)
            unproven = self._guard.admit(scope, inner)
            if told.body != 0 and not _PICTURES.match(path):
                receive = await _small_body(receive, told.body or 0)
            if unproven is not None:
                receive = await self._guard.prove(unproven, inner, receive)
            if not fairuse.counts(path):
                await self._app(inner, receive, send_on)
                return
            with self._fair_use.request(fairuse.client_of(inner)) as inner[fairuse.SHARE]:
                await self._app(inner, receive, send_on)
        except ClientDisconnect:
            return
        except PalimpsestError as error:
            await reply(path, error)(scope, receive, send_on)
        except asyncio.CancelledError:
            stopping = EngineUnavailable("the server is stopping, and this request did not end in time: send it again")
            if not started:
                await reply(path, stopping)(scope, receive, send_on)
            elif events:
                last = b"event: error\ndata: " + bytes(reply(path, stopping).body) + b"\n\n"
                await send({"type": "http.response.body", "body": last, "more_body": False})
            else:
                raise
        finally:
            if request := record.current():
                request.route, request.key = _template(inner), inner.get(KEY)
            if RECEIVED in inner:
                inner[RECEIVED].close()

    def _check(self, scope: Scope, told: _Told) -> None:
        """Raises UnknownHost or CrossSite."""
        host = None if told.host is None else told.host.decode("latin-1")
        if host is not None and not self._hosts.knows(host):
            raise UnknownHost(
                f"this server does not go by the name {host[:_SHOWN]!r}: call it by its address, or name it in"
                " PALIMPSEST_HOSTS"
            )
        if scope["method"] not in _CHANGING:
            return
        same = told.site in _SAME if told.site is not None else told.origin is None or _same_origin(told.origin, host)
        if not same and (told.origin or b"").decode("latin-1") not in self._origins:
            raise CrossSite(
                "a page of another site sent this: nothing is changed from there, unless PALIMPSEST_ORIGINS names it"
            )


def _told(scope: Scope) -> _Told:
    host = origin = site = None
    body: int | None = 0
    for name, value in scope["headers"]:
        if name == b"host":
            host = value
        elif name == b"origin":
            origin = value if origin is None else _CONTRADICTORY
        elif name == b"sec-fetch-site":
            site = value if site is None else _CONTRADICTORY
        elif name == b"content-length":
            body = int(value) if value.isdigit() else None
        elif name == b"transfer-encoding":
            body = None
    return _Told(host, origin, site, body)


def _same_origin(origin: bytes, host: str | None) -> bool:
    scheme, _, own = origin.decode("latin-1").lower().partition("://")
    port = DEFAULT_PORT.get(scheme)
    return port is not None and host is not None and own.removesuffix(port) == host.lower().removesuffix(port)


def _is_address(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.strip("[]")))
    return False


async def _small_body(receive: Receive, size: int) -> Receive:
    """Reads the body, which so takes neither memory nor time beyond its bounds, whatever a route does with it.

    size: as promised. (Starlette's RequestBodyLimitMiddleware knows no time, and answers in text/plain.)
    """
    pieces: list[bytes] = []
    more = True
    try:
        async with asyncio.timeout(SMALL_BODY_SECONDS):
            while more:
                if max(size, sum(map(len, pieces))) > SMALL_BODY:
                    raise RequestTooLarge(f"this takes a body of {SMALL_BODY >> 10} KiB at most")
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                pieces.append(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        raise BodyTimeout(f"the request's body did not arrive within {SMALL_BODY_SECONDS:g} s") from None
    read: list[Message] = [{"type": "http.request", "body": b"".join(pieces), "more_body": False}]

    async def again() -> Message:
        return read.pop() if read else await receive()

    return again


def _template(routed: Scope) -> str:
    """Of the route that answered; empty where none did."""
    return str(getattr(routed.get("route"), "path", ""))


def _completed(headers: Iterable[tuple[bytes, bytes]], status: int) -> list[tuple[bytes, bytes]]:
    completed = list(headers)
    names = {name.lower() for name, _ in completed}
    completed += [header for header in HEADERS if header[0] not in names]
    if status in (429, 503) and b"retry-after" not in names:
        completed.append((b"retry-after", RETRY_AFTER))
    return completed


def reply(path: str, error: PalimpsestError) -> Response:
    """Puts the error into the shape of the API that the path belongs to."""
    record.fails(error.code)
    if path == openai_errors.PATH:
        return openai_errors.reply(error)
    if path.startswith("/endpoints/"):
        response = sagemaker.reply(error)
        response.status_code = error.status
        return response
    return JSONResponse(error.body(), error.status, error.headers())
