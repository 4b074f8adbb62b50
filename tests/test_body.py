"""A body on its way in: received in pieces, within bounds, and given to a worker only when it is whole."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fakes import FakeTorchServe, application, make_store, refused
from fastapi import Request
from starlette.requests import ClientDisconnect

from serve.errors import BadRequest, BodyTimeout, QueueFull, RequestTooLarge
from serve.gateway import body as body_module
from serve.gateway.body import Bodies

pytestmark = pytest.mark.anyio


class Client:
    """The client's side of a request: what `send` is given arrives; `end` completes the body."""

    def __init__(self, **headers: str) -> None:
        self._messages: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        scope = {"type": "http", "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]}
        self.request = Request(scope, self._messages.get)

    def send(self, piece: bytes) -> None:
        self._messages.put_nowait({"type": "http.request", "body": piece, "more_body": True})

    def end(self) -> None:
        self._messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})


def bodies(mib: int = 64, wait: float = 0.0) -> Bodies:
    return Bodies(mib * 2**20, 8, wait)


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_body_is_what_was_sent_and_nobody_changes_it() -> None:
    for headers in ({}, {"content_length": "6"}):
        client = Client(**headers)
        for piece in (b"one", b"", b"two"):
            client.send(piece)
        client.end()
        all_bodies = bodies()
        with await all_bodies.receive(client.request) as body:
            assert body.read() == b"onetwo"
            assert all_bodies.used > 0
            with pytest.raises(PermissionError):
                body.write(b"more")
        assert all_bodies.used == 0


async def test_a_body_is_refused_as_soon_as_it_is_too_large() -> None:
    with pytest.raises(RequestTooLarge, match="8 MiB"):
        await bodies().receive(Client(content_length=str(8 * 2**20 + 1)).request)
    client, all_bodies = Client(), bodies()
    for _ in range(17):  # and no end: nobody waits for it
        client.send(bytes(2**19))
    with pytest.raises(RequestTooLarge, match="8 MiB"):
        await all_bodies.receive(client.request)
    assert all_bodies.used == 0


@pytest.mark.parametrize("limit", ["TIME_LIMIT", "SILENCE"])
async def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(body_module, limit, 0.0)
    all_bodies = bodies()
    with pytest.raises(BodyTimeout):
        await all_bodies.receive(Client().request)
    assert all_bodies.used == 0


@pytest.mark.parametrize("sent", [b"short", b"too long"])
async def test_a_body_of_another_length_than_promised_is_refused(sent: bytes) -> None:
    client, all_bodies = Client(content_length="6"), bodies()
    client.send(sent)
    client.end()
    with pytest.raises(BadRequest, match=f"after {len(sent)} of 6 bytes"):
        await all_bodies.receive(client.request)
    assert all_bodies.used == 0


async def test_a_client_that_leaves_gives_its_place_back() -> None:
    client, all_bodies = Client(content_length="600"), bodies()
    client.send(b"some")
    client.leave()
    with pytest.raises(ClientDisconnect):
        await all_bodies.receive(client.request)
    assert all_bodies.used == 0


async def test_large_bodies_wait_for_room_in_turn_and_small_ones_pass_by() -> None:
    all_bodies = bodies(mib=16, wait=60)  # 2 of them for small ones
    large = {"content_length": str(6 * 2**20)}
    clients = [Client(**large) for _ in range(4)]
    waiting = [asyncio.create_task(all_bodies.receive(client.request)) for client in clients]
    await turns()
    for client in clients:
        for _ in range(6):
            client.send(bytes(2**20))
        client.end()
    await turns()
    assert [task.done() for task in waiting] == [True, True, False, False]
    small = Client(content_length="5")
    small.send(b"click")
    small.end()
    with await all_bodies.receive(small.request) as body:
        assert body.size == 5
    waiting[2].cancel()
    await turns()
    waiting[0].result().close()
    await turns()
    assert waiting[3].done()
    for task in (waiting[1], waiting[3]):
        task.result().close()
    assert all_bodies.used == 0


async def test_where_there_is_no_room_in_time_the_client_is_told_to_come_back() -> None:
    all_bodies = bodies(mib=8)
    whole = Client(content_length=str(7 * 2**20))
    for _ in range(7):
        whole.send(bytes(2**20))
    whole.end()
    with await all_bodies.receive(whole.request):
        for headers in ({"content_length": str(2 * 2**20)}, {}):
            client = Client(**headers)
            client.send(bytes(2 * 2**20))
            with pytest.raises(QueueFull) as caught:
                await all_bodies.receive(client.request)
            assert caught.value.retry_after > 0
    assert all_bodies.used == 0


async def test_a_body_of_unknown_length_gives_back_what_it_did_not_need() -> None:
    all_bodies = bodies(mib=32, wait=60)
    client = Client()
    for _ in range(3):
        client.send(bytes(2**20))
    client.end()
    with await all_bodies.receive(client.request) as body:
        assert body.size == 3 * 2**20
        assert all_bodies.used <= 4 * 2**20
    assert all_bodies.used == 0


@pytest.fixture
async def gateway(fake: FakeTorchServe, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = application(fake, make_store(tmp_path, "sam"))
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        yield client


async def test_a_client_that_sends_slowly_keeps_no_model_busy(gateway: httpx.AsyncClient) -> None:
    assert (await gateway.post("/predictions/sam")).status_code == 200  # loaded
    go_on = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"first"
        await go_on.wait()
        yield b"last"

    slow = asyncio.create_task(gateway.post("/predictions/sam", content=slowly()))
    await turns()
    # A worker serves one request at a time: had the slow one got it, this one would wait for its end.
    async with asyncio.timeout(10):
        assert (await gateway.post("/predictions/sam", content=b"quick")).status_code == 200
    assert not slow.done()
    go_on.set()
    assert (await slow).status_code == 200


@pytest.mark.slow
async def test_a_request_that_reached_nobody_is_sent_again_with_all_of_its_body(
    gateway: httpx.AsyncClient, fake: FakeTorchServe
) -> None:
    await gateway.post("/predictions/sam")
    bodies: list[bytes] = []

    def once_refused(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        if len(bodies) == 1:
            raise refused()
        return httpx.Response(200, content=b"png")

    fake.replies["POST /predictions/p.sam"] = once_refused

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b"one ", b"two ", b"three"):
            yield piece

    assert (await gateway.post("/predictions/sam", content=pieces())).status_code == 200
    assert bodies == [b"one two three"] * 2
