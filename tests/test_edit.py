"""The editing API on a TorchServe that is a function: what it takes, asks the models and refuses, and how."""

import base64
import json
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import OWN_ERROR, FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient

from serve.gateway.edit import images as images_module
from serve.gateway.edit.fields import EraseFields, ReplaceFields, SegmentFields
from serve.gateway.edit.images import Images, UnknownImage
from serve.memory_file import MemoryFile, Part, whole

IMAGE, MASK = b"\x89PNG the picture", b"\x89PNG the mask"
CLICK = {"image": "aGVsbG8=", "points": [[5, 6]]}
EDITS = {"segment": {}, "erase": {}, "replace": {"prompt": "a cat"}}


def parts(request: httpx.Request) -> dict[str, bytes]:
    """The multipart fields that a handler got."""
    head = b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n"
    message = BytesParser().parsebytes(head + request.content)
    return {
        part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
        for part in message.get_payload()
    }  # type: ignore[union-attr, misc]


def arguments(request: httpx.Request) -> dict[str, Any]:
    return dict(json.loads(parts(request)["gen_args"]))


def handler(**fields: Any) -> Callable[[httpx.Request], httpx.Response]:
    """Answers in JSON or as a picture, as a handler does."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.headers["accept"] == "application/json":
            picture = {"generated_image": base64.b64encode(b"out").decode(), "content_type": "image/png"}
            return httpx.Response(200, json=picture | {"warnings": []} | fields)
        return httpx.Response(200, content=MASK, headers={"content-type": "image/png", "x-palimpsest-seed": "7"})

    return answer


@pytest.fixture
def fake() -> FakeTorchServe:
    fake = FakeTorchServe()
    for name in ("sam", "lama", "sd"):
        fake.replies[f"POST /predictions/p.{name}"] = handler(seed=7)
    return fake


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, "sam", "lama", "sd", "team/own")


@pytest.fixture
def client(fake: FakeTorchServe, store: Path) -> Iterator[TestClient]:
    with gateway(fake, store) as running:
        yield running


def asked(fake: FakeTorchServe) -> list[httpx.Request]:
    return [call for call in fake.calls if "/predictions/" in call.url.path]


def problem(answer: httpx.Response) -> tuple[int, str | None, str]:
    error = answer.json()["error"]
    return answer.status_code, error.get("field"), error["message"]


# What the models are asked


def test_segment_asks_for_the_mask_of_points_and_box(client: TestClient, fake: FakeTorchServe) -> None:
    fields = {
        "image": "aGVsbG8=", "points": [[5, 6], [7, 8, 0]], "box": [1, 2, 30, 40], "dilate": 3, "erode": 1,
        "fill_holes": True, "invert": True, "smooth": 2, "masks": "all", "logits": "abc", "return_logits": True,
    }  # fmt: skip
    assert client.post("/v1/segment", json=fields).json()["mask"] == base64.b64encode(b"out").decode()
    (call,) = asked(fake)
    assert parts(call)["image"] == b"aGVsbG8="
    assert arguments(call) == {
        "point_coords": [[5, 6], [7, 8]], "point_labels": [1, 0], "box": [1, 2, 30, 40], "dilate": 3, "erode": 1,
        "fill_holes": True, "invert": True, "smooth": 2, "masks": "all", "mask_input": "abc", "return_logits": True,
    }  # fmt: skip


def test_erase_passes_on_a_quality_that_is_asked_for(client: TestClient, fake: FakeTorchServe) -> None:
    for asked_for, passed_on in ({"quality": "best"}, {"quality": "best"}), ({"quality": "standard"}, {}), ({}, {}):
        client.post("/v1/erase", json={"image": "aGVsbG8=", "mask": "bWFzaw==", "feather": 3} | asked_for)
        assert arguments(asked(fake)[-1]) == {"feather": 3} | passed_on
    refused = problem(client.post("/v1/erase", json={"image": "aGVsbG8=", "mask": "bWFzaw==", "quality": "draft"}))
    assert refused[:2] == (400, "quality")
    assert "standard" in refused[2]


def test_replace_passes_on_everything(client: TestClient, fake: FakeTorchServe) -> None:
    fields = {
        "image": "aGVsbG8=", "mask": "bWFzaw==", "prompt": "a cat", "negative_prompt": "blur", "steps": 9,
        "guidance": 3.5, "strength": 0.5, "seed": 2**63 - 1, "scheduler": "euler_a", "variants": 2, "feather": 4,
        "embed_parameters": True, "format": "webp", "quality": "best",
    }  # fmt: skip
    reply = client.post("/v1/replace", json=fields, headers={"accept": "application/json"})
    assert reply.json()["seed"] == 7
    (call,) = asked(fake)
    assert {name: parts(call)[name] for name in ("mask_image", "prompt", "negative_prompt")} == {
        "mask_image": b"bWFzaw==", "prompt": b"a cat", "negative_prompt": b"blur",
    }  # fmt: skip
    assert arguments(call) == {
        "num_inference_steps": 9, "guidance_scale": 3.5, "strength": 0.5, "seed": 2**63 - 1, "scheduler": "euler_a",
        "variants": 2, "feather": 4, "embed_parameters": True, "output_format": "webp", "quality": "best",
    }  # fmt: skip


def test_what_the_quality_decides_is_left_to_it(client: TestClient, fake: FakeTorchServe) -> None:
    fields = {"image": "aGVsbG8=", "mask": "bWFzaw==", "prompt": "a cat", "quality": "draft"}
    assert client.post("/v1/replace", json=fields).status_code == 200
    (call,) = asked(fake)
    assert arguments(call)["quality"] == "draft"
    assert not {"num_inference_steps", "scheduler"} & set(arguments(call))
    status, field, message = problem(client.post("/v1/replace", json=fields | {"quality": "high"}))
    assert (status, field) == (400, "quality")
    assert "draft" in message


def test_a_click_is_enough_to_erase(client: TestClient, fake: FakeTorchServe) -> None:
    answer = client.post(
        "/v1/erase", files={"image": IMAGE}, data={"points": "[[5, 6]]", "dilate": "4"},
        headers={"accept": "application/json"},
    )  # fmt: skip
    assert answer.json()["mask"] == base64.b64encode(MASK).decode()
    first, second = asked(fake)
    assert fake.paths().index("POST /predictions/p.sam") < fake.paths().index("POST /predictions/p.lama")
    assert parts(first)["image"] == parts(second)["image"] == IMAGE
    assert arguments(first)["dilate"] == 4
    assert parts(second)["mask_image"] == MASK


def test_where_nothing_is_found_the_points_are_at_fault(client: TestClient, fake: FakeTorchServe) -> None:
    empty = {"content-type": "image/png", "x-palimpsest-area": "0"}
    fake.replies["POST /predictions/p.sam"] = httpx.Response(200, content=MASK, headers=empty)
    status, field, message = problem(client.post("/v1/erase", json=CLICK))
    assert (status, field) == (400, "points")
    assert "nothing was found" in message
    assert len(asked(fake)) == 1  # nobody is asked to erase nothing


def test_another_archive_can_be_asked(client: TestClient, fake: FakeTorchServe) -> None:
    fake.replies["POST /predictions/p.team--own"] = handler()
    assert client.post("/v1/segment", json=CLICK | {"model": "team/own"}).status_code == 200
    assert client.post("/v1/segment", json=CLICK | {"model": "none"}).status_code == 404
    assert problem(client.post("/v1/segment", json=CLICK | {"model": "../x"}))[:2] == (400, "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accept", "wanted", "kind"),
    [
        (None, "image/*", "image/png"),
        ("*/*", "image/*", "image/png"),
        ("image/webp", "image/webp", "image/png"),
        ("text/html, application/json;q=0.5, image/jpeg;q=0.9", "image/jpeg", "image/png"),
        ("application/json", "application/json", "application/json"),
        ("image/png;q=0, application/json;q=0.1", "application/json", "application/json"),
        ("image/webp;q=1..2, image/jpeg;q=x, image/png;q=0.2", "image/png", "image/png"),
    ],
)
def test_accept_says_what_comes_back(
    client: TestClient, fake: FakeTorchServe, accept: str | None, wanted: str, kind: str
) -> None:
    headers = {"accept": accept} if accept else {"accept": ""}
    answer = client.post("/v1/erase", json={"image": "aGVsbG8=", "mask": "bWFzaw=="}, headers=headers)
    assert asked(fake)[-1].headers["accept"] == wanted
    assert answer.headers["content-type"] == kind
    if kind == "image/png":
        assert answer.headers["x-palimpsest-seed"] == "7"


def test_the_format_field_wins_over_accept(client: TestClient, fake: FakeTorchServe) -> None:
    fields = {"image": "aGVsbG8=", "mask": "bWFzaw=="}
    for form, wanted in (("jpeg", "image/jpeg"), ("input", "image/*")):
        client.post("/v1/erase", json=fields | {"format": form}, headers={"accept": "image/png"})
        assert asked(fake)[-1].headers["accept"] == wanted


# Fields as clients write them


GENERATED = "".join(
    f'--+++\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: text/plain\r\n\r\n{value}\r\n'
    for name, value in [
        ("points", "[[750, 500], [400, 620, 0]]"), ("box", "1"), ("box", "2"), ("box", "3.5"), ("box", "4"),
        ("dilate", "3"), ("erode", "0"), ("fill_holes", "True"), ("invert", "False"), ("smooth", "0"),
        ("masks", "best"), ("return_logits", "False"), ("model", "sam"),
    ]
)  # fmt: skip
"""What code that openapi-python-client made from this server's document sends."""


