"""The Python clients by themselves: what they send, how long they wait, and what they make of refusals."""

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import anyio
import httpx
import numpy as np
import palimpsest
import pytest
from conftest import encoded
from connecting import KINDS, connecting, events
from palimpsest import errors, fields, http, known
from palimpsest.events import JobReader
from PIL import Image

import serve
from serve.errors import BadRequest, BodyTimeout, Busy, DiskFull, EngineUnavailable, OutOfMemory, PalimpsestError
from serve.gateway.edit import images
from serve.gateway.edit.fields import EraseFields, ReplaceFields, SegmentFields
from serve.gateway.edit.images import UnknownImage
from serve.gateway.edit.jobs import Cancelled
from serve.settings import Settings

PICTURE = encoded(np.random.default_rng(1).integers(0, 256, (300, 400, 3), np.uint8))  # too large to go inline
MASK = np.zeros((300, 400), bool)
MASK[20:40, 30:60] = True
PATCH = encoded(np.full((20, 30, 3), 7, np.uint8))
JOB = ("job", {"job": "j1"})
RUNNING = ("progress", {"phase": "running", "model": "demo/lama", "step": 1, "steps": 4})
DONE = {
    "picture": base64.b64encode(PATCH).decode(),
    "content_type": "image/png",
    "box": [30, 20, 60, 40],
    "id": "img_result",
    "warnings": ["a warning"],
    "timings": {"engine": 3.5},
}


class FakeServer:
    """Answers /v1 by a function, and records what came; `answers` are given first, in their order."""

    def __init__(self) -> None:
        self.calls: list[httpx.Request] = []
        self.answers: list[httpx.Response | Exception] = []
        self.forgets = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.calls.append(request)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        if request.url.path == "/v1/images":
            return httpx.Response(201, json={"id": f"img_{len(self.calls)}", "bytes": 1, "expires_in": 3600})
        if request.method == "DELETE":
            return httpx.Response(202, json={})
        return events(JOB, RUNNING, ("done", DONE))

    def asked(self) -> list[str]:
        return [f"{call.method} {call.url.path}" for call in self.calls]

    def said(self, index: int = -1) -> dict[str, bytes]:
        """The parts of a request, by name."""
        boundary = self.calls[index].headers["content-type"].partition("boundary=")[2].encode()
        parts = self.calls[index].content.split(b"--" + boundary)[1:-1]
        split = [part.removesuffix(b"\r\n").partition(b"\r\n\r\n") for part in parts]
        return {head.split(b'name="')[1].split(b'"')[0].decode(): body for head, _, body in split}


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    with connecting(request.param) as make:
        yield make


