"""Fields in, replies out."""

import base64
import json
import os
import struct
import time
import tracemalloc
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from conftest import encoded
from hypothesis import given
from hypothesis import strategies as st

from contract.accept import JSON, OWN, PICTURES, preferred
from contract.description import MAX_TEXT, Integer, Structure
from handlers.pictures.decoding import decode_picture
from handlers.pictures.picture import Metadata, Picture
from handlers.requests.base64_text import array_to_text, from_base64, text_to_array, to_base64
from handlers.requests.errors import BadRequest, Cancelled
from handlers.requests.jobs import SharedProgress, attach
from handlers.requests.payload import Request
from handlers.requests.reply import Reply
from handlers.requests.timings import Timings
from handlers.sam.description import MASK_INPUT
from handlers.sd.description import STRENGTH
from serve.memory_file import MemoryFile

WHITE = encoded(np.full((2, 3, 3), 255, np.uint8))
MASK = encoded(np.full((2, 3), 255, np.uint8))
TEXT = base64.b64encode(WHITE).decode()


def whole(name: str, high: int, default: int = 0) -> Integer:
    return Integer(name, default, 0, high, "")


def sent_as(reply: Reply, accept: str) -> tuple[bytes, str, dict[str, str]]:
    """Body, content type and headers."""
    encoded = reply.encoded(accept)
    return encoded.body(), encoded.content_type, encoded.headers


def test_a_stage_within_another_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 4, 6, 9, 10, 12, 13])
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    timings = Timings()
    with timings.stage("model"):  # 0 to 10
        with timings.stage("decode"):  # 1 to 4
            pass
        with pytest.raises(BadRequest), timings.stage("mask"):  # 6 to 9
            raise BadRequest("no")
    with timings.stage("model"):  # 12 to 13
        pass
    assert timings.seconds == {"decode": 3, "mask": 3, "model": 5}


def test_json_multipart_and_decoded_bodies_are_the_same_request() -> None:
    bodies = [
        {"body": json.dumps({"image": TEXT, "gen_args": '{"a": 1}'}).encode()},
        {"body": {"image": TEXT, "gen_args": {"a": 1}}},
        {"image": WHITE, "gen_args": b'{"a": 1}'},
        {"image": TEXT.encode(), "gen_args": '{"a": 1}'},
    ]
    for body in bodies:
        request = Request.parse(body)
        assert request.picture("image").size == (3, 2)
        assert request.arguments().integer(whole("a", 9)) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"data:image/png;base64,{TEXT}",
        f"data:image/png;charset=utf-8;base64,{TEXT}",
        TEXT.replace("+", "-").replace("/", "_"),
        TEXT.rstrip("="),
        "\n".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60)),
        f"DATA:IMAGE/PNG;BASE64,{TEXT}",
        f"Data:;Base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f'data:image/png;name="a, b.png";base64,{TEXT}',
        f'data:image/png; charset="utf-8" ;base64 ,{TEXT}',
        f" data:image/png;name=a%2Cb.png;base64,{TEXT}",
        "data:image/png;base64," + quote(TEXT, safe=""),
        "data:image/png;base64," + TEXT.replace("/", "%2f").replace("=", "%3d"),
        "data:image/png," + quote(WHITE),
        "data:," + "".join(f"%{byte:02x}" for byte in WHITE),
    ],
)
def test_unambiguous_base64_is_accepted(text: str) -> None:
    assert from_base64(text, "image") == WHITE


@pytest.mark.parametrize(
    "text",
    [
        "data:" + "a" * 500_000,
        "data:" + '"' * 500_000,
        "data:" + 'a"' * 200_000 + ",",
        "data:;base64," + "%" * 500_000,
        "data:;base64," + "%41" * 2**23,
        " " * 500_001,
        "A\n" * 200_000 + "A",
    ],
)
def test_no_text_takes_long_or_makes_many_objects(text: str) -> None:
    data = text.encode()
    tracemalloc.start()
    with pytest.raises(BadRequest):
        Request({"image": text}).picture("image")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(data)