def test_a_generated_clients_request_is_served(client: TestClient, fake: FakeTorchServe) -> None:
    file = '--+++\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = file.encode() + IMAGE + b"\r\n" + GENERATED.encode() + b"--+++--\r\n"
    answer = client.post("/v1/segment", content=body, headers={"content-type": "multipart/form-data; boundary=+++"})
    assert answer.status_code == 200, answer.text
    (call,) = asked(fake)
    assert parts(call)["image"] == IMAGE
    assert arguments(call) == {
        "point_coords": [[750, 500], [400, 620]], "point_labels": [1, 0], "box": [1, 2, 3.5, 4], "dilate": 3,
        "erode": 0, "fill_holes": True, "invert": False, "smooth": 0, "masks": "best", "return_logits": False,
    }  # fmt: skip


def test_a_generated_client_may_send_defaults_beside_a_mask_and_ids_as_files(client: TestClient) -> None:
    image = client.post("/v1/images", files={"image": IMAGE}).json()["id"]
    files = {"image": ("id", image.encode(), "application/octet-stream"), "mask": ("mask.png", MASK)}
    defaults = {"dilate": "0", "erode": "0", "fill_holes": "False", "invert": "False", "smooth": "0"}
    answer = client.post("/v1/erase", files=files, data=defaults)
    assert answer.status_code == 200, answer.text


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_a_form_as_pages_fill_it_in_from_the_document_is_served(
    client: TestClient, fake: FakeTorchServe, edit: str
) -> None:
    """As Swagger UI does: with every example or default, and an empty part for a file that nobody chose."""
    content = client.get("/openapi.json").json()["paths"][f"/v1/{edit}"]["post"]["requestBody"]["content"]
    form, example = content["multipart/form-data"]["schema"], content["application/json"]["example"]
    filled = {
        name: schema.get("examples", [schema.get("default", "")])[0] for name, schema in form["properties"].items()
    }
    data = {name: "" if value == [] else str(value) for name, value in filled.items() if name != "image"}
    answer = client.post(f"/v1/{edit}", files={"image": IMAGE}, data=data | {"points": "5, 6"})
    assert answer.status_code == 200, answer.text
    least = client.post(f"/v1/{edit}", json=CLICK | EDITS[edit])
    assert least.status_code == 200, least.text
    sent, plain = asked(fake)[: len(asked(fake)) // 2], asked(fake)[len(asked(fake)) // 2 :]
    assert [arguments(call) for call in sent] == [arguments(call) for call in plain]
    assert client.post(f"/v1/{edit}", json=example | {"image": "aGVsbG8="}).status_code == 200


JSON_FILE = "application/json"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "points", "labels"),
    [
        (["[[750, 500], [400, 620, 0]]"], [[750, 500], [400, 620]], [1, 0]),
        (["[750, 500]", "[400, 620, 0]"], [[750, 500], [400, 620]], [1, 0]),
        (["750,500", "400, 620,0"], [[750, 500], [400, 620]], [1, 0]),
        (["[750,500],[400,620,0]"], [[750, 500], [400, 620]], [1, 0]),
        (["750", "500"], [[750, 500]], [1]),
        (["750", "500", "0"], [[750, 500]], [0]),
        (["750", "500", "400", "620.5"], [[750, 500], [400, 620.5]], [1, 1]),
        (["[750, 500]"], [[750, 500]], [1]),
        (["750,500"], [[750, 500]], [1]),
        ([("blob", b"[[750, 500]]", JSON_FILE)], [[750, 500]], [1]),
        ([("blob", b"[750, 500]", JSON_FILE), (None, b"[400, 620, 0]", JSON_FILE)], [[750, 500], [400, 620]], [1, 0]),
        ([("points.json", b"\xef\xbb\xbf[[750, 500]]", "application/octet-stream")], [[750, 500]], [1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["points", "points[]"])
def test_points_in_parts(
    client: TestClient, fake: FakeTorchServe, name: str, sent: list[Any], points: Any, labels: Any
) -> None:
    files = [(name, item if isinstance(item, tuple) else (None, item.encode())) for item in sent]
    answer = client.post("/v1/segment", files=[("image", ("a", IMAGE)), *files])
    assert answer.status_code == 200, answer.text
    assert arguments(asked(fake)[0])["point_coords"] == points
    assert arguments(asked(fake)[0])["point_labels"] == labels


@pytest.mark.parametrize("sent", ["350,200,1000,900", "[350, 200, 1000, 900]", ["350", "200", "1000", "900"]])
@pytest.mark.parametrize("form", ["multipart", "urlencoded"])
def test_a_box_in_parts_and_form_fields(client: TestClient, fake: FakeTorchServe, sent: Any, form: str) -> None:
    image = client.post("/v1/images", files={"image": IMAGE}).json()["id"]
    files = {"files": {"image": (None, image.encode())}} if form == "multipart" else {}
    answer = client.post("/v1/segment", data={"box": sent} | ({} if files else {"image": image}), **files)
    assert answer.status_code == 200, answer.text
    assert arguments(asked(fake)[0])["box"] == [350, 200, 1000, 900]


@pytest.mark.parametrize(
    ("names", "status"),
    [
        (["box[0]", "box[1]", "box[2]", "box[3]"], 200),
        (["box[0]", "box[1]", "box[3]", "box[2]"], 400),
        (["box[1]", "box[2]", "box[3]", "box[4]"], 400),
        (["box[0]", "box[99999999999999999999]", "box[1]", "box[2]"], 400),
        (["points[0][0]", "points[0][1]", "points[1][0]", "points[1][1]"], 200),
        (["points[0][0]", "points[1][0]", "points[0][1]", "points[1][1]"], 400),
        (["points[0][0][0]", "points[0][0][1]", "points[0][1][0]", "points[0][1][1]"], 400),
        (["points[x][0]", "points[x][1]", "points[y][0]", "points[y][1]"], 400),
    ],
)
def test_indices_count_up_from_0(client: TestClient, names: list[str], status: int) -> None:
    answer = client.post("/v1/segment", files={"image": IMAGE}, data=dict(zip(names, "1234", strict=True)))
    assert answer.status_code == status, answer.text
    if status == 400:
        assert problem(answer)[1] in (names[0].partition("[")[0], *names)


@pytest.mark.parametrize(
    "sent", [["1", "2", "3", "4", "5", "6"], ["1,2,3,4,5,6"], ["[[1,2]]", "[[1,2]]"], ["1"], ["a,b"]]
)
def test_points_that_may_be_read_in_two_ways_are_refused(client: TestClient, sent: list[str]) -> None:
    answer = client.post("/v1/segment", files={"image": IMAGE}, data={"points": sent})
    assert problem(answer)[:2] == (400, "points")


def test_whole_numbers_null_and_empty_fields_are_one_rule(client: TestClient, fake: FakeTorchServe) -> None:
    fields = CLICK | {"dilate": 7.0, "erode": None, "invert": None, "box": None, "logits": None, "model": None}
    assert client.post("/v1/segment", json=fields).status_code == 200
    data = {"points": "[[5, 6]]", "dilate": "7.0", "erode": "null", "invert": "", "box": ""}
    assert client.post("/v1/segment", files={"image": IMAGE}, data=data).status_code == 200
    first, second = (arguments(call) for call in asked(fake))
    assert first == second
    assert (first["dilate"], type(first["dilate"]), first["erode"]) == (7, int, 0)


@pytest.mark.parametrize(
    "head", [b'name="image"', b"name=image", b"name=image; filename*=UTF-8''a.png", b'name="image"; filename=""']
)
def test_a_picture_needs_no_file_name(client: TestClient, fake: FakeTorchServe, head: bytes) -> None:
    picture = IMAGE + bytes(100_000)
    body = b"--b\r\ncontent-disposition: form-data; %b\r\n\r\n%b\r\n" % (head, picture)
    body += b'--b\r\nContent-Disposition: form-data; name="points"\r\n\r\n[[5, 6]]\r\n--b--'
    for route, status in (("segment", 200), ("images", 400)):  # which has no points
        answer = client.post(f"/v1/{route}", content=body, headers={"content-type": "MULTIPART/form-data;boundary=b"})
        assert answer.status_code == status, answer.text
    assert parts(asked(fake)[0])["image"] == picture


def test_long_base64_may_have_escapes(client: TestClient, fake: FakeTorchServe) -> None:
    text = "ab/+" * 10_000
    body = json.dumps(CLICK | {"image": text}).replace("/", "\\/").encode("utf-8-sig")
    assert client.post("/v1/segment", content=body).status_code == 200
    assert parts(asked(fake)[0])["image"] == text.encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "status", "field", "words"),
    [
        ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, 415, None, "Content-Encoding"),
        ({"content": b"hello", "headers": {"content-type": "text/plain"}}, 415, None, "content-type"),
        ({"content": b'{"image": "aGVsbG8=", "prompt": "\\ud83d ball"}'}, 400, "prompt", "half of a character"),
        ({"files": {"image": IMAGE, "prompt": (None, b"\xff\xfe")}}, 400, "prompt", "UTF-8"),
        ({"files": {"image": IMAGE, "prompt": ("p.txt", b"\xff\xfe")}}, 400, "prompt", "UTF-8"),
        ({"files": [("image", ("a", IMAGE)), ("image", ("b", IMAGE))]}, 400, "image", "twice"),
        ({"content": b'{"image": "a", "image": "b"}'}, 400, "image", "twice"),
        ({"json": {"image": [0, 5, True], "prompt": ""}}, 400, "image", "image"),
        ({"json": {"image": "aGVsbG8=", "prompt": "x", "points": [[]] * 6000}}, 413, "points", "5000"),
        ({"json": {"image": "aGVsbG8=", "prompt": "x", "points": [["x" * 9000, 1]] * 4000}}, 413, "points", "1 MiB"),
        ({"json": {f"k{i}": 1 for i in range(4000)}}, 400, "k0", "no field"),
        ({"json": {"image": "aGVsbG8=", "prompt": "x" * 200_000}}, 400, "prompt", "10000"),
    ],
)  # fmt: skip
def test_bodies_are_refused_by_the_readers_rules(
    client: TestClient, fake: FakeTorchServe, options: dict[str, Any], status: int, field: str | None, words: str
) -> None:
    answer = client.post("/v1/replace", **options)
    assert problem(answer)[:2] == (status, field)
    assert words in problem(answer)[2]
    assert len(answer.content) < 1500
    assert asked(fake) == []


