"""What stands before Ray's proxies: tells the router what a request is for, and says in our words what Ray would.

Ray imports `middlewares` into each proxy (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH), and hands what is in TARGET on to
the router (RAY_SERVE_SESSION_ID_HEADER_KEY); serve/cluster/node.py sets both.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.cluster.target import target_of
from serve.errors import EngineUnavailable
from serve.gateway.door import HEADERS, reply
from serve.logs import record

TARGET = b"x-palimpsest-target"
RAYS_OWN = "/-/"  # the beginning of what Ray's proxies answer themselves: /-/healthz, for who balances their load
_ID = record.HEADER.encode()
_MARK = HEADERS[0][0]  # in every answer of a box
_LOST = "no box answers this: the one that worked on it is gone, or none has started yet; send it again"


def middlewares() -> list[Middleware]:
    return [Middleware(Entrance)]


class Entrance:
    """An ASGI application around Ray's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(RAYS_OWN):
            await self._app(scope, receive, send)
            return
        request_id = record.request_id(scope["headers"]).encode()
        target = str(target_of(scope["path"], scope["headers"])).encode("latin-1", "replace")
        others = [header for header in scope["headers"] if header[0] not in (TARGET, _ID)]
        exchange = _Exchange(scope, receive, send, request_id)
        told = {**scope, "headers": [*others, (TARGET, target), (_ID, request_id)]}
        await self._app(told, receive, exchange.send)
        await exchange.end()


class _Exchange:
    """What a client is sent: a box's answer as it is; in place of one of Ray's, that no box has answered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: bytes) -> None:
        self._scope, self._receive, self._send, self._id = scope, receive, send, request_id
        self._started = self._ended = self._events = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message["headers"]}
            self._started = _MARK in headers
            self._events = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            # The request's id is there twice: the box's, and Ray's.
            others = [header for header in message["headers"] if header[0].lower() != _ID]
            message = {**message, "headers": [*others, (_ID, self._id)]}
        if self._started:
            self._ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await self._send(message)

    async def end(self) -> None:
        """Ray has nothing more to say."""
        answer = reply(self._scope["path"], EngineUnavailable(_LOST))
        if not self._started:
            answer.headers[record.HEADER] = self._id.decode()
            await answer(self._scope, self._receive, self._send)
        elif self._events and not self._ended:
            last = b"event: error\ndata: " + bytes(answer.body) + b"\n\n"
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
