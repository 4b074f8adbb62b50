"""A TorchServe that is a function, and what else stands in for the engine in tests without one."""

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import httpx
from fastapi import FastAPI
from fastapi.testclient import TestClient

from contract.commands import VERSION
from serve.engine.torchserve import Endpoint, TorchServe
from serve.gateway.app import create_app
from serve.residency.memory import Memory
from serve.settings import Settings
from serve.store.catalog import Catalog

OWN_ERROR = {"code": 503, "type": "ServiceUnavailableException", "message": "no worker"}
# As TorchServe 0.12 reports that a handler raised, and that its worker is gone.
RAISED = {"code": 503, "type": "InternalServerException", "message": "Prediction failed"}
DIED = {"code": 507, "type": "InternalServerException", "message": "Worker died."}
ENDPOINT = Endpoint("http://inference", "http://management", "key-i", "key-m")
PICTURE = httpx.Response(200, content=b"png", headers={"content-type": "image/png", "x-palimpsest-seed": "7"})


class FakeTorchServe:
    """Records every request; `replies` overrides the answer by "METHOD /path": a response, an error, or a function."""

    def __init__(self) -> None:
        self.calls: list[httpx.Request] = []
        self.replies: dict[str, httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.calls.append(request)
        default = PICTURE if request.url.path.startswith("/predictions/") else httpx.Response(200, json={})
        if request.method == "DELETE":
            default = httpx.Response(404, json={})
        reply = self.replies.get(_without_version(request), default)
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, httpx.Response) else reply(request)

    def paths(self) -> list[str]:
        """Of every call: "METHOD /path", the model's name without its version."""
        return [_without_version(call) for call in self.calls]


class FakeSession:
    """The part of aiohttp.ClientSession that TorchServe uses, answered by a function."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        self._answer = answer

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        *,
        params: Any,
        data: AsyncIterator[bytes] | None,
        headers: dict[str, str],
        timeout: Any,
    ) -> AsyncIterator[Any]:
        sent = b"".join([piece async for piece in data]) if data else None
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]  # as aiohttp does
        reply = self._answer(httpx.Request(method, url, params=params, content=sent, headers=encoded))

        async def read() -> bytes:
            return reply.content

        async def iter_chunked(size: int) -> AsyncIterator[bytes]:
            for start in range(0, len(reply.content), size):
                yield reply.content[start : start + size]

        content = SimpleNamespace(iter_chunked=iter_chunked)
        yield SimpleNamespace(status=reply.status_code, headers=reply.headers, read=read, content=content)

    async def close(self) -> None:
        pass


class FakeHost:
    """The supervisor's stand-in."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        self.engine = TorchServe(ENDPOINT, 5, cast(aiohttp.ClientSession, FakeSession(answer)))
        self.warm = SimpleNamespace(
            slow_starts=0,
            zygote_restarts=0,
            standby=False,
            standby_is_ready=False,
            standby_starts=0,
            on_standby=lambda: None,
            prepare_standby=lambda: None,
            dismiss_standby=lambda: None,
        )

    async def start(self, on_lost: Callable[[], None], on_ready: Callable[[], None]) -> None:
        self.on_lost, self.on_ready = on_lost, on_ready

    async def stop(self) -> None:
        await self.engine.close()

    def worker_pid(self, archive: Path) -> int | None:
        return None

    def take_end(self, archive: Path) -> str:
        """A load that fails here fails by itself."""
        return "ended"


class FakeDevice:
    """A device with a terabyte."""

    name, gpu, total, frees_late, overhead, parked_worker = "fake", None, 2**40, False, 600 << 20, 0
    suspends, standby_worker = False, 0

    def free(self) -> int:
        return self.total

    def used_by(self, pid: int) -> int | None:
        return None


def _without_version(request: httpx.Request) -> str:
    return f"{request.method} " + re.sub(r"\.[0-9a-f]{12}$", "", request.url.path)


def refused() -> aiohttp.ClientConnectorError:
    """Nobody listens where TorchServe should."""
    key = cast(Any, SimpleNamespace(host="127.0.0.1", port=1, ssl=None))
    return aiohttp.ClientConnectorError(key, OSError("refused"))


def make_store(folder: Path, *names: str, memory_mib: int = 0, ours: bool = False) -> Path:
    """A store whose archives are only named, never loaded. memory_mib: what each says it takes. ours: whether their
    handlers take commands, and so tickets.
    """
    for name in names:
        (folder / name / "MAR-INF").mkdir(parents=True)
        (folder / name / "MAR-INF" / "MANIFEST.json").write_text("{}")
        if memory_mib or ours:
            config = f"handler: {{memory_mib: {memory_mib}, commands: {VERSION if ours else 0}}}"
            (folder / name / "model-config.yaml").write_text(config)
    return folder


def application(
    fake: FakeTorchServe,
    store: Path,
    budget: int = 2**40,
    host_budget: int = 0,
    demo: bool = False,
    **settings: Any,
) -> FastAPI:
    """The gateway in front of the function. settings: fields of Settings."""
    memory = Memory(FakeDevice(), budget, store / ".footprints.json", host_budget)
    return create_app(
        Settings(store=store, state=store / ".state", **settings),
        Catalog(store, store / ".cache", demo),
        FakeHost(fake),
        memory,
    )


@contextmanager
def gateway(fake: FakeTorchServe, store: Path, **options: Any) -> Iterator[TestClient]:
    """A client of the running application. options: application's."""
    with TestClient(application(fake, store, **options), raise_server_exceptions=False) as client:
        yield client