@given(st.binary(max_size=200))
def test_base64_round_trip(data: bytes) -> None:
    assert from_base64(to_base64(data), "x") == data


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({}, "image", "missing"),
        ({"image": ""}, "image", "missing"),
        ({"image": 7}, "image", "must be base64"),
        ({"image": "/etc/passwd"}, "image", "image"),
        ({"image": "!!!"}, "image", "neither base64"),
        ({"image": TEXT[: len(TEXT) // 2 // 4 * 4]}, "image", "damaged"),
        ({"image": "A" * 9}, "image", "cut off"),
    ],
)
def test_a_bad_picture_names_its_field(fields: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        Request(fields).picture("image")
    assert caught.value.field == field


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff\xfe", "3", b"[" * 5000])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(BadRequest, match="the body"):
        Request.parse({"body": body})


BODIES = {
    "json": lambda image, prompt: ("application/json", json.dumps({"image": TEXT, "prompt": prompt}).encode()),
    "utf-16": lambda image, prompt: (
        "",
        json.dumps({"image": TEXT, "prompt": prompt}, ensure_ascii=False).encode("utf-16"),
    ),
    "multipart": lambda image, prompt: multipart(("image", image), ("prompt", prompt.encode())),
    "urlencoded": lambda image, prompt: (
        "application/x-www-form-urlencoded",
        urlencode({"image": TEXT, "prompt": prompt}).encode(),
    ),
}


def multipart(*fields: tuple[str, bytes]) -> tuple[str, bytes]:
    parts = [b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (n.encode(), v) for n, v in fields]
    return "multipart/form-data; boundary=b", b"".join(parts) + b"--b--"


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_as_it_was_sent_is_read_by_the_rules_of_all(kind: str) -> None:
    content_type, body = BODIES[kind](WHITE, "a 😀")
    request = Request.read(content_type, "", body)
    assert request.picture("image").size == (3, 2)
    assert request.text("prompt") == "a 😀"


def test_large_values_are_taken_from_the_body() -> None:
    noise = encoded(np.random.default_rng(1).integers(0, 255, (90, 90, 3), np.uint8))
    text = base64.b64encode(noise).decode()
    for escaped in (text, text.replace("/", "\\/")):
        request = Request.read("", "", b'{"image": "%b", "prompt": "%b"}' % (escaped.encode(), b"x" * 20_000))
        assert request.picture("image").size == (90, 90)
        with pytest.raises(BadRequest, match="10000") as caught:
            request.text("prompt")
        assert caught.value.field == "prompt"
    content_type, body = multipart(("image", text.encode()))
    request = Request.read(content_type, "", body)
    assert request.picture("image").size == (90, 90)
    logits = array_to_text(np.ones((1, 64, 64)))
    for arguments in ({"mask_input": logits}, json.dumps({"mask_input": logits})):
        request = Request.read("", "", json.dumps({"gen_args": arguments}).encode())
        assert request.arguments().structure(MASK_INPUT) == logits


@pytest.mark.parametrize(
    ("data", "field", "words"),
    [
        ({"body": b'{"prompt": "\\ud83d ball"}'}, "prompt", "half of a character"),
        ({"body": {"prompt": "\ud83d ball"}}, "prompt", "half of a character"),
        ({"prompt": b"\xff\xfe"}, "prompt", "UTF-8"),
        ({"body": b'{"prompt": "a", "prompt": "b"}'}, "prompt", "twice"),
        ({"body": b'{"prompt": NaN}'}, "prompt", "finite"),
        ({"body": b'{"prompt": null}'}, "prompt", "missing"),
        ({"body": b'{"prompt": 7}'}, "prompt", "must be a text"),
    ],
)
def test_a_bad_text_names_its_field(data: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        Request.parse(data).text("prompt")
    assert caught.value.field == field


def test_null_is_absent_and_seven_point_nought_is_seven() -> None:
    request = Request.parse({"body": b'{"negative_prompt": null, "gen_args": {"seed": 7.0, "steps": null}}'})
    assert request.text("negative_prompt", "none") == "none"
    arguments = request.arguments()
    assert (arguments.integer(whole("seed", 9)), arguments.integer(whole("steps", 9, default=5))) == (7, 5)
    assert type(arguments.integer(whole("seed", 9))) is int
    assert Request.parse({"body": b'{"gen_args": null}'}).arguments().structure(Structure("x", {}, "")) is None


def test_masks_must_fit_and_mark_something() -> None:
    request = Request({"image": WHITE, "mask_image": MASK})
    assert request.mask("mask_image", request.picture("image")).all()
    assert "context" in request.warnings[0]
    with pytest.raises(BadRequest, match="3x2 but the picture is 4x4"):
        request.mask("mask_image", Picture(np.zeros((4, 4), np.uint8)))
    with pytest.raises(BadRequest, match="the mask is empty"):
        Request({"mask_image": encoded(np.zeros((2, 3), np.uint8))}).mask("mask_image", request.picture("image"))


@pytest.mark.parametrize("value", [True, "1", 1.5, -2, 11, float("nan"), [1], {}])
def test_integers_are_checked(value: object) -> None:
    with pytest.raises(BadRequest, match="from 0 to 10") as caught:
        Request({"gen_args": {"steps": value}}).arguments().integer(whole("steps", 10))
    assert caught.value.field == "gen_args.steps"


@pytest.mark.parametrize("value", [True, "1", float("inf"), float("nan"), 1.01, None])
def test_numbers_are_checked(value: object) -> None:
    arguments = Request({"gen_args": {"strength": value}}).arguments()
    if value is None:
        assert arguments.number(STRENGTH) == STRENGTH.default
    else:
        with pytest.raises(BadRequest, match="from 0 to 1"):
            arguments.number(STRENGTH)


def test_unknown_arguments_end_in_a_warning() -> None:
    request = Request({"gen_args": {"steps": 3, "guidence": 7}})
    arguments = request.arguments()
    arguments.integer(whole("steps", 9))
    arguments.finish()
    assert request.warnings == ["gen_args.'guidence' is unknown and was ignored"]


def test_error_messages_never_quote_a_whole_payload() -> None:
    with pytest.raises(BadRequest) as caught:
        Request({"gen_args": {"steps": "x" * 10_000}}).arguments().integer(whole("steps", 9))
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("image/png", "image/png"),
        ("image/*", "image/*"),
        ("image/tiff", "image/tiff"),
        ("image/webp, */*;q=0.1", "image/webp"),
        ("image/png;q=0.5, image/jpeg", "image/jpeg"),
        ("text/html, image/png;q=0", None),
        ("IMAGE/JPEG; q=oops, application/json", None),
    ],
)
def test_accept_decides_the_form_of_the_reply(accept: str, expected: str | None) -> None:
    assert preferred(accept, (JSON, OWN, *PICTURES), JSON) == (expected or JSON)


def test_replies_as_json_and_as_bytes() -> None:
    reply = Reply(Picture(np.zeros((2, 2, 3), np.uint8)), {"seed": 5, "logits": "x", "parameters": {"a": 1}})
    reply.warnings.append("a\r\nb: c")
    body, kind, headers = sent_as(reply, "")
    assert (kind, headers) == ("application/json", {})
    assert json.loads(body)["seed"] == 5
    assert json.loads(body)["content_type"] == "image/png"
    body, kind, headers = sent_as(reply, "image/jpeg")
    assert (kind, body[:3]) == ("image/jpeg", b"\xff\xd8\xff")
    assert headers == {
        "X-Palimpsest-Seed": "5",
        "X-Palimpsest-Parameters": '{"a": 1}',
        "X-Palimpsest-Warnings": '["a\\r\\nb: c"]',
    }


@pytest.mark.parametrize(
    "warnings",
    [
        ["😀" * 10_000],
        ["é" * 10_000, "a" * 10_000, "last"],
        [f"warning {number}" for number in range(1000)],
        ["😀" * 10_000] * 50,
        ["a\r\nSet-Cookie: b", "\ud83d", "\x7f\x00"],
    ],
)
def test_warnings_always_leave_in_a_header(warnings: list[str]) -> None:
    """Which is ASCII, and JSON: nothing in it ends it."""
    reply = Reply(Picture(np.zeros((2, 2, 3), np.uint8)), {"labels": ["é", "😀"]}, warnings=list(warnings))
    headers = sent_as(reply, "image/png")[2]
    for value in headers.values():
        assert value.isascii()
        assert value.isprintable()
        assert len(value) < 2000
    told = json.loads(headers["X-Palimpsest-Warnings"])
    assert told[0][:5] == warnings[0][:5]
    left = len(warnings) - len(told) + 1
    assert len(told) == len(warnings) or told[-1] == f"and {left} more"


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "image/tiff"])
def test_the_inputs_own_format_on_request(kind: str) -> None:
    picture = Picture(np.zeros((2, 2, 3), np.uint8), metadata=Metadata(content_type=kind))
    body, sent, _ = sent_as(Reply(picture), "image/*")
    assert sent == kind
    assert decode_picture(body).metadata.content_type == kind
    fields = json.loads(sent_as(Reply(picture, output_format="image/*"), "")[0])
    assert fields["content_type"] == kind
    assert base64.b64decode(fields["generated_image"]) == body


