"""The image-edit call of the OpenAI API as the `openai` package speaks it, on the demo handlers in this process."""

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import door
import httpx
import numpy as np
import openai
import pytest
from conftest import HandlerClient, encoded, pixels
from fakes import FakeTorchServe, make_store, refused
from openai import OpenAI
from PIL import Image
from test_keep import answering

from contract.description import Choice
from handlers.sd import settings
from serve.engine.answer import json_length, json_pieces
from serve.errors import QueueFull
from serve.memory_file import MemoryFile, Part

pytestmark = pytest.mark.slow  # handlers of the product answer

PICTURE = np.random.default_rng(7).integers(0, 256, (48, 64, 3), np.uint8)
HOLE = np.zeros(PICTURE.shape[:2], bool)
HOLE[10:30, 20:50] = True
WHITE = np.full_like(PICTURE, 255)
QUICK = {"seed": 5, "steps": 2}


def transparent(rgb: np.ndarray, hole: np.ndarray = HOLE) -> np.ndarray:
    return np.dstack([rgb, np.where(hole, 0, 255).astype(np.uint8)])


IMAGE, MASK = encoded(PICTURE), encoded(transparent(WHITE))


@pytest.fixture(scope="module")
def fake(open_handler: Callable[[str], HandlerClient]) -> FakeTorchServe:
    fake = FakeTorchServe()
    for name in ("sam", "lama", "sd"):
        fake.replies[f"POST /predictions/p.{name}"] = answering(open_handler(name))
    return fake