@pytest.fixture
def client(connect: Callable[..., Any], server: FakeServer) -> Any:
    return connect(transport=httpx.MockTransport(server))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    waited: list[float] = []

    async def wait(client: palimpsest.AsyncClient, seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(palimpsest.Client, "_wait", lambda client, seconds: waited.append(seconds))
    monkeypatch.setattr(palimpsest.AsyncClient, "_wait", wait)
    return waited


# What is sent


def test_only_what_was_said_is_sent_and_the_rest_is_the_servers_to_decide(client: Any, server: FakeServer) -> None:
    edit = client.erase(PICTURE, mask=MASK, dilate=None, feather=np.int64(2))
    said = server.said()
    assert said.keys() == {"image", "mask", "feather", "keep", "result"}
    assert (said["image"], said["feather"], said["keep"], said["result"]) == (b"img_1", b"2", b"true", b"patch")
    assert server.calls[-1].headers["accept"] == "text/event-stream"
    assert (edit.id, edit.box, edit.seed) == ("img_result", (30, 20, 60, 40), None)
    assert (edit.warnings, edit.timings) == (("a warning",), {"engine": 3.5})


def test_a_model_that_is_named_is_named_in_a_header_too(client: Any, server: FakeServer) -> None:
    client.erase(PICTURE, mask=MASK)
    assert "x-palimpsest-model" not in server.calls[-1].headers
    client.erase(PICTURE, mask=MASK, model="team/own")
    assert server.calls[-1].headers["x-palimpsest-model"] == "team/own"
    assert server.said()["model"] == b"team/own"


def test_points_and_texts_arrive_as_they_are(client: Any, server: FakeServer) -> None:
    done = ("done", DONE | {"seed": 3, "mask": base64.b64encode(encoded(MASK)).decode()})
    server.answers = [httpx.Response(201, json={"id": "img_1"}), events(JOB, done)]
    edit = client.replace(PICTURE, "a “cat”, 7", points=np.array([[7, 5]]), box=(1, 2, 3.5, 4), quality="draft")
    said = server.said()
    assert json.loads(said["points"]) == [[7, 5]]
    assert json.loads(said["box"]) == [1, 2, 3.5, 4]
    assert (said["prompt"].decode(), said["quality"], said["previews"]) == ("a “cat”, 7", b"draft", b"false")
    assert edit.seed == 3
    assert (edit.mask == MASK).all()


def test_a_large_picture_is_sent_once_whatever_it_comes_as(client: Any, server: FakeServer, tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    for each in (PICTURE, tmp_path / "a.png", str(tmp_path / "a.png"), client.upload(PICTURE)):
        client.erase(each, mask=MASK)
    assert server.asked().count("POST /v1/images") == 1
    assert [server.said(index)["image"] for index in (1, 2, 3, 4)] == [b"img_1"] * 4


def test_no_more_uploads_are_remembered_than_the_server_keeps(
    client: Any, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known.MOST == images.MOST
    monkeypatch.setattr("palimpsest.known.MOST", 2)
    for each in (b"1", b"2", b"3", b"3", b"2", b"1"):
        client.upload(each)
    assert len(server.calls) == 4


def test_a_small_picture_goes_with_the_request(client: Any, server: FakeServer) -> None:
    client.erase(encoded(np.zeros((60, 80, 3), np.uint8)), mask=np.ones((60, 80), bool))
    assert server.asked() == ["POST /v1/erase"]


def test_of_what_is_not_to_be_kept_everything_goes_with_the_request(client: Any, server: FakeServer) -> None:
    edit = client.erase(PICTURE, mask=MASK, keep=False)
    assert server.asked() == ["POST /v1/erase"]
    assert server.said().keys() == {"image", "mask"}
    assert server.said()["image"] == PICTURE
    assert edit.file() == PATCH


def test_an_edit_of_an_edit_names_it(client: Any, server: FakeServer) -> None:
    client.erase(client.erase(PICTURE, mask=MASK), mask=MASK)
    assert server.said()["image"] == b"img_result"


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        (np.zeros((5, 7), np.uint8), "L"),
        (np.zeros((5, 7, 1), np.uint8), "L"),
        (np.zeros((5, 7, 2), np.uint8), "LA"),
        (np.zeros((5, 7, 3), np.uint8), "RGB"),
        (np.zeros((5, 7, 4), np.uint8), "RGBA"),
        (np.full((5, 7), 40_000, np.uint16), "I;16"),
        (Image.new("RGBA", (7, 5)), "RGBA"),
        (Image.new("P", (7, 5)), "P"),
    ],
)
def test_arrays_and_pillow_pictures_are_sent_as_exact_files(
    client: Any, server: FakeServer, given: Any, mode: str
) -> None:
    client.erase(given, mask=np.ones((5, 7), bool), keep=False)
    with Image.open(io.BytesIO(server.said()["image"])) as sent:
        assert (sent.format, sent.mode, sent.size) == ("PNG", mode, (7, 5))
        assert (np.asarray(sent) == np.asarray(given).reshape(np.asarray(sent).shape)).all()


def test_the_pixels_of_a_pillow_picture_count_as_they_lie(client: Any, server: FakeServer) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encoded(np.zeros((5, 7, 3), np.uint8), "JPEG", exif=exif)))
    client.erase(turned, mask=np.ones((5, 7), bool))
    sent = Image.open(io.BytesIO(server.said()["image"]))
    assert sent.size == (7, 5)
    assert 0x0112 not in sent.getexif()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((5, 7, 3), np.float32), "float32 and shape"),
        (np.zeros((5, 7, 5), np.uint8), "HxWx4"),
        (np.zeros((5, 7, 3), np.uint16), "uint16"),
        (np.zeros((5, 7), bool), "bool"),
        (Image.new("CMYK", (7, 5)), "convert it to RGB"),
        (7, "not int"),
    ],
)
def test_what_can_be_no_picture_is_refused_by_name(client: Any, server: FakeServer, given: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        client.erase(given, mask=MASK)
    assert not server.calls


def test_there_is_an_argument_for_every_field_of_the_servers() -> None:
    ours = {fields.SegmentFields: SegmentFields, fields.EraseFields: EraseFields, fields.ReplaceFields: ReplaceFields}
    apart = {"image", "mask", "keep", "result", "format", "prompt", "hover", "previews"}
    for mine, theirs in ours.items():
        assert get_type_hints(mine).keys() == theirs.model_fields.keys() - apart
        choices = {name: get_args(each) for name, each in get_type_hints(mine).items() if get_origin(each) is Literal}
        said = theirs.model_json_schema()["properties"]
        assert choices == {name: tuple(said[name]["enum"]) for name in choices}


def test_both_distributions_have_one_version_and_address() -> None:
    assert palimpsest.__version__ == serve.__version__
    settings = Settings.model_fields
    assert f"http://{settings['host'].default}:{settings['port'].default}" == http.DEFAULT_URL


# Waiting


@pytest.mark.parametrize("status", [429, 503])
def test_it_waits_as_the_server_says_and_asks_again(
    client: Any, server: FakeServer, waits: list[float], status: int
) -> None:
    told = {"error": {"code": "busy", "message": "later"}}
    server.answers = [
        httpx.Response(status, json=told, headers={"retry-after": "3"}),
        events(JOB, ("error", told | {"status": status, "retry_after": 2})),
    ]
    assert client.erase(PICTURE, mask=MASK, keep=False).id == "img_result"
    assert waits == [3, 2]
    assert server.asked() == ["POST /v1/erase"] * 3


def test_all_waiting_of_a_call_together_has_an_end(
    connect: Callable[..., Any], server: FakeServer, waits: list[float]
) -> None:
    busy = httpx.Response(429, json={"error": {"code": "queue_full", "message": "x"}}, headers={"retry-after": "4"})
    server.answers = [busy] * 9
    client = connect(transport=httpx.MockTransport(server), patience=10)
    with pytest.raises(palimpsest.Busy) as caught:
        client.models()
    assert (caught.value.code, caught.value.retry_after) == ("queue_full", 4)
    assert waits == [4, 4]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"status_code": 429}, palimpsest.Busy),
        ({"status_code": 500, "headers": {"retry-after": "1"}}, palimpsest.PalimpsestError),
        ({"status_code": 507, "headers": {"retry-after": "1"}}, palimpsest.NoRoom),
        (httpx.ConnectError("refused"), palimpsest.Unreachable),
        (httpx.ReadTimeout("slow"), palimpsest.Unreachable),
    ],
)
def test_nothing_else_is_tried_again(
    client: Any, server: FakeServer, waits: list[float], answer: Any, kind: type[Exception]
) -> None:
    server.answers = [httpx.Response(**answer) if isinstance(answer, dict) else answer]
    with pytest.raises(kind):
        client.models()
    assert (len(server.calls), waits) == (1, [])


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("7", 7), ("-3", 0), ("0.5", 0.5), ("soon", None), ("", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0)],
)
def test_retry_after_is_seconds_or_a_date(said: str, seconds: float | None) -> None:
    with pytest.raises(errors.PalimpsestError) as caught:
        errors.check(httpx.Response(503, headers={"retry-after": said}))
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize(
    ("given", "environments", "sent"),
    [("one", "two", "Bearer one"), (None, "two", "Bearer two"), (None, "", None), ("", "two", None)],
)
def test_the_key_is_the_one_that_is_given_or_the_environments(
    connect: Callable[..., Any],
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    environments: str,
    sent: str | None,
) -> None:
    monkeypatch.setenv("PALIMPSEST_KEY", environments)
    connect(transport=httpx.MockTransport(server), key=given).upload(PICTURE)
    assert server.calls[-1].headers.get("authorization") == sent