@pytest.mark.parametrize(
    "options",
    [
        {"content": b"a text", "headers": {"content-type": "image/png"}},
        {"content": b"a text", "headers": {"content-type": "application/octet-stream"}},
        {"files": {"image": ("a.png", b"a text")}},
        {"files": {"image": (None, base64.b64encode(IMAGE))}},
    ],
)
def test_an_upload_is_a_picture(client: TestClient, options: dict[str, Any]) -> None:
    assert problem(client.post("/v1/images", **options))[:2] == (400, "image")


def test_an_upload_may_be_a_body_of_any_type_but_no_compressed_one(client: TestClient) -> None:
    assert client.post("/v1/images", content=IMAGE).status_code == 201
    answer = client.post("/v1/images", content=IMAGE, headers={"content-type": "image/png", "content-encoding": "br"})
    assert problem(answer)[0] == 415


# Uploads


def test_an_upload_stands_for_the_picture_in_every_call(client: TestClient, fake: FakeTorchServe) -> None:
    by_part = client.post("/v1/images", files={"image": IMAGE})
    by_body = client.post("/v1/images", content=IMAGE, headers={"content-type": "image/png"})
    assert by_part.status_code == by_body.status_code == 201
    assert by_part.json() == by_body.json()
    assert (by_part.json()["bytes"], by_part.json()["expires_in"]) == (len(IMAGE), 3600)
    image = by_part.json()["id"]
    mask = client.post("/v1/images", files={"image": MASK}).json()["id"]
    for edit, more in (
        ("segment", {"points": [[1, 2]]}),
        ("erase", {"mask": mask}),
        ("replace", {"mask": mask, "prompt": ""}),
    ):
        assert client.post(f"/v1/{edit}", json={"image": image, **more}).status_code == 200
        assert parts(asked(fake)[-1])["image"] == IMAGE
    assert parts(asked(fake)[-1])["mask_image"] == MASK


