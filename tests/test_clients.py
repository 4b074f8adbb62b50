"""What other people's clients send, byte for byte, over a real connection.

data/clients/*.http were recorded between each client and a running server: code that openapi-generator (generator-*;
"multipart" from a document without the JSON bodies) and openapi-python-client made from its document, the page /docs in
Chromium (swagger-ui-*), curl, Go's mime/multipart, Node's fetch, axios, requests, httpx and aiohttp. Those of .NET,
OkHttp, Apache's HttpClient, Postman and a browser's own form are written by hand as these send them.
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import door
import httpx
import pytest
from fakes import FakeTorchServe, make_store
from test_edit import arguments, handler, parts

from handlers.requests.payload import Request
from handlers.sam import description as sam

FOLDER = Path(__file__).parent / "data" / "clients"
RECORDED = sorted(path.stem for path in FOLDER.glob("*.http"))
PICTURE, MASK = (FOLDER / "picture.png").read_bytes(), (FOLDER / "mask.png").read_bytes()

SHAPE = {"dilate": 0, "erode": 0, "fill_holes": False, "invert": False, "smooth": 0}
SEGMENT = SHAPE | {"masks": "best", "return_logits": False}
POINT = {"point_coords": [[30, 24]], "point_labels": [1]}
POINTS = {"point_coords": [[30, 24], [5, 5]], "point_labels": [1, 0]}
BOX = {"box": [20, 12, 44.5, 36]}
REPLACE = {
    "quality": "standard", "num_inference_steps": 1, "strength": 1, "seed": 5, "variants": 1, "embed_parameters": False,
    "feather": 0,
}  # fmt: skip

SEGMENTED: dict[str, dict[str, Any]] = {
    "aiohttp-form": POINTS | {"dilate": 2},
    "apache-httpclient-segment": POINTS,
    "axios-form-data": POINTS | {"dilate": 2},
    "axios-postForm": POINTS | BOX | {"fill_holes": True},
    "axios-postForm-indexes": POINTS | BOX,
    "axios-postForm-json": POINTS | BOX,
    "axios-postForm-json-plain": POINTS,
    "axios-postForm-no-indexes": POINTS | BOX,
    "axios-urlencoded": POINT,
    "curl-F": POINTS | {"dilate": 2},
    "curl-F-content": BOX,
    "curl-F-headers": POINTS,
    "curl-F-typed": POINTS | {"fill_holes": True},
    "curl-chunked": POINT,
    "curl-d": POINTS,
    "curl-data-urlencode": POINTS,
    "curl-expect": POINT,
    "curl-http10": POINT,
    "dotnet-json-part": POINTS,
    "dotnet-segment": POINTS | {"fill_holes": True},
    "fetch-json": POINT,
    "fetch-segment-blob": POINTS | {"dilate": 2},
    "fetch-segment-box": BOX,
    "generator-py-multipart-segment-box": BOX | {"return_logits": True},
    "generator-py-multipart-segment-points": POINTS | {"dilate": 2, "fill_holes": True},
    "generator-py-multipart-segment-points-id": POINTS,
    "generator-py-segment-box": BOX | {"dilate": 2, "fill_holes": True, "masks": "all"},
    "generator-py-segment-points": POINTS,
    "generator-ts-axios-multipart-segment": POINTS | BOX | {"dilate": 2, "fill_holes": True},
    "generator-ts-axios-segment-points": POINTS,
    "generator-ts-fetch-multipart-segment-box": BOX,
    "generator-ts-fetch-multipart-segment-points": POINTS | {"dilate": 2, "fill_holes": True, "return_logits": True},
    "generator-ts-fetch-segment-box": BOX | {"fill_holes": True, "masks": "all"},
    "generator-ts-fetch-segment-points": POINTS,
    "go-multipart": POINTS | {"dilate": 2},
    "httpx-repeated": BOX | {"fill_holes": True},
    "okhttp-segment": POINTS,
    "openapi-python-client-segment": POINTS | BOX,
    "openapi-python-client-segment-json": POINT,
    "postman-segment": POINTS | {"dilate": 2},
    "requests-files": POINTS | {"dilate": 2, "fill_holes": True},
    "requests-repeated": POINTS | BOX,
    "requests-urlencoded": POINTS,
    "swagger-ui-segment-box": BOX | {"fill_holes": True, "masks": "all"},
    "swagger-ui-segment-json": POINT,
    "swagger-ui-segment-png": POINT,
    "swagger-ui-segment-points": POINTS,
}
"""Of those to /v1/segment what SAM is asked."""

PAINTED: dict[str, dict[str, Any] | None] = dict.fromkeys(
    [
        "aiohttp-erase", "curl-F-stdin", "dotnet-erase", "fetch-erase", "generator-py-erase",
        "generator-py-multipart-erase", "generator-ts-axios-erase", "generator-ts-fetch-erase-json", "go-parts-chunked",
        "httpx-files", "openapi-python-client-erase", "requests-json", "swagger-ui-erase", "swagger-ui-erase-png",
        "swagger-ui-replace",
    ],
    None,
) | {
    "generator-py-erase-click": POINT | {"dilate": 2},
    "generator-py-replace": {"box": [20, 12, 44, 36]},
    "generator-ts-fetch-multipart-replace-json": {"box": [20, 12, 44, 36]},
    "generator-ts-fetch-replace-json": POINT,
    "html-form-erase": POINTS,
    "openapi-python-client-replace": POINT,
    "swagger-ui-erase-click": POINT | {"dilate": 2},
    "swagger-ui-replace-guidance": {"box": [20, 12, 44, 36]},
}  # fmt: skip
"""Of those to /v1/erase and /v1/replace what SAM is asked for the mask; None: they send one."""

REPLACED: dict[str, dict[str, Any]] = {
    "generator-py-replace": {"guidance_scale": 3.5, "scheduler": "ddim", "variants": 2},
    "generator-ts-fetch-multipart-replace-json": {"guidance_scale": 3.5},
    "generator-ts-fetch-replace-json": {"variants": 2},
    "openapi-python-client-replace": {"guidance_scale": 3.5},
    "swagger-ui-replace": {},
    "swagger-ui-replace-guidance": {"guidance_scale": 3.5, "scheduler": "euler", "seed": -1},
}
"""Of those to /v1/replace what the painter is asked."""

UPLOADS = [name for name in RECORDED if "upload" in name] + ["curl-data-binary", "fetch-stream", "requests-stream"]
MODELS = [name for name in RECORDED if "-model" in name]
PREDICTED = [name for name in RECORDED if "predict" in name] + ["curl-T"]


@pytest.fixture(scope="module")
def fake() -> FakeTorchServe:
    fake = FakeTorchServe()
    for name in ("sam", "lama", "sd", "demo--sam"):
        fake.replies[f"POST /predictions/p.{name}"] = handler(seed=7)
    return fake


@pytest.fixture(scope="module")
def server(fake: FakeTorchServe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[door.Server]:
    store = make_store(tmp_path_factory.mktemp("store"), "sam", "lama", "sd", "demo/sam")
    with door.serving(fake, store) as running:
        assert running.send(door.post("/v1/images", PICTURE)).status == 201  # some name it by its id
        yield running


def asked(server: door.Server, fake: FakeTorchServe, name: str) -> list[httpx.Request]:
    """Sends what was recorded; returns what the models got."""
    fake.calls.clear()
    answer = server.send((FOLDER / f"{name}.http").read_bytes())
    assert answer.status in (200, 201), answer.body
    return [call for call in fake.calls if "/predictions/" in call.url.path]


def picture(call: httpx.Request, name: str = "image") -> bytes:
    sent = parts(call)[name]
    return sent if sent.startswith(b"\x89PNG") else base64.b64decode(sent)


def test_every_recorded_request_is_in_one_of_these_tests() -> None:
    assert sorted([*SEGMENTED, *PAINTED, *UPLOADS, *MODELS, *PREDICTED]) == RECORDED
    assert set(REPLACED) == {name for name in PAINTED if "replace" in name}


@pytest.mark.parametrize("name", SEGMENTED)
def test_segment(server: door.Server, fake: FakeTorchServe, name: str) -> None:
    (call,) = asked(server, fake, name)
    assert picture(call) == PICTURE
    assert arguments(call) == SEGMENT | SEGMENTED[name]


@pytest.mark.parametrize("name", PAINTED)
def test_erase_and_replace(server: door.Server, fake: FakeTorchServe, name: str) -> None:
    *before, call = asked(server, fake, name)
    if PAINTED[name] is None:
        assert (before, picture(call, "mask_image")) == ([], MASK)
    else:
        assert [arguments(each) for each in before] == [SHAPE | (PAINTED[name] or {})]
    assert picture(call) == PICTURE
    got = {key: value for key, value in arguments(call).items() if key != "output_format"}
    assert got == (REPLACE | REPLACED[name] if name in REPLACED else {"feather": 3 if name == "httpx-files" else 0})
    if name in REPLACED:
        assert parts(call)["prompt"].decode() == "a cät"


@pytest.mark.parametrize("name", UPLOADS)
def test_uploads(server: door.Server, fake: FakeTorchServe, name: str) -> None:
    assert asked(server, fake, name) == []


@pytest.mark.parametrize("name", MODELS)
def test_models(server: door.Server, fake: FakeTorchServe, name: str) -> None:
    assert asked(server, fake, name) == []


@pytest.mark.parametrize("name", PREDICTED)
def test_predictions(server: door.Server, fake: FakeTorchServe, name: str) -> None:
    (call,) = asked(server, fake, name)
    request = Request.read(call.headers.get("content-type", ""), "", call.content)
    assert request.picture("image").size == (64, 48)
    assert request.arguments().structure(sam.POINTS) in ([30, 24], [[30, 24]])
