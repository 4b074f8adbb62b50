"""A body on its way through: read in pieces, passed on before it is complete, and given to the worker only then."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fakes import FakeTorchServe, application, make_store, refused
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.prediction import Prediction
from serve.engine.torchserve import Answer
from serve.errors import BodyTimeout, EngineUnavailable, NotReached, RequestTooLarge
from serve.gateway import body as body_module
from serve.gateway.body import Body

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


async def test_a_body_can_be_iterated_again() -> None:
    client = Client()
    body = Body(client.request, 1)
    client.send(b"one")
    pieces = aiter(body)
    assert await anext(pieces) == b"one"
    client.send(b"two")
    client.end()
    assert [piece async for piece in body] == [b"one", b"two"]
    assert await body.read() == b"onetwo"


async def test_a_body_is_refused_as_soon_as_it_is_too_large() -> None:
    with pytest.raises(RequestTooLarge, match="1 MiB"):
        Body(Client(content_length=str(2**20 + 1)).request, 1)
    client = Client()
    for _ in range(3):  # and no end: nobody waits for it
        client.send(bytes(2**19))
    with pytest.raises(RequestTooLarge, match="1 MiB"):
        await Body(client.request, 1).read()


async def test_a_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "TIME_LIMIT", 0.0)
    with pytest.raises(BodyTimeout):
        await Body(Client().request, 1).read()


class Engine:
    """What a prediction sends to; `arrived` is what is there of the body."""

    def __init__(self, error: Exception | None = None) -> None:
        self.arrived: list[bytes] = []
        self.error, self.model = error, ""

    async def send(self, model: str, body: AsyncIterator[bytes]) -> Answer:
        self.model = model
        async for piece in body:
            if self.error:
                raise self.error
            self.arrived.append(piece)
        return Answer(200, {}, b"".join(self.arrived))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_all_but_the_last_piece_goes_on_at_once() -> None:
    engine = Engine()
    prediction = Prediction(engine.send)
    prediction.begin("sam")
    for count, piece in enumerate((b"a", b"b", b"c")):
        prediction.feed(piece)
        await turns()
        assert engine.arrived == [b"a", b"b", b"c"][:count]
    assert (await prediction.finish("sam")).body == b"abc"
    assert engine.model == "sam"


@given(st.lists(st.tuples(st.booleans(), st.booleans())), st.booleans())
async def test_it_ends_however_slowly_the_engine_takes_it(steps: list[tuple[bool, bool]], early: bool) -> None:
    """steps: in which order a piece comes in and the engine takes one; the end may come while it holds any."""
    taken = asyncio.Semaphore(0)

    async def send(model: str, body: AsyncIterator[bytes]) -> Answer:
        arrived = []
        async for piece in body:
            arrived.append(piece)
            await taken.acquire()
        return Answer(200, {}, b"".join(arrived))

    prediction = Prediction(send)
    if early:
        prediction.begin("sam")
    sent = []
    for index, (comes, goes) in enumerate(steps):
        if comes:
            sent.append(b"%d," % index)
            prediction.feed(sent[-1])
        if goes:
            taken.release()
        await turns()
    answer = prediction.finish("sam")
    for _ in (*sent, "the end"):
        taken.release()
        await turns()
    assert answer.done()
    assert answer.result().body == b"".join(sent)


async def test_what_was_not_begun_is_sent_at_the_end() -> None:
    engine = Engine()
    prediction = Prediction(engine.send)
    prediction.feed(b"a")
    prediction.feed(b"b")
    await turns()
    assert engine.arrived == []
    assert (await prediction.finish("other")).body == b"ab"
    assert engine.model == "other"


async def test_a_connection_that_breaks_before_the_end_has_reached_no_worker() -> None:
    for early, error in ((True, NotReached), (False, EngineUnavailable)):
        engine = Engine(EngineUnavailable("broken"))
        prediction = Prediction(engine.send)
        if early:
            prediction.begin("sam")
        prediction.feed(b"a")
        prediction.feed(b"b")
        await turns()
        with pytest.raises(error) as caught:
            await prediction.finish("sam")
        assert type(caught.value) is error


async def test_closing_ends_what_is_under_way() -> None:
    cancelled = asyncio.Event()

    async def send(model: str, body: AsyncIterator[bytes]) -> Answer:
        try:
            async for _ in body:
                continue
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return Answer(200, {}, b"")

    prediction = Prediction(send)
    prediction.begin("sam")
    await turns()
    prediction.close()
    await turns()
    assert cancelled.is_set()


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
