"""Replies on their way out, through a real HTTP server: bounded in memory and time, and never in anybody's way."""

import asyncio
import base64
import hashlib
import json
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import uvicorn
from fakes import FakeTorchServe, application, make_store
from serving import descriptors

from contract.pictures import name_of
from contract.ticket import File, Part, Span, Ticket, Written
from serve import memory_file
from serve.gateway import transfer
from serve.memory_file import MemoryFile

pytestmark = pytest.mark.anyio

MIB = 2**20
SIZE = 70 * MIB  # as base64 93 MiB
# Seconds of computing in one go: 3 ms on a good machine, where parsing and dumping 93 MiB takes 700.
LONGEST = 0.1
PNG = b"\x89PNG\r\n\x1a\n"
WAYS = (
    ("/predictions/sam", "application/json"),
    ("/predictions/sam", "image/png"),
    ("/v1/segment", "image/png"),
    ("/v1/segment", "application/json"),
    ("/v1/segment", "text/event-stream"),
    ("/v1/images", "application/json"),
)
CLICK = {"image": "aGVsbG8=", "points": [[5, 6]]}
TIMINGS = {"decode": 0.012345, "embed": 1.5}


class Worker:
    """Answers tickets as a worker of ours does, with a picture of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, list[bytes]()
        self.contents = list[str]()
        self.asked = asyncio.Event()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.set()
        if "x-palimpsest-command" not in request.headers:
            picture = base64.b64encode(bytes(self.size)).decode()
            return httpx.Response(200, json={"generated_image": picture})
        assert request.headers["x-palimpsest-command"] == "answer"
        ticket = Ticket.from_json(request.content)
        self.contents += [part.content for part in ticket.parts.values()]
        for file in filter(None, [ticket.body, *(part.file for part in ticket.parts.values())]):
            descriptor = file.open()
            self.seen.append(os.pread(descriptor, 100, 0))
            os.close(descriptor)
        reply = ticket.reply.open(writable=True)
        os.truncate(reply, self.size)
        os.close(reply)
        if request.headers.get("accept") == "image/png":
            written = Written("image/png", {"X-Palimpsest-Seed": "7"}, timings=TIMINGS)
            return httpx.Response(200, content=written.to_json())
        fields = {"content_type": "image/png", "warnings": ["gen_args.x is unknown"]}
        picture = Span(0, self.size)
        spans: dict[str, Span | list[Span]] = {"generated_image": picture, "variants": [picture, Span(0, 3)]}
        return httpx.Response(200, content=Written("application/json", {}, fields, spans, TIMINGS).to_json())


@asynccontextmanager
async def served(
    folder: Path, worker: Worker, ours: bool = True, **settings: Any
) -> AsyncIterator[tuple[Any, aiohttp.ClientSession]]:
    """The gateway's services and a client of it, at a port of its own."""
    fake = FakeTorchServe()
    fake.replies["POST /predictions/p.sam"] = worker
    app = application(fake, make_store(folder, "sam", ours=ours), **settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    listener = socket.create_server(("127.0.0.1", 0))
    running = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            yield app.state.services, client
    finally:
        server.should_exit = True
        await running


def memory_files() -> int:
    return open_here()["memfd"]


def open_here() -> Counter[str]:
    """This process's descriptors, once what was closed in another thread is."""
    memory_file._closing.submit(int).result()
    return descriptors()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def longest_gap(work: asyncio.Task[Any]) -> float:
    """The most that this process computed, in seconds, without a turn for others while the work ran.

    Not the time that passed: other processes take as much of it as they like.
    """
    longest, last = 0.0, time.process_time()
    while not work.done():
        await asyncio.sleep(0)
        now = time.process_time()
        longest, last = max(longest, now - last), now
    return longest


async def silent_client(client: aiohttp.ClientSession, path: str, accept: str) -> asyncio.StreamWriter:
    """Sends a request and never reads the reply."""
    assert client._base_url is not None
    _, writer = await asyncio.open_connection("127.0.0.1", client._base_url.port, limit=1024)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    body = json.dumps(CLICK).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return writer


@pytest.mark.slow
async def test_a_large_reply_never_holds_the_event_loop(tmp_path: Path) -> None:
    """Nor does a large upload: what grows with their size is done in pieces, or beside it."""
    before = memory_files()
    async with served(tmp_path, Worker(SIZE)) as (_, client):

        async def ask(path: str, accept: str, **options: Any) -> int:
            async with client.post(path, headers={"accept": accept}, **options) as answer:
                assert answer.status in (200, 201), await answer.text()
                return sum([len(piece) async for piece in answer.content.iter_chunked(MIB)])

        await ask("/v1/segment", "image/png", json=CLICK)  # the model is loaded
        idle = await longest_gap(asyncio.create_task(asyncio.sleep(0.5)))
        for path, accept in (
            ("/v1/segment", "application/json"),
            ("/v1/segment", "text/event-stream"),
            ("/predictions/sam", "application/json"),
        ):
            asked = asyncio.create_task(ask(path, accept, json=CLICK))
            gap = await longest_gap(asked)
            assert await asked > SIZE * 4 / 3
            assert gap < idle + LONGEST, (path, accept)

        async def upload() -> AsyncIterator[bytes]:
            yield b"\x89PNG\r\n\x1a\n"
            for _ in range(100):
                yield bytes(MIB)

        asked = asyncio.create_task(ask("/v1/images", "*/*", data=upload()))
        gap = await longest_gap(asked)
        assert await asked
        assert gap < idle + LONGEST, "an upload"
    assert memory_files() == before


@pytest.mark.slow
async def test_json_and_events_say_what_the_worker_wrote(tmp_path: Path) -> None:
    worker = Worker(300_001)  # no multiple of three, and more than one piece
    picture = base64.b64encode(bytes(300_001)).decode()
    async with served(tmp_path, worker) as (services, client):
        theirs = await (await client.post("/predictions/sam", json=CLICK)).json()
        assert theirs == {
            "generated_image": picture,
            "variants": [picture, "AAAA"],
            "content_type": "image/png",
            "warnings": ["gen_args.x is unknown"],
        }
        answer = await client.post("/v1/segment", json=CLICK)
        own = {"mask": picture, "masks": [picture, "AAAA"], "content_type": "image/png", "warnings": ["x is unknown"]}
        told = await answer.json()
        assert told.pop("timings").keys() == {"queue", "engine", "decode", "embed"}
        assert told == own
        assert int(answer.headers["content-length"]) == len(await answer.read())
        events = await (await client.post("/v1/segment", json=CLICK, headers={"accept": "text/event-stream"})).text()
        name, data = events.strip().rpartition("\n\n")[2].split("\n")
        told = json.loads(data.removeprefix("data: "))
        assert (name, told.pop("timings")["embed"]) == ("event: done", 1500)
        assert told == own
        answer = await client.post("/predictions/sam", data=b"raw", headers={"accept": "image/png"})
        assert await answer.read() == bytes(300_001)
        assert answer.headers["x-palimpsest-seed"] == "7"
        assert answer.headers["server-timing"].endswith(", decode;dur=12.35, embed;dur=1500.0")
        assert worker.seen[-1] == b"raw"
        await until(lambda: services.unread.used == services.bodies.used == 0)


async def test_a_worker_is_told_what_an_upload_is_called(tmp_path: Path) -> None:
    worker = Worker(3)
    async with served(tmp_path, worker) as (_, client):
        picture = PNG + b"the picture"
        name = (await (await client.post("/v1/images", data=picture)).json())["id"]
        assert name == name_of(hashlib.sha256(picture).digest())
        await (await client.post("/v1/segment", json=CLICK | {"image": name})).read()
        form = aiohttp.FormData({"points": "[[5, 6]]"})
        form.add_field("image", picture, filename="a.png")
        await (await client.post("/v1/segment", data=form)).read()
        # What comes with the request is named by whoever reads it.
        assert worker.contents == [name, ""]


@pytest.mark.slow
async def test_clients_that_never_read_hold_no_lease_and_no_more_memory_than_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STALLED", 3.0)
    before = memory_files()
    async with served(tmp_path, Worker(8 * MIB), transit_mib=16, queue_timeout=1.0) as (services, client):
        silent = [
            await silent_client(client, path, accept)
            for path, accept in (
                ("/predictions/sam", "application/json"),
                ("/predictions/sam", "image/png"),
                ("/v1/segment", "application/json"),
                ("/v1/segment", "text/event-stream"),
            )
        ]
        await until(lambda: services.unread.used >= 16 * MIB)
        assert services.unread.used <= (16 + 8) * MIB
        await until(lambda: not any(model.leases for model in services.scheduler.models()))
        assert services.unread.used >= 16 * MIB
        async with client.post("/predictions/sam", json=CLICK) as refused:
            assert refused.status == 429
            assert int(refused.headers["retry-after"]) > 0
        # Who does not read is cut off, and the memory is back.
        await until(lambda: services.unread.used == services.bodies.used == 0)
        async with client.post("/predictions/sam", json=CLICK) as answer:
            assert answer.status == 200
            assert await answer.read()
        for writer in silent:
            writer.transport.abort()
    assert memory_files() == before


async def test_a_body_that_ends_short_gets_no_lease(tmp_path: Path) -> None:
    worker = Worker(10)
    async with served(tmp_path, worker) as (services, client):
        assert client._base_url is not None
        _, writer = await asyncio.open_connection("127.0.0.1", client._base_url.port)
        writer.write(b"POST /predictions/sam HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nshort")
        await until(lambda: services.bodies.used > 0)
        assert not any(model.in_use for model in services.scheduler.models())
        writer.close()
        await until(lambda: services.bodies.used == 0)
        assert not worker.asked.is_set()
        async with client.post("/predictions/sam", json=CLICK) as answer:
            assert answer.status == 200
            assert await answer.read()


async def test_an_event_stream_that_is_closed_gives_everything_back_at_once(tmp_path: Path) -> None:
    before = memory_files()
    async with served(tmp_path, Worker(8 * MIB)) as (services, client):
        for _ in range(5):
            writer = await silent_client(client, "/v1/segment", "text/event-stream")
            await until(lambda: services.unread.used > 0)
            writer.transport.abort()
            await until(lambda: services.unread.used == services.bodies.used == 0)
            assert memory_files() == before


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False], ids=["by tickets", "through java"])
async def test_two_hundred_clients_of_whom_most_leave_take_nothing_along(
    ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(2 * MIB)
    async with served(tmp_path, worker, ours=ours) as (services, client):
        assert client._base_url is not None
        port, tally = client._base_url.port, Counter[str]()
        for name in ("answer", "predict"):
            monkeypatch.setattr(services.host.engine, name, slowly(getattr(services.host.engine, name)))

        async def ask(number: int) -> None:
            path, accept = WAYS[number % len(WAYS)]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
            body = json.dumps({**CLICK, "image": base64.b64encode(PNG + bytes(300_000)).decode()}).encode()
            if path == "/v1/images":
                body = PNG + bytes(400_000)
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            end = ("amid the body", "while it waits", "amid the reply", "in the end")[number // len(WAYS) % 4]
            writer.write(body[: 200_000 if end == "amid the body" else None])
            for _ in range(number % 40):
                await asyncio.sleep(0)
            if end == "amid the reply":
                await reader.readexactly(100)
            elif end == "in the end":
                assert (await reader.read()).startswith(b"HTTP/1.1 2")
            tally[end] += 1
            writer.transport.abort()

        await asyncio.gather(*(ask(3 * len(WAYS) + number) for number in range(len(WAYS))))  # all is loaded and kept
        await until(lambda: idle(services))
        before = open_here()
        for start in range(0, 200, 20):
            await asyncio.gather(*(ask(number) for number in range(start, start + 20)))
        await until(lambda: idle(services))
        await until(lambda: open_here() <= before)
        assert open_here() == before
        assert min(tally.values()) > 40


def idle(services: Any) -> bool:
    """Nobody holds a model, waits for one, or has memory for a body or a reply."""
    busy = any(model.leases or model.waiters for model in services.scheduler.models())
    return not (busy or services.unread.used or services.bodies.used or services.jobs._jobs)


def slowly(ask: Any) -> Any:
    async def slow(*arguments: Any) -> Any:
        await asyncio.sleep(0.005)
        return await ask(*arguments)

    return slow


async def test_a_ticket_means_one_file_only() -> None:
    first = MemoryFile()
    file = first.file
    first.close()
    with MemoryFile() as second:
        assert second.file.path == file.path  # the number is another's by now
        with pytest.raises(FileNotFoundError):
            file.open()
        os.close(second.file.open())


async def test_tickets_survive_json() -> None:
    file = File("/proc/1/fd/2", "n")
    for ticket in (
        Ticket(file),
        Ticket(file, file, file, "a/b", "gzip"),
        Ticket(file, fields={"a": [1]}, parts={"b": Part(file, 1, 2, True)}, keep=True),
    ):
        assert Ticket.from_json(ticket.to_json()) == ticket
    for told in (
        Written("a/b"),
        Written("a/b", {"c": "d"}, {"e": None}, {"f": Span(1, 2), "g": [Span(3, 4), Span(5, 6)]}),
        Written("a/b", end=7, kept={"id": Span(7, 9), "ids": [Span(7, 9), Span(9, 9)]}),
    ):
        assert Written.from_json(told.to_json()) == told
