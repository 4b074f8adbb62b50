"""The editing API with the demo models in a real TorchServe."""

import base64
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import door
import httpx
import numpy as np
import pytest
from conftest import encoded, pixels
from serving import Server, serving
from test_clients import FOLDER, PICTURE, RECORDED
from test_keep import pasted

pytestmark = pytest.mark.torchserve

CLICK = {"points": [[750, 500]], "dilate": 8}
EVENTS = {"accept": "text/event-stream"}
JSON = {"accept": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("edit"), demo_store) as running:
        yield running


@pytest.fixture(scope="module")
def image(server: Server, dog: bytes) -> str:
    return str(server.http.post("/v1/images", files={"image": dog}).json()["id"])


def post(server: Server, edit: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    answer = server.http.post(f"/v1/{edit}", json=fields, headers=headers)
    assert answer.status_code == 200, answer.text[:500]
    return answer


def mask_of(reply: dict[str, Any]) -> Any:
    return pixels(base64.b64decode(reply["mask"])) > 127


def test_one_call_erases_what_a_click_selects_and_nothing_else(server: Server, image: str, dog: bytes) -> None:
    reply = post(server, "erase", JSON, image=image, **CLICK).json()
    mask = mask_of(reply)
    before, after = pixels(dog), pixels(base64.b64decode(reply["picture"]))
    assert (before[~mask] == after[~mask]).all()
    assert (before[mask] != after[mask]).any()
    selected = post(server, "segment", image=image, **CLICK).json()
    assert (mask_of(selected) == mask).all()
    assert selected["area"] == mask.sum()


def test_a_second_click_refines_with_the_token_of_the_first(server: Server, image: str) -> None:
    first = post(server, "segment", image=image, **CLICK, return_logits=True).json()
    fields = {"image": image, "points": [[750, 500], [100, 100, 0]], "logits": first["logits"]}
    assert post(server, "segment", **fields).json()["score"]
    answer = server.http.post("/v1/segment", json=fields | {"logits": "bm90IGxvZ2l0cw=="})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "logits")


def test_a_further_click_on_an_upload_neither_reads_nor_embeds_it(server: Server, image: str) -> None:
    post(server, "segment", image=image, points=[[300, 300]])
    again = post(server, "segment", image=image, **CLICK)
    assert "recall;dur=" in again.headers["server-timing"]
    assert not {"decode", "embed", "load"} & again.json()["timings"].keys()
    erased = post(server, "erase", JSON, image=image, **CLICK).json()["timings"]
    assert erased.keys() >= {"recall", "decode", "mask", "model", "encode", "engine"}  # of both models


def test_the_seed_decides_and_comes_back_with_the_parameters(server: Server, image: str) -> None:
    fields = {"image": image, **CLICK, "prompt": "a cat", "steps": 2}
    first = post(server, "replace", **fields, seed=5)
    assert first.content == post(server, "replace", **fields, seed=5).content
    assert first.content != post(server, "replace", **fields, seed=6).content
    assert first.headers["x-palimpsest-seed"] == "5"
    assert json.loads(first.headers["x-palimpsest-parameters"])["num_inference_steps"] == 2
    many = post(server, "replace", JSON, **fields, seed=5, variants=2).json()
    assert many["seeds"] == [5, 6]
    assert base64.b64decode(many["pictures"][0]) == first.content


def test_an_edit_of_what_an_edit_kept_moves_only_what_changed(server: Server, image: str, dog: bytes) -> None:
    first = post(server, "erase", image=image, **CLICK, keep=True, result="patch")
    assert len(first.content) < len(dog) / 4
    seen = pasted(pixels(dog), first.content, json.loads(first.headers["x-palimpsest-box"]))
    again = {"image": first.headers["x-palimpsest-id"], "points": [[400, 620]]}
    second = post(server, "erase", JSON, **again, keep=True, result="patch").json()
    seen = pasted(seen, base64.b64decode(second["picture"]), second["box"])
    whole = post(server, "erase", **again, keep=True)
    assert (pixels(whole.content) == seen).all()
    assert whole.headers["x-palimpsest-id"] == second["id"]


def test_the_reply_has_the_inputs_format_unless_asked_otherwise(server: Server) -> None:
    hole = np.zeros((60, 80), np.uint8)
    hole[20:40, 30:50] = 255
    image = encoded(np.full((60, 80, 3), 90, np.uint8), "JPEG", quality=90)
    fields = {"image": base64.b64encode(image).decode(), "mask": base64.b64encode(encoded(hole)).decode()}
    assert post(server, "erase", **fields).headers["content-type"] == "image/jpeg"
    assert post(server, "erase", **fields, format="webp").headers["content-type"] == "image/webp"
    assert post(server, "erase", {"accept": "image/png"}, **fields).headers["content-type"] == "image/png"