@pytest.mark.parametrize(
    ("picture", "kind", "sent", "words"),
    [
        (Picture(np.zeros((1, 17_000, 3), np.uint8)), "image/webp", "image/png", "cannot hold"),
        (Picture(np.zeros((2, 2, 3), np.uint16)), "image/jpeg", "image/jpeg", "8 bits"),
        (
            Picture(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)),
            "image/jpeg",
            "image/jpeg",
            "transparency",
        ),
        (
            Picture(np.zeros((2, 2, 3), np.uint8), metadata=Metadata(text={"parameters": "{}"})),
            "image/webp",
            "image/webp",
            "needs a PNG",
        ),
    ],
)
def test_what_a_format_loses_is_said(picture: Picture, kind: str, sent: str, words: str) -> None:
    reply = Reply(picture)
    assert sent_as(reply, kind)[1] == sent
    assert words in reply.warnings[0]


def test_variants_are_for_json() -> None:
    pictures = [Picture(np.full((2, 2, 3), value, np.uint8)) for value in (1, 2, 3)]
    fields = json.loads(sent_as(Reply(pictures[0], variants=pictures[1:]), "")[0])
    assert [decode_picture(base64.b64decode(text)).samples[0, 0, 0] for text in fields["variants"]] == [1, 2, 3]
    assert fields["generated_image"] == fields["variants"][0]
    reply = Reply(pictures[0], variants=pictures[1:])
    assert decode_picture(sent_as(reply, "image/png")[0]).samples[0, 0, 0] == 1
    assert "first variant" in reply.warnings[0]


