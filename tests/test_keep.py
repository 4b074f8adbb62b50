"""Results that are kept, and patches: both are the whole result, bit for bit."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import HandlerClient, HandlerReply, encoded, pixels
from fakes import FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_exactness import Editor, editor, joined, lama, negative, requests

from contract import commands
from handlers.pictures import decoding, encoding
from handlers.pictures.containers import PNG_OF_JPEG
from handlers.pictures.picture import Picture
from handlers.pictures.png import write_png
from handlers.pictures.tiff import write_tiff

__all__ = ["editor", "lama"]

JSON = {"accept": "application/json"}


@pytest.fixture
def sd(open_handler: Callable[[str], HandlerClient]) -> Iterator[Editor]:
    """Paints another grey in each run."""
    with pytest.MonkeyPatch.context() as patch:
        editor = Editor(open_handler("sd"), "sd", patch)
        editor.paint = lambda rgb, mask: np.full_like(rgb, editor.runs)
        yield editor


def ask(
    editor: Editor, image: bytes, mask: np.ndarray, accept: str = "image/*", keep: bool = True, **gen_args: Any
) -> HandlerReply:
    hole = encoded(mask.astype(np.uint8) * 255)
    fields = {"image": image, "mask_image": hole, "prompt": "", "gen_args": gen_args | editor._quick()}
    reply = editor.client.ask(fields, accept, keep=keep)
    assert reply.status == 200, reply.body
    return reply


def pasted(below: np.ndarray, patch: bytes, box: list[int]) -> np.ndarray:
    result, (left, top, right, bottom) = below.copy(), box
    result[top:bottom, left:right] = joined(decoding.decode_picture(patch))
    return result


def oriented(orientation: int) -> tuple[bytes, bytes]:
    exif = Image.Exif()
    exif[0x112] = orientation
    return b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")


def hole_in(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape[:2], bool)
    top, left = rng.integers(0, shape[0] - 12), rng.integers(0, shape[1] - 12)
    mask[top : top + 12, left : left + 12] = True
    return mask


# What the handlers make


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(requests(), st.integers(0, 5), st.integers(1, 8))
def test_a_patch_in_the_upright_input_is_the_whole_result_and_so_is_what_is_kept(
    editor: Editor, request_: tuple[np.ndarray, np.ndarray], feather: int, orientation: int
) -> None:
    array, mask = request_
    mask = mask.T if orientation >= 5 else mask
    data = write_png(array, [oriented(orientation)])
    upright = joined(decoding.decode_picture(data))
    editor.paint = negative
    whole = ask(editor, data, mask, feather=feather)
    patch = ask(editor, data, mask, "image/png", feather=feather, result="patch")
    box = json.loads(patch.headers["x-palimpsest-box"])
    result = joined(decoding.decode_picture(whole.body))
    assert result.dtype == joined(decoding.decode_picture(patch.body)).dtype == array.dtype
    assert np.array_equal(pasted(upright, patch.body, box), result)
    assert [whole.body] == whole.kept["id"] == patch.kept["id"]
    assert "x-palimpsest-box" not in whole.headers


def test_a_patch_is_no_larger_than_the_mask_and_says_only_what_its_colours_mean(editor: Editor) -> None:
    mask = np.zeros((90, 120), bool)
    mask[20:30, 50:65] = True
    exif = Image.Exif()
    exif[0x10F] = "a maker"
    data = encoded(np.full((90, 120, 3), 90, np.uint8), "PNG", exif=exif, icc_profile=bytes(200))
    editor.paint = negative
    reply = ask(editor, data, mask, "image/png", result="patch")
    assert json.loads(reply.headers["x-palimpsest-box"]) == [50, 20, 65, 30]
    said = decoding.decode_picture(reply.body)
    assert said.size == (15, 10)
    assert said.metadata.icc == bytes(200)
    assert not said.metadata.exif
    assert decoding.decode_picture(reply.kept["id"][0]).metadata.exif


@pytest.mark.parametrize("result", ["full", "patch"])
def test_each_variant_is_kept_and_all_patches_have_one_box(sd: Editor, result: str) -> None:
    image, mask = np.random.default_rng(1).integers(0, 256, (64, 80, 3), np.uint8), hole_in((64, 80))
    arguments = {"variants": 2, "output_format": "input"}
    whole = ask(sd, write_png(image), mask, "", keep=False, **arguments)
    sd.runs = 0
    reply = ask(sd, write_png(image), mask, "", result=result, **arguments)
    assert (whole.kept, len(reply.kept["ids"])) == ({}, 2)
    assert reply.kept["ids"] == [base64.b64decode(each) for each in whole.fields["variants"]]
    assert reply.kept["id"] == reply.kept["ids"][:1]
    shown = [base64.b64decode(each) for each in reply.fields["variants"]]
    if result == "patch":
        shown = [encoded(pasted(image, each, reply.fields["box"])) for each in shown]
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(shown, reply.kept["ids"], strict=True))
    assert not np.array_equal(pixels(shown[0]), pixels(shown[1]))


def test_the_mask_and_its_candidates_are_kept(open_handler: Callable[[str], HandlerClient], dog: bytes) -> None:
    arguments = {"point_coords": [[750, 500]], "point_labels": [1], "masks": "all"}
    reply = open_handler("sam").ask({"image": dog, "gen_args": arguments}, keep=True)
    assert reply.kept["ids"] == [base64.b64decode(each) for each in reply.fields["masks"]]
    assert reply.kept["id"] == [base64.b64decode(reply.fields["generated_image"])]
    alone = open_handler("sam").ask({"image": dog, "gen_args": arguments}, "image/png", keep=True)
    assert alone.kept == {"id": [alone.body]}


def jpeg_file() -> bytes:
    exif = Image.Exif()
    exif[0x10F], exif[0x112] = "a maker", 6
    array = np.random.default_rng(2).integers(0, 256, (40, 56, 3), np.uint8)
    options = {"quality": 77, "subsampling": 2, "dpi": (72, 72), "comment": b"hello", "icc_profile": bytes(300)}
    return encoded(array, "JPEG", exif=exif, **options)


def files() -> dict[str, bytes]:
    rng = np.random.default_rng(5)
    deep = rng.integers(0, 65536, (56, 40, 4), np.uint16)
    return {
        "image/png": write_png(deep),
        "image/tiff": write_tiff(deep[..., :3]),
        "image/webp": encoded(rng.integers(0, 256, (56, 40, 4), np.uint8), "WEBP", quality=70),
        "image/jpeg": jpeg_file(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", files())
def test_ten_edits_leave_every_sample_outside_their_masks_as_it_was(editor: Editor, kind: str) -> None:
    """Each with what the one before kept; whatever they show meanwhile."""
    first = data = files()[kind]
    before = decoding.decode_picture(first)
    touched = np.zeros(joined(before).shape[:2], bool)
    editor.paint = negative
    for index in range(10):
        mask = hole_in(touched.shape, index)
        touched |= mask
        shown, result = [("image/*", "full"), ("image/jpeg", "patch"), ("image/png", "full")][index % 3]
        (data,) = ask(editor, data, mask, shown, result=result, feather=2).kept["id"]
    after = decoding.decode_picture(data)
    assert joined(after).dtype == joined(before).dtype
    assert np.array_equal(joined(after)[~touched], joined(before)[~touched])
    assert not np.array_equal(joined(after), joined(before))
    # What leaves in the input's own format in the end is as if nothing had been coded in between.
    editor.paint = lambda rgb, mask: rgb
    last = ask(editor, data, touched, "image/*", keep=False)
    assert last.headers["content-type"] == kind
    assert json.loads(last.headers["x-palimpsest-warnings"]) == []
    assert last.body == encoding.encode_picture(before._replace(samples=after.samples), kind)


def test_what_stands_for_a_jpeg_is_the_jpeg_without_its_losses(lama: Editor) -> None:
    lama.paint = negative
    mask = hole_in((56, 40))
    reply = ask(lama, jpeg_file(), mask)
    assert reply.headers["content-type"] == "image/jpeg"
    (kept,) = reply.kept["id"]
    assert kept.startswith(b"\x89PNG")
    assert encoding.encode_picture(decoding.decode_picture(kept), "image/jpeg") == reply.body
    assert pixels(kept).shape == (56, 40, 3)  # a PNG to everybody else


@pytest.mark.parametrize("body", [b"", b"no jpeg", b"\xff\xd8\xff", jpeg_file()[:300], jpeg_file() + b"more"])
def test_a_chunk_that_says_it_stands_for_a_jpeg_is_believed_no_more_than_a_jpeg(body: bytes) -> None:
    array = np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8)
    picture = decoding.decode_picture(write_png(array, [(PNG_OF_JPEG, body)]))
    upright = {(9, 7): array, (7, 9): np.rot90(array, -1)}[picture.samples.shape[:2]]
    assert np.array_equal(picture.samples, upright)
    assert encoding.encode_picture(picture, picture.metadata.content_type)


# What the gateway tells and keeps


@pytest.fixture
def served(
    lama: Editor,
    sd: Editor,
    open_handler: Callable[[str], HandlerClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., TestClient]]:
    """The gateway in front of handlers in this process; options are the application's."""
    monkeypatch.setenv("PALIMPSEST_COMMAND_KEY", "the-key")
    lama.paint = negative
    fake = FakeTorchServe()
    for name in ("sam", "lama", "sd"):
        fake.replies[f"POST /predictions/p.{name}"] = answering(open_handler(name))
    running = []

    def start(**options: Any) -> TestClient:
        running.append(gateway(fake, make_store(tmp_path / "store", "sam", "lama", "sd", ours=True), **options))
        return running[-1].__enter__()

    yield start
    for each in running:
        each.__exit__(None, None, None)