def test_an_unknown_upload_names_the_field(client: TestClient) -> None:
    status, field, message = problem(client.post("/v1/segment", json=CLICK | {"image": "img_00"}))
    assert (status, field) == (404, "image")
    assert "POST /v1/images" in message
    mask = {"image": "aGVsbG8=", "mask": "img_11"}
    assert problem(client.post("/v1/erase", json=mask))[:2] == (404, "mask")


@pytest.mark.parametrize(
    "options",
    [
        {"json": {"image": "aGVsbG8="}},
        {"files": {"image": b""}},
        {"content": b"", "headers": {"content-type": "image/png"}},
        {"files": {"picture": IMAGE}},
        {"files": {"image": IMAGE}, "data": {"name": "../../etc/passwd"}},
    ],
)
def test_an_upload_is_one_file(client: TestClient, options: dict[str, Any]) -> None:
    assert client.post("/v1/images", **options).status_code == 400


@pytest.mark.anyio
async def test_uploads_are_bounded_in_size_and_time() -> None:
    time = 0.0
    images = Images(10, 60, now=lambda: time)

    async def put(data: bytes) -> str:
        with MemoryFile() as body:
            body.write(b"--" + data + b"--")
            return await images.put(Part(body, 2, 2 + len(data)))

    async def get(name: str) -> bytes:
        with (await images.get(name, "image"))[1] as file:
            return file.read()

    first, second = await put(b"12345"), await put(b"abcde")
    assert await put(b"12345") == first
    assert await get(first) == b"12345"
    third = await put(b"x")
    with pytest.raises(UnknownImage):
        await get(second)  # the one unused longest
    time = 60
    assert await get(first) == b"12345"
    time = 61
    with pytest.raises(UnknownImage):
        await get(third)
    assert await get(first) == b"12345"  # used at 60
    time = 122
    with pytest.raises(UnknownImage):
        await get(first)