@pytest.fixture(scope="module")
def server(fake: FakeTorchServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[door.Server]:
    store = make_store(tmp_path_factory.mktemp("openai"), "sam", "lama", "sd", "team/mine", ours=True)
    make_store(store, "team/other")
    fake.replies["POST /predictions/p.team--mine"] = fake.replies["POST /predictions/p.sd"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_COMMAND_KEY", "the-key")
        with door.serving(fake, store) as running:
            yield running


@pytest.fixture(scope="module")
def client(server: door.Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def plain(server: door.Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
        yield client


def edit(client: OpenAI, **fields: Any) -> Any:
    own = {"image": ("a.png", IMAGE), "mask": ("b.png", MASK), "prompt": "a red ball", "extra_body": QUICK}
    return client.images.edit(**own | fields)


def replaced(plain: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The same by /v1/replace, with a mask of white on black."""
    files = {"image": IMAGE, "mask": encoded(HOLE.astype(np.uint8) * 255)}
    data = {"prompt": "a red ball", "format": "png", **QUICK, **fields}
    answer = plain.post("/v1/replace", files=files, data=data, headers={"accept": "application/json"})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def picture(text: str) -> np.ndarray:
    return pixels(base64.b64decode(text))


# What it does


def test_what_is_transparent_in_the_mask_is_replaced_and_nothing_else(client: OpenAI, plain: httpx.Client) -> None:
    reply = edit(client, model="gpt-image-1")
    (item,) = reply.data
    assert item.b64_json == replaced(plain)["picture"]
    after = picture(item.b64_json)
    assert (after[~HOLE] == PICTURE[~HOLE]).all()
    assert (after[HOLE] != PICTURE[HOLE]).any()
    assert (reply.output_format, reply.size, reply.usage.total_tokens) == ("png", "64x48", 0)
    assert abs(reply.created - time.time()) < 60
    assert reply.model_extra["warnings"] == ["model = 'gpt-image-1' is no archive here: sd answered"]


GREY_AND_ALPHA = np.dstack([np.full_like(HOLE, 7, np.uint8), np.where(HOLE, 0, 255).astype(np.uint8)])
NEARLY = transparent(WHITE)
NEARLY[0, :, 3] = 1  # is there, if hardly


def palette() -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(HOLE.astype(np.uint8) * 3, "P")
    image.putpalette([90, 0, 0] * 4)
    image.save(buffer, "PNG", transparency=3)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "mask",
    [
        encoded(transparent(WHITE - 255)), encoded(transparent(PICTURE)), encoded(transparent(PICTURE[::-1])),
        encoded(GREY_AND_ALPHA), encoded(NEARLY), palette(), encoded(transparent(WHITE), "WEBP", lossless=True),
    ],
    ids=["black", "the picture", "another picture", "grey", "nearly transparent", "palette", "webp"],
)  # fmt: skip
def test_a_masks_colours_mean_nothing(client: OpenAI, mask: bytes) -> None:
    assert edit(client, mask=mask).data[0].b64_json == edit(client).data[0].b64_json


def test_several_variants_have_their_seeds(client: OpenAI, plain: httpx.Client) -> None:
    reply = edit(client, n=2)
    assert [item.b64_json for item in reply.data] == replaced(plain, variants=2)["pictures"]
    assert [item.model_extra["seed"] for item in reply.data] == [5, 6]


@pytest.mark.parametrize("n", [1, 2])
def test_an_address_leads_to_the_picture(client: OpenAI, plain: httpx.Client, server: door.Server, n: int) -> None:
    named = client.with_options(base_url=f"http://localhost:{server.port}/v1")
    shown = edit(client, n=n).data
    for item, same in zip(edit(named, n=n, response_format="url").data, shown, strict=True):
        assert item.b64_json is None
        assert item.url.startswith(f"http://localhost:{server.port}/v1/images/img_")
        answer = plain.get(item.url)
        assert answer.headers["content-type"] == "image/png"
        assert (pixels(answer.content) == picture(same.b64_json)).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_format_is_the_one_asked_for(client: OpenAI, plain: httpx.Client, kind: str) -> None:
    reply = edit(client, output_format=kind, image=("a.jpg", encoded(PICTURE, "JPEG")))
    assert reply.output_format == kind
    assert Image.open(io.BytesIO(base64.b64decode(reply.data[0].b64_json))).format == kind.upper()
    url = edit(client, output_format=kind, response_format="url").data[0].url
    assert plain.get(url).headers["content-type"] == f"image/{kind}"


def test_the_quality_is_that_of_replace(client: OpenAI, plain: httpx.Client) -> None:
    for theirs, ours in {"low": "draft", "medium": "standard"}.items():
        assert edit(client, quality=theirs).data[0].b64_json == replaced(plain, quality=ours)["picture"]
    assert edit(client, quality="low").data != edit(client, quality="auto").data


def test_an_upload_and_the_way_to_paint_are_taken_as_by_replace(client: OpenAI, plain: httpx.Client) -> None:
    image = plain.post("/v1/images", files={"image": IMAGE}).json()["id"]
    more = QUICK | {"guidance": 2, "negative_prompt": "blue", "scheduler": "euler", "feather": 3}
    reply = edit(client, image=image.encode(), extra_body=more, size="64x48", model="team/mine")
    assert reply.data[0].b64_json == replaced(plain, **more)["picture"]
    assert reply.model_extra["warnings"] == []


def test_what_has_no_effect_is_served_and_named(client: OpenAI) -> None:
    fields = {"output_compression": 80, "input_fidelity": "high", "user": "me", "safety_identifier": "x"}
    reply = edit(client, **fields, background="opaque", partial_images=2)
    said = ["output_compression", "input_fidelity", "user", "safety_identifier", "partial_images"]
    assert reply.model_extra["warnings"] == [f"{name} had no effect" for name in said]


def test_a_stream_ends_with_each_picture(client: OpenAI) -> None:
    events = list(edit(client, n=2, stream=True, output_format="webp"))
    assert [event.type for event in events] == ["image_edit.completed"] * 2
    assert [event.b64_json for event in events] == [
        item.b64_json for item in edit(client, n=2, output_format="webp").data
    ]
    first = events[0]
    assert (first.size, first.output_format, first.quality, first.background) == ("64x48", "webp", "auto", "auto")
    assert first.usage.input_tokens == 0


# What it refuses


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"mask": openai.NOT_GIVEN}, "mask", "mask is missing"),
        ({"mask": encoded(transparent(WHITE)[:-1])}, "mask", "64x47 but the picture is 64x48"),
        ({"mask": encoded(WHITE)}, "mask", "no transparency"),
        ({"mask": encoded(transparent(WHITE, HOLE & False))}, "mask", "fully transparent"),
        ({"mask": b"no picture"}, "mask", "not a picture"),
        ({"image": [("a.png", IMAGE), ("b.png", IMAGE)]}, "image", "one picture is edited at a time, not 2"),
        ({"size": "1024x1024"}, "size", "64x48"),
        ({"size": "large"}, "size", "large"),
        ({"n": 5}, "n", "less than or equal to 4"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"model": "sam"}, "model", "takes no prompt"),
        ({"model": "lama"}, "model", "takes no prompt"),
        ({"model": "team/other"}, "model", "another make"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"quality": "ultra"}, "quality", "medium"),
        ({"output_format": "tiff"}, "output_format", "webp"),
        ({"response_format": "url", "stream": True}, "response_format", "stream"),
        ({"stream": True, "partial_images": 4}, "partial_images", "3"),
        ({"extra_body": {"style": "vivid"}}, "style", "there is no field"),
        ({"extra_body": {"strength": 2}}, "strength", "less than or equal to 1"),
        ({"extra_body": {"steps": 1, "strength": 0.1}}, "strength", "leaves no step"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_named_in_the_apis_own_shape(
    client: OpenAI, fields: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        edit(client, **{"stream": stream} | fields)
    error = caught.value
    assert (error.param, error.code, error.type) == (param, "bad_request", "invalid_request_error")
    assert words in error.message


def test_an_unknown_upload_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="upload it again") as caught:
        edit(client, image=b"img_0")
    assert (caught.value.param, caught.value.code) == ("image", "image_not_found")


def test_what_the_door_refuses_has_the_shape_too(plain: httpx.Client) -> None:
    for path in ("/v1/images/edits", "/v1/images/edits/"):
        answer = plain.post(path, headers={"origin": "http://evil.example"})
        assert answer.status_code == 403
        assert answer.json()["error"] == {
            "message": "a page of another site sent this: nothing is changed from there,"
            " unless PALIMPSEST_ORIGINS names it",
            "type": "invalid_request_error", "param": None, "code": "cross_site",
        }  # fmt: skip


def test_a_body_is_as_large_as_any_with_a_picture(client: OpenAI) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (300, 400, 3), np.uint8)
    assert len(encoded(noise)) > 64 * 1024
    with pytest.raises(openai.BadRequestError, match="64x48 but the picture is 400x300"):
        edit(client, image=encoded(noise))


# Trying again


def test_a_busy_server_is_asked_again_when_it_said(
    client: OpenAI, server: door.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies, slept = server.app.state.services.bodies, list[float]()
    receive, refusals = bodies.receive, [QueueFull("too many", 3)]

    async def once_busy(request: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await receive(request)

    monkeypatch.setattr(bodies, "receive", once_busy)
    monkeypatch.setattr(time, "sleep", slept.append)
    assert edit(client.with_options(max_retries=1)).data
    assert slept == [3]
    refusals.append(QueueFull("too many", 3))
    with pytest.raises(openai.RateLimitError) as caught:
        edit(client)
    assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
    assert caught.value.response.headers["retry-after"] == "3"


def test_an_engine_that_restarts_is_a_503_to_come_back_to(
    client: OpenAI, fake: FakeTorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fake.replies, "POST /predictions/p.sd", refused())
    with pytest.raises(openai.InternalServerError) as caught:
        edit(client, stream=True)
    assert (caught.value.status_code, caught.value.type) == (503, "server_error")
    assert float(caught.value.response.headers["retry-after"]) > 0


def test_what_would_fail_again_is_not_asked_again(
    client: OpenAI, fake: FakeTorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()

    def fail(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return httpx.Response(500, json={"error": {"code": "not_finite", "message": "change the seed"}})

    monkeypatch.setitem(fake.replies, "POST /predictions/p.sd", fail)
    with pytest.raises(openai.InternalServerError, match="change the seed"):
        edit(client.with_options(max_retries=2))
    assert len(calls) == 1


def test_an_archive_that_would_take_the_mask_for_another_is_not_believed(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was built before: it ignores what it does not know, with a warning."""
    monkeypatch.setattr(settings, "MASK_BY", Choice("of_later", "any", ("any",), ""))
    with pytest.raises(openai.BadRequestError, match="build it anew") as caught:
        edit(client)
    assert caught.value.param == "model"


def test_parts_leave_as_base64_wherever_they_are() -> None:
    with MemoryFile() as file:
        file.write(b"abcdef")
        part, text = Part(file, 0, 3), Part(file, 3, 6, text=True)
        value = {
            "a": [{"b": part, "c": 1}, {"b": text}],
            "d": [part, text],
            "e": {},
            "f": {"g": part},
            "h": [{}],
            "i": [],
        }
        expected = {
            "a": [{"b": "YWJj", "c": 1}, {"b": "def"}], "d": ["YWJj", "def"], "e": {}, "f": {"g": "YWJj"}, "h": [{}],
            "i": [],
        }  # fmt: skip
        written = b"".join(json_pieces(value))
        assert written.decode() == json.dumps(expected)
        assert len(written) == json_length(value)
