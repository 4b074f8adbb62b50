"""Long requests of the editing API: what is told of their progress, and how they end early."""

import asyncio
import base64
import json
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeTorchServe, application, make_store
from fastapi import Request

from contract.progress import SIZE
from contract.ticket import File
from handlers.requests.jobs import attach
from serve.engine.answer import Answer
from serve.engine.question import Question
from serve.gateway.access.fairuse import SHARE, Share
from serve.gateway.edit import routes
from serve.gateway.edit.jobs import Cancelled
from serve.gateway.edit.replies import HandlerError
from serve.memory_file import MemoryFile

pytestmark = pytest.mark.anyio

Reply = tuple[int, dict[str, Any]]
FIELDS = {"image": "aGVsbG8=", "mask": "bWFzaw==", "prompt": "x"}
EVENTS = {"accept": "text/event-stream"}
CANCELLED = {"error": {"code": "cancelled", "message": "the job was cancelled"}}


class World:
    """A client and the application's services; `work` is what the model does with a job: status and JSON."""

    def __init__(self, client: httpx.AsyncClient, services: Any) -> None:
        self.client, self.services = client, services
        self.work: Callable[[File], Awaitable[Reply]]
        services.host.engine.answer = self._answer

    async def _answer(self, name: str, question: Question, reply: MemoryFile, job: File) -> Answer:
        status, told = await self.work(job)
        reply.write(json.dumps(told).encode())
        return Answer(status, {}, reply)

    def tell(self, job: File, step: int, steps: int) -> None:
        """As the worker does."""
        with open(job.path, "r+b") as file:
            file.write(struct.pack("<II", step, steps))

    async def until_told_to_stop(self, job: File) -> Reply:
        descriptor = job.open()
        while struct.unpack("<III", os.pread(descriptor, 12, 0))[2] == 0:
            await asyncio.sleep(0.01)
        os.close(descriptor)
        return 499, CANCELLED

    async def until_free(self) -> None:
        model = next(m for m in self.services.scheduler.models() if m.archive.name == "sd")
        while model.leases:
            await asyncio.sleep(0.01)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    app = application(FakeTorchServe(), make_store(tmp_path, "sam", "sd", ours=True))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield World(client, app.state.services)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in filter(None, text.split("\n\n")):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_events_tell_the_steps_and_end_with_the_reply(world: World) -> None:
    seen: list[str] = []

    async def work(job: File) -> Reply:
        seen.extend(world.services.jobs._jobs)
        for step in (1, 2):
            world.tell(job, step, 3)
            await asyncio.sleep(0.25)  # two looks at the progress
        world.tell(job, 3, 3)  # and none
        return 200, {"generated_image": "b3V0", "warnings": []}

    world.work = work
    answer = await world.client.post("/v1/replace", json=FIELDS, headers=EVENTS)
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    assert told[0] == ("job", {"job": seen[0]})
    steps = [(data["step"], data["steps"]) for name, data in told if name == "progress" and data["phase"] == "running"]
    assert steps[-3:] == [(1, 3), (2, 3), (3, 3)]
    name, reply = told[-1]
    assert (name, reply["picture"], reply["warnings"]) == ("done", "b3V0", [])
    assert 500 < reply["timings"]["engine"] < 1e5


async def test_drafts_are_in_the_stream_each_once(world: World) -> None:
    async def work(job: File) -> Reply:
        descriptor = job.open(writable=True)
        worker = attach(descriptor)
        os.close(descriptor)
        for picture in (b"one", b"two"):
            worker.show(1, (10, 20, 266, 276), picture)
            await asyncio.sleep(0.25)  # two looks
        return 200, {"generated_image": "b3V0", "warnings": []}

    world.work = work
    told = events((await world.client.post("/v1/replace", json=FIELDS, headers=EVENTS)).text)
    shown = [data for name, data in told if name == "preview"]
    assert [base64.b64decode(data.pop("picture")) for data in shown] == [b"one", b"two"]
    assert shown == [{"variant": 1, "box": [10, 20, 266, 276]}] * 2
    assert told[-1][0] == "done"


@pytest.mark.parametrize(
    ("accept", "previews"), [("application/json", True), ("image/png", True), (EVENTS["accept"], False)]
)
async def test_who_asks_for_no_drafts_has_none_made(world: World, accept: str, previews: bool) -> None:
    sizes = []

    async def work(job: File) -> Reply:
        sizes.append(os.stat(job.path).st_size)
        return 200, {"generated_image": "b3V0", "warnings": []}

    world.work = work
    fields = FIELDS | {"previews": previews}
    assert (await world.client.post("/v1/replace", json=fields, headers={"accept": accept})).status_code == 200
    assert sizes == [SIZE]


async def test_a_model_that_loads_is_said_to(world: World) -> None:
    # httpx's ASGI transport hands over the whole stream at its end: the load must end by itself, after three looks.
    world.services.host.engine.register = lambda name, path: asyncio.sleep(0.3)

    async def work(job: File) -> Reply:
        return 200, {"generated_image": "b3V0"}

    world.work = work
    told = events((await world.client.post("/v1/replace", json=FIELDS, headers=EVENTS)).text)
    assert ("progress", {"phase": "loading", "model": "sd", "step": 0, "steps": 0}) in told