@pytest.mark.anyio
async def test_uploads_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MOST", 2)
    images = Images(10, 60)
    names = []
    for data in (b"1", b"2", b"3"):
        with MemoryFile() as body:
            body.write(data)
            names.append(await images.put(whole(body)))
    with pytest.raises(UnknownImage):
        await images.get(names[0], "image")
    for name in names[1:]:
        (await images.get(name, "image"))[1].close()


def test_an_upload_larger_than_all_uploads_may_be_is_refused(fake: FakeTorchServe, store: Path) -> None:
    with gateway(fake, store, images_mib=1) as client:
        answer = client.post("/v1/images", files={"image": IMAGE + bytes(2**20)})
        assert problem(answer)[:2] == (413, "image")


# What is refused, by name, value and what is allowed


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"colour": 3}, "colour", ["no field 'colour'", "points", "box"]),
        ({"image": None}, "image", []),
        ({"image": ""}, "image", ["empty", "base64"]),
        ({"image": 7}, "image", ["7"]),
        ({"points": []}, "points", ["[]", "at least 1"]),
        ({"points": [[1]]}, "points", ["points[0]", "[1]"]),
        ({"points": [[1, 2, 3, 4]]}, "points", ["points[0]"]),
        ({"points": [["a", 2]]}, "points", ["points[0][0]", "'a'", "number"]),
        ({"points": [[True, 2]]}, "points", ["True", "number"]),
        ({"points": [[1, 2]] * 129}, "points", ["128"]),
        ({"box": [1, 2, 3]}, "box", ["[1, 2, 3]", "at least 4"]),
        ({"box": [1, 2, 3, "4"]}, "box", ["box[3]", "'4'"]),
        ({"dilate": -1}, "dilate", ["-1", "0"]),
        ({"dilate": 1.5}, "dilate", ["1.5", "integer"]),
        ({"dilate": "3"}, "dilate", ["'3'", "integer"]),
        ({"dilate": True}, "dilate", ["True", "integer"]),
        ({"dilate": 256}, "dilate", ["256", "255"]),
        ({"invert": 1}, "invert", ["1", "boolean"]),
        ({"model": ""}, "model", ["at least 1"]),
    ],
)
def test_wrong_fields_are_named(
    client: TestClient, fake: FakeTorchServe, edit: str, change: dict[str, Any], field: str, words: list[str]
) -> None:
    status, named, message = problem(client.post(f"/v1/{edit}", json=CLICK | EDITS[edit] | change))
    assert (status, named) == (400, field)
    assert [word for word in words if word not in message] == []
    assert asked(fake) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"steps": 0}, "steps", ["0", "1"]),
        ({"steps": 151}, "steps", ["151", "150"]),
        ({"guidance": -0.1}, "guidance", ["-0.1", "0"]),
        ({"strength": 1.1}, "strength", ["1.1", "1"]),
        ({"seed": -2}, "seed", ["-2", "-1"]),
        ({"seed": 2**63}, "seed", ["9223372036854775808"]),
        ({"seed": "1"}, "seed", ["'1'", "integer"]),
        ({"scheduler": "magic"}, "scheduler", ["'magic'", "euler_a"]),
        ({"variants": 5}, "variants", ["5", "4"]),
        ({"variants": 2}, "variants", ["2", "application/json"]),
        ({"prompt": None}, "prompt", []),
        ({"prompt": "x" * 10_001}, "prompt", ["10000"]),
        ({"format": "gif"}, "format", ["'gif'", "webp"]),
        ({"feather": 300}, "feather", ["300", "255"]),
        ({"mask": ""}, "mask", ["empty"]),
    ],
)
def test_wrong_fields_of_replace_are_named(
    client: TestClient, change: dict[str, Any], field: str, words: list[str]
) -> None:
    base = {"image": "aGVsbG8=", "mask": "bWFzaw==", "prompt": "a cat"}
    status, named, message = problem(client.post("/v1/replace", json=base | change))
    assert (status, named) == (400, field)
    assert [word for word in words if word not in message] == []


