"""Both clients of the distribution in tests, and what they talk to in place of a network."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import anyio
import anyio.to_thread
import httpx
from anyio.from_thread import start_blocking_portal
from fastapi.testclient import TestClient
from palimpsest import AsyncClient, Client

URL = "http://127.0.0.1:8080"
KINDS = ["waiting", "awaiting"]


class Through(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """The running application. calls: all that was asked, as method, path and the body's bytes."""

    def __init__(self, application: TestClient) -> None:
        self._application = application
        self.calls: list[tuple[str, str, int]] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._answer(request, request.read())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        return await anyio.to_thread.run_sync(self._answer, request, body)

    def _answer(self, request: httpx.Request, body: bytes) -> httpx.Response:
        self.calls.append((request.method, request.url.path, len(body)))
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        path = request.url.raw_path.decode()
        answer = self._application.request(request.method, path, content=body, headers=headers)
        kept = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
        return httpx.Response(answer.status_code, headers=kept, content=answer.content)


class _Waited:
    """An AsyncClient or what it returns, called without `await`."""

    def __init__(self, portal: Any, inner: Any) -> None:
        self._portal, self._inner = portal, inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            plain = [each._inner if isinstance(each, _Waited) else each for each in arguments]
            named = {key: each._inner if isinstance(each, _Waited) else each for key, each in named.items()}

            async def awaited() -> Any:
                return await value(*plain, **named)

            result = self._portal.call(awaited)
            return _Waited(self._portal, result) if hasattr(result, "save") else result

        return call


@contextmanager
def connecting(kind: str) -> Iterator[Callable[..., Any]]:
    """Makes clients of the kind whose calls all wait. options: those of Client."""
    with ExitStack() as ends:
        if kind == "waiting":
            yield lambda url=URL, **options: ends.enter_context(Client(url, **options))
            return
        portal = ends.enter_context(start_blocking_portal())

        def connect(url: str = URL, **options: Any) -> Any:
            client = portal.call(lambda: AsyncClient(url, **options))
            ends.callback(lambda: portal.call(client.aclose))
            return _Waited(portal, client)

        yield connect


def events(*told: tuple[str, Any]) -> httpx.Response:
    """A stream of server-sent events."""
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in told)
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})