# Errors


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (BadRequest("m", "points"), palimpsest.BadRequest),
        (BodyTimeout("m"), palimpsest.BadRequest),
        (UnknownImage("m", "mask"), palimpsest.NotFound),
        (serve.errors.ModelNotFound("m"), palimpsest.NotFound),
        (serve.errors.Unauthenticated(), palimpsest.NotAllowed),
        (serve.errors.Forbidden("m"), palimpsest.NotAllowed),
        (serve.errors.RequestTooLarge("m", "image"), palimpsest.TooLarge),
        (Busy("m", 700), palimpsest.Busy),
        (Cancelled("m"), palimpsest.Cancelled),
        (serve.errors.ModelFailed("m"), palimpsest.PalimpsestError),
        (EngineUnavailable("m"), palimpsest.Unavailable),
        (serve.errors.DeadlineExceeded("m"), palimpsest.DeadlineExceeded),
        (OutOfMemory("m"), palimpsest.NoRoom),
        (DiskFull("m"), palimpsest.NoRoom),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_each_error_of_the_servers_is_one_here(
    connect: Callable[..., Any], server: FakeServer, theirs: PalimpsestError, ours: type[Exception], streamed: bool
) -> None:
    answer = httpx.Response(theirs.status, json=theirs.body(), headers=theirs.headers())
    if streamed:
        again = {} if theirs.retry_after is None else {"retry_after": theirs.retry_after}
        name = "cancelled" if theirs.code == "cancelled" else "error"
        answer = events(JOB, (name, theirs.body() | {"status": theirs.status} | again))
    server.answers = [answer]
    with pytest.raises(palimpsest.PalimpsestError) as caught:
        connect(transport=httpx.MockTransport(server), patience=0).segment(encoded(MASK), points=[(1, 2)])
    error = caught.value
    assert type(error) is ours
    assert (error.code, error.message, error.field) == (theirs.code, theirs.message, theirs.field)
    assert (error.status, error.retry_after) == (theirs.status, theirs.retry_after)
    assert "DELETE" not in " ".join(server.asked())