async def test_an_error_ends_the_stream(world: World) -> None:
    async def work(job: File) -> Reply:
        return 507, {"error": {"code": "out_of_memory", "message": "no"}}

    world.work = work
    told = events((await world.client.post("/v1/replace", json=FIELDS, headers=EVENTS)).text)
    assert told[-1] == ("error", {"error": {"code": "out_of_memory", "message": "no"}, "status": 507})


async def test_a_job_is_stopped_by_its_id(world: World) -> None:
    began = asyncio.Event()

    async def work(job: File) -> Reply:
        began.set()
        return await world.until_told_to_stop(job)

    world.work = work
    request = asyncio.create_task(world.client.post("/v1/replace", json=FIELDS, headers=EVENTS))
    await began.wait()
    (job,) = world.services.jobs._jobs
    assert (await world.client.delete(f"/v1/jobs/{job}")).status_code == 202
    assert events((await request).text)[-1][0] == "cancelled"
    await world.until_free()
    assert (await world.client.delete(f"/v1/jobs/{job}")).status_code == 404


async def test_a_client_that_leaves_stops_its_job_which_keeps_its_lease_until_then(world: World) -> None:
    began, may_stop = asyncio.Event(), asyncio.Event()

    async def work(job: File) -> Reply:
        began.set()
        answer = await world.until_told_to_stop(job)
        await may_stop.wait()
        return answer

    world.work = work
    with world.services.fair_use.request("somebody") as share:
        leaving = request_of_a_client_that_leaves(began, share)
        request = asyncio.create_task(routes.replace(leaving, world.services))
        await began.wait()
        model = next(m for m in world.services.scheduler.models() if m.archive.name == "sd")
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert model.leases == 1
        may_stop.set()
        with pytest.raises(HandlerError) as caught:
            await request
    assert caught.value.code == Cancelled.code
    assert model.leases == 0


def request_of_a_client_that_leaves(when: asyncio.Event, share: Share) -> Request:
    messages = [{"type": "http.request", "body": json.dumps(FIELDS).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await when.wait()
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"application/json")]
    return Request({"type": "http", "method": "POST", "headers": headers, SHARE: share}, receive)


@pytest.mark.slow
async def test_a_job_that_waits_is_stopped_at_once(world: World) -> None:
    world.services.host.engine.register = lambda name, path: asyncio.Event().wait()  # a load that never ends
    request = asyncio.create_task(world.client.post("/v1/replace", json=FIELDS, headers=EVENTS))
    while not world.services.jobs._jobs:
        await asyncio.sleep(0.01)
    (job,) = world.services.jobs._jobs
    await world.client.delete(f"/v1/jobs/{job}")
    assert events((await request).text)[-1][0] == "cancelled"
    assert not any(m.waiters for m in world.services.scheduler.models())


async def test_a_pointers_newer_request_ends_the_older_one_that_waits_and_no_other(world: World) -> None:
    gate = asyncio.Event()

    async def work(job: File) -> Reply:
        await gate.wait()
        return 200, {"generated_image": "b3V0", "warnings": []}

    world.work = work
    elsewhere = httpx.ASGITransport(world.client._transport.app, client=("192.0.2.7", 1))  # type: ignore[attr-defined]
    other = httpx.AsyncClient(transport=elsewhere, base_url="http://x")
    sent: list[asyncio.Task[httpx.Response]] = []

    async def send(client: httpx.AsyncClient, waiting: int, **fields: Any) -> asyncio.Task[httpx.Response]:
        click = {"image": "aGVsbG8=", "points": [[1, 2]]}
        sent.append(asyncio.create_task(client.post("/v1/segment", json=click | fields)))
        while not any(m.leases and len(m.waiters) == waiting for m in world.services.scheduler.models()):
            await asyncio.sleep(0.001)
        return sent[-1]

    running = await send(world.client, 0, hover="a")
    older = await send(world.client, 1, hover="a")
    stay = [await send(other, 2, hover="a"), await send(world.client, 3, hover="b"), await send(world.client, 4)]
    box = {"image": "eA==", "box": [1, 2, 3, 4], "hover": "a"}
    newer = asyncio.create_task(world.client.post("/v1/segment", json=box))
    answer = await older  # while all others still wait
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "superseded")
    assert not any(each.done() for each in (running, newer, *stay))
    gate.set()
    assert [(await each).status_code for each in (running, newer, *stay)] == [200] * 5
    await other.aclose()
    metrics = (await world.client.get("/metrics")).text
    assert 'palimpsest_invocations_total{model="sam"} 6.0' in metrics
    assert [line for line in metrics.splitlines() if "xx_errors_total{" in line] == []
    assert world.services.jobs._newest == {}


async def test_a_stream_tells_that_its_job_was_superseded(world: World) -> None:
    world.services.host.engine.register = lambda name, path: asyncio.Event().wait()  # a load that never ends
    click = {"image": "aGVsbG8=", "points": [[1, 2]], "hover": "a"}
    first = asyncio.create_task(world.client.post("/v1/segment", json=click, headers=EVENTS))
    while not world.services.jobs._jobs:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(world.client.post("/v1/segment", json=click, headers=EVENTS))
    name, data = events((await first).text)[-1]
    assert (name, data["error"]["code"]) == ("error", "superseded")
    (job,) = world.services.jobs._jobs
    await world.client.delete(f"/v1/jobs/{job}")
    assert events((await second).text)[-1][0] == "cancelled"
