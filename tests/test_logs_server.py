"""What a real TorchServe and its workers write: bounded, with the request's id, and nothing of what clients send."""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encoded
from logged import everything, lines, requests
from PIL import Image, PngImagePlugin
from serving import Server, serving

from bench.stores import build_demo, copy_code
from serve.gateway.access import keys
from serve.gateway.access.keys import Scope
from tests.zoo import write_archive

pytestmark = pytest.mark.torchserve

MARK = "MaRkEr"
ODD = """
import logging, warnings
from handlers.requests.reply import Reply
from handlers.worker.base import Handler


class Odd(Handler):
    def load(self, folder):
        pass

    def predict(self, request):
        logging.getLogger("odd").warning("two\\nlines")
        raise RuntimeError(request.text("prompt"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def key(folder: Path) -> str:
    return keys.add(folder / "state" / "keys.json", "studio", [Scope.EDIT], keep=False)[0]


@pytest.fixture(scope="module")
def server(folder: Path, key: str) -> Iterator[Server]:
    store = folder / "store"
    (store / "odd").mkdir(parents=True)
    copy_code(build_demo(folder / "code") / "lama", store / "odd")
    (store / "odd" / "handler.py").write_text(ODD)
    write_archive(store, "foreign", echo=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PALIMPSEST_LOG_FORMAT", "json")
        with serving(folder, store, cpu_only=True) as running:
            running.http.headers["x-api-key"] = key
            yield running


def marked_picture(number: int) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", f"{MARK}{number}")
    info.add_itxt("prompt", f"{MARK}{number}")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def mask() -> bytes:
    marked = np.zeros((64, 64), np.uint8)
    marked[20:40, 20:40] = 255
    return encoded(marked)


def plant(server: Server) -> dict[str, int]:
    """Markers wherever a client can put one, in requests that succeed and that fail; returns the statuses by id."""
    statuses: dict[str, int] = {}
    headers = {"cookie": f"palimpsest={MARK}1", "x-odd": f"{MARK}2", "user-agent": f"{MARK}3", "referer": f"{MARK}4"}
    prompt = " ".join([f"{MARK}5"] * 120)  # past what the model reads, of which libraries like to warn

    def post(name: str, path: str, **options: Any) -> None:
        own = headers | {"x-request-id": name} | options.pop("headers", {})
        statuses[name] = server.http.post(f"{path}?{MARK}6={MARK}7", headers=own, **options).status_code

    def files(*names: str) -> dict[str, Any]:
        sent = {"image": marked_picture(8), "mask": mask(), "mask_image": mask()}
        return {name: (f"{MARK}9.png", sent[name], "image/png") for name in names}

    arguments = {"prompt": prompt, "negative_prompt": prompt}
    post("replaced", "/v1/replace", files=files("image", "mask"), data=arguments | {"steps": "2"})
    few = {"gen_args": json.dumps({"num_inference_steps": 2, f"{MARK}10": 1})}
    post("painted", "/predictions/sd", files=files("image", "mask_image"), data=arguments | few)
    post("erased", "/v1/erase", files=files("image", "mask"))
    post("cut", "/v1/segment", files={"image": (f"{MARK}9.png", marked_picture(11)[:150])}, data={"points": "[[9, 9]]"})
    post("no picture", "/predictions/sam", content=f"{MARK}12")
    post("wrong", "/predictions/sd", json={"prompt": prompt, "image": f"{MARK}13", "mask_image": f"{MARK}14"})
    post("odd", "/predictions/odd", json={"prompt": prompt})
    post("foreign", "/predictions/foreign", content=f"{MARK}15", headers={"content-type": f"multipart/{MARK}16"})
    post(
        "bad multipart",
        "/predictions/foreign",
        content=f"--{MARK}17",
        headers={"content-type": f"multipart/form-data; boundary={MARK}18"},
    )
    post("unknown", f"/predictions/{MARK}19")
    return statuses


def test_worker_lines_have_their_requests_id_and_nobody_writes_what_clients_send(
    server: Server, folder: Path, key: str
) -> None:
    statuses = plant(server)
    metrics = server.http.get("/metrics").text
    server.process.terminate()
    server.process.wait(60)
    state = folder / "state"
    told = {line["request"]: line for line in requests(state)}
    by_id = {name: told[name]["status"] for name in statuses if name in told}
    assert by_id == {name: status for name, status in statuses.items() if " " not in name}
    assert [told[name]["status"] for name in ("replaced", "painted", "erased", "odd")] == [200, 200, 200, 500]
    assert {"load_ms", "decode_ms", "model_ms", "encode_ms"} <= told["replaced"].keys()
    assert {"queue_ms", "decode_ms", "model_ms", "encode_ms"} <= told["painted"].keys()
    assert told["odd"]["code"] == "internal"
    worker = [line for line in lines(state) if line["source"] == "worker" and line.get("request") == "odd"]
    assert [line["text"] for line in worker[:3]] == ["two", "lines", "RuntimeError in predict"]
    assert {line["model"] for line in worker} == {"odd"}
    (state / "keys.json").unlink()
    written = everything(state).decode(errors="replace") + (folder / "serve.log").read_text() + metrics
    assert MARK.lower() not in written.lower()
    assert key not in written
    logs = sorted(file.name for file in (state / "logs").iterdir())
    assert logs == ["model_log.log", "palimpsest.log", "ts_log.log", "zygote.log"]
    # Of every single request TorchServe says nothing more.
    assert not any(
        word in (state / "logs" / "ts_log.log").read_text() for word in ("/predictions/", "Backend response")
    )
    assert os.stat(state / "logs" / "palimpsest.log").st_mode & 0o077 == 0