@pytest.mark.parametrize("text", ["/etc/passwd", "../../etc/passwd", "http://127.0.0.1/x.png", "file:///etc/passwd"])
def test_pictures_are_never_paths_or_urls(server: Server, text: str) -> None:
    answer = server.http.post("/v1/segment", json={"image": text, **CLICK})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "image")
    assert "root:" not in answer.text


def test_points_outside_are_named_with_the_pictures_size(server: Server, image: str) -> None:
    answer = server.http.post("/v1/segment", json={"image": image, "points": [[1500, 2]]})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "points")
    assert "1499x1041" in answer.json()["error"]["message"]


def test_models_answer_what_other_clients_send(server: Server) -> None:
    assert server.http.post("/v1/images", content=PICTURE).status_code == 201  # some name it by its id
    wrong = {}
    for name in RECORDED:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
            line.sendall((FOLDER / f"{name}.http").read_bytes())
            answer = door.read(line)
        if answer.status not in (200, 201):
            wrong[name] = answer
    assert wrong == {}


def stream(server: Server, **fields: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    with server.http.stream("POST", "/v1/replace", json=fields, headers=EVENTS) as answer:
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))


def test_progress_goes_up_and_ends_with_the_picture(server: Server, image: str) -> None:
    told = list(stream(server, image=image, **CLICK, prompt="a cat", steps=12, seed=1))
    assert told[0][0] == "job"
    steps = [data["step"] for name, data in told if name == "progress" and data["model"] == "demo/sd"]
    assert steps == sorted(steps)
    assert steps[-1] > 0
    name, last = told[-1]
    assert name == "done"
    assert pixels(base64.b64decode(last["picture"])).shape == (1041, 1499, 3)
    drafts = [data for name, data in told if name == "preview"]
    assert drafts
    for draft in drafts:
        left, top, right, bottom = draft["box"]
        assert 0 <= left < 750 < right <= 1499
        assert 0 <= top < 500 < bottom <= 1041
        assert pixels(base64.b64decode(draft["picture"])).shape == (32, 32, 4)


@pytest.mark.parametrize("how", ["delete", "leave"])
def test_a_stopped_job_frees_the_worker_for_the_next_request(server: Server, image: str, how: str) -> None:
    """The next request takes what it takes alone and a step, where all steps of the job would take many times that."""
    fields = {"image": image, "box": [600, 300, 700, 400], "prompt": "a cat", "seed": 1}
    post(server, "replace", **fields, steps=1)  # loaded
    began = time.perf_counter()
    post(server, "replace", **fields, steps=10)
    ten_steps = time.perf_counter() - began

    job = ""
    for name, data in stream(server, **fields, steps=150, variants=4):
        job = data["job"] if name == "job" else job
        if name == "progress" and data["model"] == "demo/sd" and data["step"] >= 2:
            break  # which closes the stream
    if how == "delete":
        server.http.delete(f"/v1/jobs/{job}")
    began = time.perf_counter()
    post(server, "replace", **fields, steps=1)
    assert time.perf_counter() - began < 6 * ten_steps  # all would take 60 times ten steps
    assert server.http.delete(f"/v1/jobs/{job}").status_code == 404


def test_deleting_a_job_ends_its_stream(server: Server, image: str) -> None:
    events = stream(server, image=image, box=[600, 300, 700, 400], prompt="a cat", steps=150, variants=4)
    job, deleted_at, last = "", None, ("", {})
    for name, data in events:
        job = data["job"] if name == "job" else job
        if name == "progress" and data["step"] >= 2 and deleted_at is None:
            deleted_at = data["step"]
            assert server.http.delete(f"/v1/jobs/{job}").status_code == 202
        last = name, data
    assert last == ("cancelled", {"error": {"code": "cancelled", "message": "the job was cancelled"}, "status": 499})


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_chain_of_edits_comes_back_as_a_file_of_the_inputs_format(server: Server, kind: str) -> None:
    grey = np.random.default_rng(3).integers(60, 90, (60, 80, 3), np.uint8)
    sent = encoded(grey, kind)
    before = pixels(sent)
    image = server.http.post("/v1/images", files={"image": sent}).json()["id"]
    reply = post(server, "erase", JSON, image=image, mask=HOLE, keep=True, result="patch").json()
    left, top, right, bottom = reply["box"]
    expected = before.copy()
    expected[top:bottom, left:right] = pixels(base64.b64decode(reply["picture"]))
    answer = server.http.get(f"/v1/images/{reply['id']}")
    assert answer.headers["content-type"] == f"image/{kind.lower()}"
    exact = server.http.get(f"/v1/images/{reply['id']}", params={"format": "png"})
    assert (pixels(exact.content) == expected).all()
    assert kind == "JPEG" or (pixels(answer.content) == expected).all()
    assert server.http.get("/v1/images/img_0").status_code == 404
    assert server.http.get(f"/v1/images/{image}", params={"format": "bmp"}).json()["error"]["field"] == "format"


HOLE = base64.b64encode(encoded(np.pad(np.full((20, 20), 255, np.uint8), ((20, 20), (30, 30))))).decode()
