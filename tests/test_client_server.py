"""The Python clients and the command line with the demo models in a real TorchServe."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import palimpsest
import pytest
from conftest import DATA, encoded, pixels
from connecting import KINDS, connecting
from palimpsest import Progress
from PIL import Image
from serving import Server, blocks, serving, until

pytestmark = pytest.mark.torchserve

CLICK: dict[str, Any] = {"points": [(750, 500)], "dilate": 8}
BOX = (600, 300, 700, 400)
LONG: dict[str, Any] = {"box": BOX, "steps": 150, "variants": 4, "seed": 1}
PICTURES = 50


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("client"), demo_store) as running:
        yield running


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@pytest.fixture
def waiting(url: str) -> Iterator[palimpsest.Client]:
    with palimpsest.Client(url) as client:
        yield client


@pytest.fixture(params=KINDS)
def client(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    with connecting(request.param) as make:
        yield make(url)


def whole(server: Server, edit: Any) -> np.ndarray:
    return pixels(server.http.get(f"/v1/images/{edit.id}", params={"format": "png"}).content)


def test_from_a_click_to_a_saved_picture(client: Any, server: Server, dog: bytes, tmp_path: Path) -> None:
    told: list[Progress] = []
    found = client.segment(DATA / "dog-on-bench.png", **CLICK)
    assert found.mask.shape == (1041, 1499)
    assert 0 < found.score < 1
    assert found.area == found.mask.sum() > 50_000
    erased = client.erase(dog, mask=found)
    replaced = client.replace(erased, "a hamster on a bench", mask=found, seed=7, steps=4, progress=told.append)
    assert {each.phase for each in told} <= {"queued", "loading", "running"}
    assert max(each.step for each in told) > 0
    assert (replaced.seed, replaced.parameters["num_inference_steps"]) == (7, 4)
    before = pixels(dog)
    for edit in (erased, replaced):
        after = np.asarray(edit.image)
        assert (after == whole(server, edit)).all()
        assert (after[~found.mask] == before[~found.mask]).all()
        assert (after[found.mask] != before[found.mask]).any()
    replaced.save(tmp_path / "out.png")
    assert (pixels((tmp_path / "out.png").read_bytes()) == np.asarray(replaced.image)).all()
    assert {"demo/sam", "demo/lama", "demo/sd"} <= {model.name for model in client.models()}


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_a_chain_is_exact_in_every_format(waiting: palimpsest.Client, server: Server, kind: str) -> None:
    data = encoded(np.random.default_rng(5).integers(60, 90, (160, 200, 3), np.uint8), kind)
    mask = np.zeros((160, 200), bool)
    edit: Any = waiting.upload(data)
    for left in (20, 60, 100):
        mask[50:80, left : left + 30] = True
        edit = waiting.erase(edit, mask=mask)
        assert (np.asarray(edit.image) == whole(server, edit)).all()
    assert (np.asarray(edit.image)[~mask] == pixels(data)[~mask]).all()
    assert Image.open(io.BytesIO(edit.file())).format == kind


def test_what_the_docs_show_works(url: str, dog: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bench.png", "photos/a.png", "photos/more/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(dog)
    (tmp_path / "palimpsest").write_text(f"#!{sys.executable}\nfrom palimpsest.cli import run\nrun()\n")
    (tmp_path / "palimpsest").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PALIMPSEST_SERVER", url)
    monkeypatch.chdir(tmp_path)
    python = blocks("docs/client.md", "python")
    assert len(python) == 3
    for block in python:
        exec(block.replace("http://127.0.0.1:8080", url), {})
    shell = [block for block in blocks("docs/client.md", "sh") if "pip" not in block]
    for block in shell:
        subprocess.run(["bash", "-euo", "pipefail", "-c", block], check=True, timeout=120)
    made = ["empty-bench.jpg", "mushroom.png", "cat.png", "hat.webp", "masks/more/b.png", "erased/a.png"]
    assert [name for name in made if pixels((tmp_path / name).read_bytes()).shape[:2] != (1041, 1499)] == []


def ten_steps(client: palimpsest.Client, dog: bytes) -> float:
    """Seconds that they take, once everything is loaded and known."""
    quick: dict[str, Any] = {"box": BOX, "seed": 1}
    client.replace(dog, "a cat", steps=1, **quick)
    began = time.perf_counter()
    client.replace(dog, "a cat", steps=10, **quick)
    return time.perf_counter() - began


class Enough(Exception):
    pass


def stop(progress: Progress) -> None:
    if progress.model == "demo/sd" and progress.step >= 2:
        raise Enough


def test_what_a_callback_raises_stops_the_servers_work(waiting: palimpsest.Client, dog: bytes) -> None:
    ten = ten_steps(waiting, dog)
    began = time.perf_counter()
    with pytest.raises(Enough):
        waiting.replace(dog, "a cat", progress=stop, **LONG)
    waiting.replace(dog, "a cat", box=BOX, steps=1)
    assert time.perf_counter() - began < 12 * ten  # all would take 60 times ten steps


SCRIPTS = {
    "waiting": """