def test_what_is_no_reply_of_a_palimpsests_says_so(client: Any, server: FakeServer) -> None:
    server.answers = [httpx.Response(502, html="<h1>Bad gateway</h1>")]
    with pytest.raises(palimpsest.PalimpsestError) as caught:
        client.models()
    assert (caught.value.code, caught.value.message) == ("http_502", "<h1>Bad gateway</h1>")


def test_a_stream_that_breaks_off_is_unreachable(client: Any, server: FakeServer) -> None:
    server.answers = [events(JOB, RUNNING)]
    with pytest.raises(palimpsest.Unreachable, match="went away"):
        client.erase(encoded(MASK), mask=MASK)


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://there", "http://", "http://there:port", ""])
def test_what_is_no_address_is_refused(connect: Callable[..., Any], url: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        connect(url)


def test_a_proxy_of_the_environment_leads_nowhere_on_this_machine() -> None:
    trusting = {"http://localhost:1": False, "http://[::1]": False, "http://there": True}
    assert {url: http.options(url, None, 1)["trust_env"] for url in trusting} == trusting


# What the server has forgotten


def forgotten(field: str) -> httpx.Response:
    error = UnknownImage("gone", field)
    return httpx.Response(404, json=error.body())


def test_a_forgotten_upload_is_sent_again(client: Any, server: FakeServer) -> None:
    upload = client.upload(PICTURE)
    server.answers = [forgotten("image")]
    client.erase(upload, mask=MASK)
    assert server.asked() == ["POST /v1/images", "POST /v1/erase", "POST /v1/images", "POST /v1/erase"]
    assert server.said()["image"] == b"img_3"
    assert PICTURE in server.calls[2].content


def test_a_forgotten_result_is_made_again_with_its_seed_and_its_mask(client: Any, server: FakeServer) -> None:
    mask = base64.b64encode(encoded(MASK)).decode()
    first = DONE | {"seed": 5, "mask": mask}
    server.answers = [httpx.Response(201, json={"id": "img_1"}), events(JOB, ("done", first))]
    edit = client.replace(PICTURE, "a cat", points=[(9, 9)], dilate=3, steps=4)
    server.answers = [forgotten("image"), events(JOB, ("done", first | {"id": "img_again"}))]
    client.erase(edit, mask=MASK)
    again = server.said(-2)
    assert again.keys() == {"image", "mask", "prompt", "steps", "seed", "keep", "result", "previews"}
    assert (again["seed"], again["mask"]) == (b"5", encoded(MASK))
    assert server.said()["image"] == b"img_again"


def test_where_the_server_paints_it_otherwise_now_what_was_shown_is_sent(client: Any, server: FakeServer) -> None:
    edit = client.erase(PICTURE, mask=MASK)
    other = base64.b64encode(encoded(np.full((20, 30, 3), 8, np.uint8))).decode()
    server.answers = [forgotten("image"), events(JOB, ("done", DONE | {"id": "img_other", "picture": other}))]
    client.erase(edit, mask=MASK)
    assert server.asked()[-2:] == ["POST /v1/images", "POST /v1/erase"]
    assert server.said()["image"] == f"img_{len(server.calls) - 1}".encode()


def test_a_long_chain_is_made_again_from_where_the_server_has_it() -> None:
    """Each by one request, and one that finds it missing; as deep as Python's stack is not."""
    has: set[bytes] = set()
    made = iter(range(10_000))
    server = FakeServer()

    def answer(request: httpx.Request) -> httpx.Response:
        request.read()
        server.calls.append(request)
        image = server.said()["image"]
        if image.startswith(b"img_") and image not in has:
            return forgotten("image")
        name = f"img_{next(made)}"
        has.add(name.encode())
        return events(JOB, ("done", DONE | {"id": name}))

    with palimpsest.Client(transport=httpx.MockTransport(answer)) as client:
        edit: Any = encoded(np.zeros((60, 80, 3), np.uint8))
        for _ in range(300):
            edit = client.erase(edit, mask=np.ones((60, 80), bool))
        for name in [name for name in has if name != b"img_99"]:
            has.remove(name)
        server.calls.clear()
        client.erase(edit, mask=np.ones((60, 80), bool))
    assert len(server.calls) == 2 * 200 + 1


def test_what_is_forgotten_again_and_again_ends(client: Any, server: FakeServer) -> None:
    upload = client.upload(PICTURE)
    server.answers = [forgotten("image"), httpx.Response(201, json={"id": "img_1"}), forgotten("image")]
    with pytest.raises(palimpsest.NotFound):
        client.erase(upload, mask=MASK)
    server.answers = [forgotten("image")]
    with pytest.raises(palimpsest.NotFound):  # nobody has its bytes
        client.erase(palimpsest.Upload("img_elsewhere"), mask=MASK)


# Progress, and ends


def test_progress_is_told_as_it_comes(client: Any) -> None:
    told: list[palimpsest.Progress] = []
    client.erase(encoded(MASK), mask=MASK, progress=told.append)
    assert told == [("running", 1, 4, "demo/lama")]
    assert told[0].phase == "running"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_a_call_early_ends_the_job(server: FakeServer, error: type[BaseException]) -> None:
    """Ctrl-C comes amid the reading; here it comes out of what is called there."""

    def stop(progress: palimpsest.Progress) -> None:
        raise error("stop")

    with palimpsest.Client(transport=httpx.MockTransport(server)) as client, pytest.raises(error):
        client.erase(encoded(MASK), mask=MASK, progress=stop)
    assert server.asked() == ["POST /v1/erase", "DELETE /v1/jobs/j1"]


def test_cancelling_a_task_ends_the_job(server: FakeServer) -> None:
    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield events(JOB).content
            await anyio.sleep_forever()

    async def main() -> None:
        async with palimpsest.AsyncClient(transport=httpx.MockTransport(server)) as client:
            call = asyncio.create_task(client.erase(encoded(MASK), mask=MASK))
            while not any(job.runs for job in client._jobs):
                await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert server.asked() == ["POST /v1/erase", "DELETE /v1/jobs/j1"]

    server.answers = [httpx.Response(200, stream=Stream())]
    anyio.run(main)


def test_closing_a_client_ends_what_its_other_threads_wait_for(server: FakeServer) -> None:
    runs, deleted = threading.Event(), threading.Event()

    class Stream(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b'event: job\ndata: {"job": "j1"}\n\n'
            runs.set()
            assert deleted.wait(30)
            told = json.dumps(Cancelled("the job was cancelled").body() | {"status": 499})
            yield f"event: cancelled\ndata: {told}\n\n".encode()

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            deleted.set()
            return httpx.Response(202)
        return httpx.Response(200, stream=Stream())

    caught: list[BaseException] = []

    def call() -> None:
        try:
            client.erase(encoded(MASK), mask=MASK)
        except palimpsest.Cancelled as error:
            caught.append(error)

    with palimpsest.Client(transport=httpx.MockTransport(answer)) as client:
        thread = threading.Thread(target=call)
        thread.start()
        assert runs.wait(30)
    thread.join(30)
    assert len(caught) == 1


def test_leaving_an_async_client_ends_what_its_other_tasks_wait_for(server: FakeServer) -> None:
    deleted = anyio.Event()

    class Stream(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield events(JOB).content
            await deleted.wait()
            raise httpx.ReadError("the connection was closed")

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            deleted.set()
        return server(request)

    async def main() -> None:
        async with palimpsest.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            call = asyncio.create_task(client.erase(encoded(MASK), mask=MASK))
            while not any(job.runs for job in client._jobs):
                await asyncio.sleep(0)
        with pytest.raises(palimpsest.Cancelled):
            await call
        assert server.asked() == ["POST /v1/erase", "DELETE /v1/jobs/j1"]

    server.answers = [httpx.Response(200, stream=Stream())]
    anyio.run(main)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_is_closed_waits_for_no_turn_and_asks_nothing(server: FakeServer, kind: str) -> None:
    asked = threading.Event()

    def busy(request: httpx.Request) -> httpx.Response:
        server(request)
        asked.set()
        return httpx.Response(429, headers={"retry-after": "100"})

    def call(client: Any) -> None:
        with pytest.raises(palimpsest.Cancelled):
            client.models()
        ended.set()

    ended = threading.Event()
    with connecting(kind) as make:
        client = make(transport=httpx.MockTransport(busy))
        threading.Thread(target=call, args=(client,)).start()
        assert asked.wait(30)
        (client.close if kind == "waiting" else client.aclose)()
        assert ended.wait(30)
        with pytest.raises(palimpsest.Cancelled, match="closed"):
            client.models()
    assert len(server.calls) == 1


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_events_may_come_in_pieces_of_any_size(size: int) -> None:
    told: list[palimpsest.Progress] = []
    reader = JobReader(told.append)
    content = b": still there\n\n" + events(JOB, RUNNING, RUNNING, ("preview", {"box": []}), ("done", DONE)).content
    for start in range(0, len(content), size):
        reader.feed(content[start : start + size])
    assert (reader.job, len(told), reader.result()) == ("j1", 2, DONE)
    assert not reader.runs