def test_what_would_have_no_effect_is_refused(client: TestClient) -> None:
    masked = {"image": "aGVsbG8=", "mask": "bWFzaw=="}
    for change in ({"points": [[1, 2]]}, {"box": [1, 2, 3, 4]}, {"dilate": 3}, {"invert": True}):
        (name,) = change
        assert problem(client.post("/v1/erase", json=masked | change))[:2] == (400, name)
    assert problem(client.post("/v1/erase", json={"image": "aGVsbG8="}))[:2] == (400, "mask")
    assert problem(client.post("/v1/segment", json={"image": "aGVsbG8="}))[:2] == (400, "points")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"content": b"{"},
        {"content": b"[]"},
        {"content": b"{}", "headers": {"content-type": "text/plain"}},
        {"content": b"", "headers": {"content-type": "application/json"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=a"}},
        {"content": '{"image": "\ud800"}'.encode("utf-8", "surrogatepass")},
        {"content": b'{"image": "\\ud800", "points": [[1, 2]]}'},
        {"files": {"image": IMAGE}, "data": {"points": "5, 6, 7, 8, 9"}},
        {"files": {"image": IMAGE}, "data": {"points": "(5, 6)"}},
        {"files": {"image": IMAGE}, "data": {"points": ["[[1, 2]]", "[[1, 2]]"]}},
    ],
)
def test_broken_bodies_are_a_400(client: TestClient, options: dict[str, Any]) -> None:
    answer = client.post("/v1/segment", **options)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_what_a_handler_refuses_comes_back_in_the_names_of_this_api(client: TestClient, fake: FakeTorchServe) -> None:
    for theirs, ours in (
        ("gen_args.point_coords", "points"),
        ("mask_image", "mask"),
        ("gen_args.strength", "strength"),
    ):
        error = {"code": "bad_request", "message": f"{theirs}[0] lies outside", "field": theirs}
        fake.replies["POST /predictions/p.sam"] = httpx.Response(400, json={"error": error})
        answer = client.post("/v1/segment", json=CLICK)
        assert problem(answer) == (400, ours, f"{ours}[0] lies outside")


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (httpx.Response(507, json={"error": {"code": "out_of_memory", "message": "no"}}), 507, "out_of_memory"),
        (httpx.Response(500, text="Prediction failed"), 500, "internal"),
        (httpx.Response(503, json=OWN_ERROR), 503, "unavailable"),
    ],
)
def test_a_models_failure_is_an_error_of_the_same_shape(
    client: TestClient, fake: FakeTorchServe, reply: httpx.Response, status: int, code: str
) -> None:
    fake.replies["POST /predictions/p.sam"] = reply
    answer = client.post("/v1/segment", json=CLICK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


# What the documentation says


@pytest.mark.parametrize("kind", [SegmentFields, EraseFields, ReplaceFields])
def test_every_field_is_described_by_words_and_an_example(kind: type[Any]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, name
        assert field.examples, name


def test_examples_are_accepted() -> None:
    for kind in (SegmentFields, EraseFields, ReplaceFields):
        examples = {name: field.examples[0] for name, field in kind.model_fields.items()}
        assert kind.model_validate(examples)