def test_a_mask_is_never_a_jpeg() -> None:
    body, kind, _ = sent_as(Reply(np.ones((4, 4), bool)), "image/jpeg")
    assert kind == "image/png"
    assert body.startswith(b"\x89PNG")


def test_texts_have_a_limit() -> None:
    with pytest.raises(BadRequest, match="limit is 10000"):
        Request({"prompt": "x" * (MAX_TEXT + 1)}).text("prompt")


@given(st.integers(1, 9), st.integers(1, 9))
def test_arrays_travel_as_text(height: int, width: int) -> None:
    array = np.linspace(-30, 30, height * width, dtype=np.float32).reshape(1, height, width)
    back = text_to_array(array_to_text(array), array.shape, "x")
    assert np.allclose(back, array, atol=0.02)


@pytest.mark.parametrize("text", ["", "AAAA", 3, array_to_text(np.full((1, 2, 2), np.nan))])
def test_foreign_arrays_are_refused(text: object) -> None:
    with pytest.raises(BadRequest):
        text_to_array(text, (1, 2, 2), "gen_args.mask_input")


# Jobs


def test_a_job_shares_its_steps_and_stops_when_told() -> None:
    with MemoryFile() as shared:
        shared.write(bytes(12))
        job = attach(shared.descriptor)
        job.report(3, 20)
        assert struct.unpack("<III", shared.read()) == (3, 20, 0)
        os.pwrite(shared.descriptor, struct.pack("<I", 1), 8)
        with pytest.raises(Cancelled):
            job.report(4, 20)
        assert struct.unpack("<III", shared.read()) == (4, 20, 1)


def test_without_a_gateway_nothing_is_shared() -> None:
    SharedProgress().report(1, 2)
