"""A server inside another process: several side by side, drained and stopped by whoever holds them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import pytest
from fakes import FakeDevice, FakeHost, FakeTorchServe, make_store
from zoo import write_archive

from serve import startup
from serve.embedded import Embedded
from serve.preflight import Unusable
from serve.settings import Settings


class Host(FakeHost):
    def __init__(self, *_: object) -> None:
        super().__init__(FakeTorchServe())

    def end(self) -> None:
        """What the event loop did not come to: nothing here."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "Supervisor", Host)
    monkeypatch.setattr(startup, "device_here", FakeDevice)


def settings(folder: Path, **options: Any) -> Settings:
    make_store(folder / "store", *({"sam", "lama", "sd"} - {each.name for each in folder.glob("store/*")}))
    return Settings(store=folder / "store", state=folder / "state", cache=folder / "cache", models="full", **options)


@asynccontextmanager
async def client_of(server: Embedded) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(cast(Any, server))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        yield client


def test_it_answers_between_start_and_stop(tmp_path: Path, fake: None) -> None:
    async def run() -> None:
        server = Embedded(settings(tmp_path))
        async with client_of(server) as client:
            assert (await client.get("/ping")).status_code == 503
            await server.start()
            assert (await client.post("/predictions/sam")).status_code == 200
            await server.stop()
            await server.stop()
            refused = await client.post("/predictions/sam")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "unavailable"
            assert "try again" in refused.json()["error"]["message"]

    asyncio.run(run())


def test_draining_waits_for_what_runs_and_takes_nothing_new(tmp_path: Path, fake: None) -> None:
    async def run() -> None:
        server, arrives = Embedded(settings(tmp_path)), asyncio.Event()

        async def body() -> AsyncIterator[bytes]:
            yield b"x"
            started.set()
            await arrives.wait()

        started = asyncio.Event()
        async with client_of(server) as client:
            await server.start()
            running = asyncio.create_task(client.post("/predictions/sam", content=body()))
            await started.wait()
            assert not await server.drain(0.01)
            draining = asyncio.create_task(server.drain(30))
            await asyncio.sleep(0)
            assert (await client.get("/ping")).status_code == 503
            arrives.set()
            assert (await running).status_code == 200
            assert await draining
            await server.stop()

    asyncio.run(run())


def test_a_setting_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path, fake: None) -> None:
    server = Embedded(settings(tmp_path, memory_budget="none"))
    with pytest.raises(Unusable, match="PALIMPSEST_MEMORY_BUDGET"):
        asyncio.run(server.start())
    asyncio.run(server.stop())


@pytest.mark.torchserve
def test_two_beside_each_other_share_a_store_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    write_archive(tmp_path / "store", "echo")

    async def run() -> None:
        before = set(psutil.Process().children(recursive=True))
        both = [Embedded(settings(tmp_path).model_copy(update={"state": tmp_path / name})) for name in ("a", "b")]
        await asyncio.gather(*(server.start() for server in both))
        async with client_of(both[0]) as first, client_of(both[1]) as second:
            clients = first, second
            answers = await asyncio.gather(*(each.post("/predictions/echo", content=b"hello") for each in clients))
            assert [answer.content for answer in answers] == [b"hello"] * 2
            assert [(await each.get("/v1/state")).json()["ready"] for each in clients] == [["echo"]] * 2
            await both[0].stop()
            assert (await second.post("/predictions/echo", content=b"still")).content == b"still"
            await both[1].stop()
        assert set(psutil.Process().children(recursive=True)) == before
        assert not list((tmp_path / "tmp").iterdir())

    asyncio.run(run())