import sys
from palimpsest import Client
with Client(sys.argv[1]) as client:
    client.replace(sys.argv[2], "a cat", box=(600, 300, 700, 400), steps=150, variants=4,
                   progress=lambda told: told.step >= 2 and print("works", flush=True))
""",
    "awaiting": """
import asyncio, sys
from palimpsest import AsyncClient
async def main():
    async with AsyncClient(sys.argv[1]) as client:
        await client.replace(sys.argv[2], "a cat", box=(600, 300, 700, 400), steps=150, variants=4,
                             progress=lambda told: told.step >= 2 and print("works", flush=True))
asyncio.run(main())
""",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_control_c_stops_the_servers_work(waiting: palimpsest.Client, url: str, dog: bytes, kind: str) -> None:
    ten = ten_steps(waiting, dog)
    command = [sys.executable, "-c", SCRIPTS[kind], url, str(DATA / "dog-on-bench.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    waiting.replace(dog, "a cat", box=BOX, steps=1)
    assert time.perf_counter() - began < 12 * ten


def pictures(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(8)
    for number in range(PICTURES):
        kind = "jpg" if number % 3 else "png"
        image = Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8))
        image.save(folder / f"{number:02}.{kind}")


def test_a_batch_that_was_killed_goes_on_where_it_was(waiting: palimpsest.Client, url: str, tmp_path: Path) -> None:
    pictures(tmp_path / "in")
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:50] = 255
    (tmp_path / "mask.png").write_bytes(encoded(mask))
    run = "from palimpsest.cli import run; run()"
    arguments = ["erase", "in", "-o", "out", "--mask", "mask.png", "--parallel", "2", "--json", "--server", url]
    command = [sys.executable, "-c", run, *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as killed:
        until(lambda: len(list(tmp_path.glob("out/[0-9]*"))) >= 5)
        os.kill(killed.pid, signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/[0-9]*")}
    assert len(done) < PICTURES
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    counts = {"done": PICTURES - len(done), "already there": len(done), "to do": 0, "failed": 0}
    assert json.loads(again.stdout)["counts"] == counts
    for path in (tmp_path / "in").iterdir():
        result = tmp_path / "out" / path.name
        assert result.read_bytes() == waiting.erase(path, mask=mask, keep=False).file()
        assert done.get(path.name, 0) in (0, result.stat().st_mtime_ns)
    assert len(list((tmp_path / "out").iterdir())) == PICTURES


def test_a_batch_that_is_interrupted_says_what_is_left(url: str, tmp_path: Path) -> None:
    pictures(tmp_path / "in")
    run = "from palimpsest.cli import run; run()"
    arguments = ["replace", "in", "--prompt", "a cat", "--box", "30,20,50,40", "--steps", "20", "--server", url]
    with subprocess.Popen(
        [sys.executable, "-c", run, *arguments, "--json"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        until(lambda: len(list(tmp_path.glob("replaced/*"))) >= 1)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    counts = json.loads(told)["counts"]
    assert counts["done"] >= 1
    assert counts["to do"] > 0
    assert counts["failed"] == 0
    with palimpsest.Client(url) as client:
        until(lambda: not any(model.leases or model.queue for model in client.models()))