def answering(client: HandlerClient) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        command = {commands.COMMAND: request.headers[commands.COMMAND], commands.KEY: "the-key"}
        reply = client.send({"body": request.content}, request.headers.get("accept", ""), **command)
        return httpx.Response(reply.status, content=reply.body, headers={"content-type": "application/json"})

    return answer


def kept(client: TestClient, name: str) -> bytes:
    found = client.app.state.services.images.find(name)  # type: ignore[attr-defined]
    assert found is not None
    with found as file:
        return file.read()


def post(client: TestClient, edit: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    files = {name: value for name, value in fields.items() if isinstance(value, bytes)}
    data = {name: str(value) for name, value in fields.items() if name not in files}
    answer = client.post(f"/v1/{edit}", files=files, data=data, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.fixture
def mask(image: np.ndarray) -> bytes:
    return encoded(hole_in(image.shape).astype(np.uint8) * 255)


def test_a_chain_of_edits_uploads_nothing_again(served: Any, image: np.ndarray, mask: bytes) -> None:
    client = served()
    name = client.post("/v1/images", files={"image": write_png(image)}).json()["id"]
    hole = client.post("/v1/images", files={"image": mask}).json()["id"]
    whole = post(client, "erase", image=name, mask=hole, keep=True)
    first = whole.headers["x-palimpsest-id"]
    assert kept(client, first) == whole.content
    patch = post(client, "erase", JSON, image=first, mask=hole, keep=True, result="patch").json()
    assert np.array_equal(pixels(kept(client, patch["id"])), image)  # the negative's negative
    assert np.array_equal(pasted(image, base64.b64decode(patch["picture"]), patch["box"]), image)
    assert "ids" not in patch
    assert "keep" in patch["timings"]
    plain = post(client, "erase", JSON, image=first, mask=hole).json()
    assert {"id", "box"} & set(plain) == set()
    assert base64.b64decode(plain["picture"]) == kept(client, patch["id"])
    events = post(client, "erase", {"accept": "text/event-stream"}, image=first, mask=hole, keep=True, result="patch")
    done = json.loads(events.text.partition("event: done\ndata: ")[2])
    assert (done["id"], done["box"]) == (patch["id"], patch["box"])


def test_variants_have_an_id_each_in_their_order(served: Any, image: np.ndarray, mask: bytes) -> None:
    client = served()
    fields = {"image": write_png(image), "mask": mask, "prompt": "red", "steps": 1, "seed": 3, "variants": 2}
    reply = post(client, "replace", JSON, **fields, keep=True).json()
    assert [kept(client, name) for name in reply["ids"]] == [base64.b64decode(each) for each in reply["pictures"]]
    assert reply["id"] == reply["ids"][0] != reply["ids"][1]


def test_a_kept_mask_says_what_to_erase(served: Any, dog: bytes) -> None:
    client = served()
    name = client.post("/v1/images", files={"image": dog}).json()["id"]
    fields = {"image": name, "points": "[[750, 500]]", "keep": True}
    reply = post(client, "segment", **fields, masks="all").json()
    assert kept(client, reply["id"]) == base64.b64decode(reply["mask"])
    assert [kept(client, each) for each in reply["ids"]] == [base64.b64decode(each) for each in reply["masks"]]
    assert post(client, "segment", {"accept": "image/png"}, **fields).headers["x-palimpsest-id"] == reply["id"]
    by_mask = post(client, "erase", image=name, mask=reply["id"], result="patch")
    assert json.loads(by_mask.headers["x-palimpsest-box"]) == reply["box"]
    assert by_mask.content == post(client, "erase", image=name, points="[[750, 500]]", result="patch").content


@pytest.mark.parametrize(
    ("asked", "accept", "kind"),
    [
        ({}, "*/*", "image/png"),
        ({}, "image/webp", "image/webp"),
        ({"format": "input"}, "*/*", "image/jpeg"),
        ({"format": "tiff"}, "*/*", "image/tiff"),
        ({}, "application/json", "image/png"),
        ({"format": "input"}, "application/json", "image/jpeg"),
    ],
)
def test_a_patch_is_a_png_unless_asked_otherwise(served: Any, asked: dict[str, str], accept: str, kind: str) -> None:
    mask = encoded(hole_in((56, 40)).astype(np.uint8) * 255)
    reply = post(served(), "erase", {"accept": accept}, image=jpeg_file(), mask=mask, result="patch", **asked)
    is_json = accept == "application/json"
    assert (reply.json()["content_type"] if is_json else reply.headers["content-type"]) == kind
    picture = decoding.decode_picture(base64.b64decode(reply.json()["picture"]) if is_json else reply.content)
    assert isinstance(picture, Picture)
    assert picture.size == (12, 12)


@pytest.mark.parametrize(
    ("ours", "asked"),
    [({"lama", "sam", "sd"}, "lama"), ({"sam", "sd"}, "sam"), ({"sd"}, "sd"), (set(), None)],
)
def test_a_kept_picture_is_written_by_the_smallest_worker_that_can(
    open_handler: Callable[[str], HandlerClient],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ours: set[str],
    asked: str | None,
) -> None:
    monkeypatch.setenv(commands.KEY_VARIABLE, "the-key")
    fake = FakeTorchServe()
    for name in ("lama", "sam", "sd"):
        fake.replies[f"POST /predictions/p.{name}"] = answering(open_handler(name))
        make_store(tmp_path, name, ours=name in ours)
    with gateway(fake, tmp_path) as client:
        name = client.post("/v1/images", files={"image": jpeg_file()}).json()["id"]
        answer = client.get(f"/v1/images/{name}", params={"format": "tiff"})
        predictions = [path for path in fake.paths() if "predictions" in path]
    assert predictions == ([f"POST /predictions/p.{asked}"] if asked else [])
    if asked:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/tiff")
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg_file()))))
        assert np.abs(pixels(answer.content).astype(int) - upright).max() <= 2
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_result_larger_than_all_that_may_be_kept_is_refused(served: Any, mask: bytes) -> None:
    noise = np.random.default_rng(9).integers(0, 256, (700, 700, 3), np.uint8)
    client = served(images_mib=1)
    fields = {"image": write_png(noise), "mask": encoded(hole_in(noise.shape).astype(np.uint8) * 255)}
    refused = client.post("/v1/erase", files=fields, data={"keep": "true"})
    error = refused.json()["error"]
    assert (refused.status_code, error["field"]) == (413, "keep")
    assert "PALIMPSEST_IMAGES_MIB" in error["message"]
    assert client.post("/v1/erase", files=fields, data={"result": "patch"}).status_code == 200


@pytest.mark.parametrize(
    ("edit", "fields", "field"),
    [
        ("erase", {"result": "patch"}, "result"),
        ("erase", {"keep": "true"}, "keep"),
        ("segment", {"keep": "true", "points": "[[1, 2]]"}, "keep"),
        ("erase", {"result": "half"}, "result"),
        ("segment", {"result": "patch", "points": "[[1, 2]]"}, "result"),
        ("segment", {"hover": "x" * 65, "points": "[[1, 2]]"}, "hover"),
        ("erase", {"hover": "x"}, "hover"),
    ],
)
def test_what_could_have_no_effect_is_refused_before_any_model_is_asked(
    tmp_path: Path, edit: str, fields: dict[str, str], field: str
) -> None:
    """Archives of another make keep nothing and know no patches."""
    fake = FakeTorchServe()
    mask = {"mask": b"\x89PNG a mask"} if edit == "erase" else {}
    with gateway(fake, make_store(tmp_path, "sam", "lama")) as client:
        answer = client.post(f"/v1/{edit}", files={"image": b"\x89PNG a picture"} | mask, data=fields)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    assert not [call for call in fake.calls if "/predictions/" in call.url.path]
