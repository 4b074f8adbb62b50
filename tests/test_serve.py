"""`palimpsest serve` for real: TorchServe, the three demo models, the sample photograph, and a clean end."""

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import DATA, encoded, pixels
from serving import PALIMPSEST, ROOT, Server, environment, serving, until

from serve.engine import computing, homes

pytestmark = pytest.mark.torchserve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), demo_store) as running:
        yield running


def test_the_original_example_runs_unchanged(server: Server, dog: bytes) -> None:
    click = json.dumps({"point_coords": [750, 500], "point_labels": 1, "dilate_kernel_size": 15})
    mask = base64.b64decode(server.ask("sam", image=dog, gen_args=click)["generated_image"])
    inside = pixels(mask) == 255
    assert inside.shape == (1041, 1499)
    assert inside.any()
    assert not inside.all()

    # The example sends a prompt to LaMa, too.
    erased = server.ask("lama", image=dog, mask_image=mask, prompt="a hamster on a bench", gen_args="{}")
    wish = json.dumps({"num_inference_steps": 3, "guidance_scale": 10, "seed": 1})
    replaced = server.ask(
        "sd", image=dog, mask_image=mask, prompt="a hamster on a bench", negative_prompt="", gen_args=wish
    )
    before = pixels(dog)
    for reply in (erased, replaced):
        after = pixels(base64.b64decode(reply["generated_image"]))
        assert after.shape == before.shape
        assert np.array_equal(after[~inside], before[~inside])
        assert not np.array_equal(after[inside], before[inside])


def test_binary_in_and_out_through_every_door(server: Server, dog: bytes) -> None:
    parts = {"image": ("../../etc/passwd", dog), "gen_args": (None, '{"point_coords": [750, 500]}')}
    answers = [
        server.http.post(path, files=parts, headers={"accept": "image/png"})
        for path in ("/predictions/sam", "/models/sam.tar.gz/invoke", "/predictions/demo/sam")
    ]
    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "image/png"
        assert -1 <= float(answer.headers["x-palimpsest-score"]) <= 2
        assert answer.content == answers[0].content


def test_bad_requests_are_4xx_and_harm_nobody(server: Server, dog: bytes) -> None:
    for body, kind, status in [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"x", "image/png", 415),
        (b"--", "text/plain", 415),
    ]:
        answer = server.http.post("/predictions/sam", content=body, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, "bad_request")
    far = {"image": base64.b64encode(dog).decode(), "gen_args": {"point_coords": [5000, 5]}}
    error = server.http.post("/predictions/sam", json=far).json()["error"]
    assert error["field"] == "gen_args.point_coords"
    assert server.ask("sam", image=dog, gen_args={"point_coords": [750, 500]})["score"] is not None


def test_a_large_picture_as_base64_is_served(server: Server) -> None:
    """Over TorchServe's default limit of 6.5 MB in both directions, which killed the worker."""
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
    hole = np.zeros((1600, 1600), np.uint8)
    hole[800:810, 800:810] = 255
    reply = server.ask(
        "sd", image=encoded(noise), mask_image=encoded(hole), prompt="x", gen_args={"num_inference_steps": 1}
    )
    assert len(reply["generated_image"]) > 6_553_500
    after = pixels(base64.b64decode(reply["generated_image"]))
    assert np.array_equal(after[hole == 0], noise[hole == 0])


def test_workers_compute_as_the_server_says(server: Server, dog: bytes) -> None:
    server.ask("sam", image=dog, gen_args={"point_coords": [750, 500]})
    given = server.worker("sam").environ()
    for name, value in computing.variables().items():
        assert given[name] == os.environ.get(name, value)


def test_an_archive_runs_its_own_code_not_that_of_the_checkout(server: Server, demo_store: Path) -> None:
    """Both are importable in the worker; and an archive put into the store while it runs is served."""
    own = demo_store / "team" / "own"
    shutil.copytree(demo_store / "demo" / "sam", own)
    code = own / "handlers" / "requests" / "payload.py"
    code.write_text(code.read_text().replace("is missing", "is missing in this archive"))
    answer = server.http.post("/predictions/team/own", json={})
    assert "is missing in this archive" in answer.json()["error"]["message"]


@pytest.mark.parametrize("file_format", ["tar.gz", "mar"])
def test_a_packed_archive_put_into_the_store_is_served(server: Server, demo_store: Path, file_format: str) -> None:
    exported = demo_store / "packed" / f"{file_format.replace('.', '')}.{file_format}"
    exported.parent.mkdir(exist_ok=True)
    command = [PALIMPSEST, "archives", "export", "demo/sam", "--store", demo_store, "--format", file_format]
    subprocess.run([*command, "--out", exported], check=True, cwd=ROOT, capture_output=True, timeout=120)
    answer = server.http.post(f"/predictions/packed/{exported.name}", json={})
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "image")


def test_what_torchserve_measures_itself_is_told_of_every_model(server: Server, dog: bytes) -> None:
    server.ask("sam", image=dog, gen_args={"point_coords": [750, 500]})
    names = ("ts_inference_requests_total", "ts_queue_latency_microseconds_total", "PredictionTime")
    until(lambda: all(f'{name}{{model="demo/sam"}}' in server.http.get("/metrics").text for name in names))


def test_no_thread_of_a_worker_spins_while_it_is_loaded(server: Server) -> None:
    for change in ("unload", "load"):
        server.http.post(f"/v1/models/lama/{change}").raise_for_status()
    worker = server.worker("lama")
    others = [thread for thread in worker.threads() if thread.id != worker.pid]
    assert sum(thread.user_time + thread.system_time for thread in others) < 0.05


def test_nothing_of_a_payload_is_logged(server: Server, dog: bytes) -> None:
    hole = base64.b64encode((DATA / "dog-on-bench-mask.jpg").read_bytes()).decode()
    fields = {"image": base64.b64encode(dog).decode(), "mask_image": hole, "prompt": "unmistakable-wish"}
    answer = server.http.post("/predictions/sd", json=fields | {"gen_args": {"num_inference_steps": -5}})
    assert answer.status_code == 400
    server.http.post("/predictions/sd", json=fields | {"gen_args": {"num_inference_steps": 1}}).raise_for_status()
    folder = server.folder / "state" / "logs"
    assert (folder / "ts_log.log").read_text().count("Inference API bind to") == 1, "TorchServe's lines are there once"
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    logs += (server.folder / "serve.log").read_text()
    assert "predictions" in logs
    for secret in ("unmistakable-wish", fields["image"][100:160], hole[100:160], "num_inference_steps"):
        assert secret not in logs


def test_a_second_server_on_the_port_says_what_to_do(server: Server, tmp_path: Path, demo_store: Path) -> None:
    second = subprocess.run(
        [PALIMPSEST, "serve"],
        cwd=ROOT, env=environment(server.port, tmp_path, demo_store), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert second.returncode == 1
    assert f"port {server.port}" in second.stderr
    assert f"PORT={server.port + 1}" in second.stderr
    assert server.http.get("/ping").status_code == 200


def test_stop_with_another_state_folder_says_whose_the_server_is(
    server: Server, tmp_path: Path, demo_store: Path
) -> None:
    environ = environment(server.port, tmp_path, demo_store)
    stop = subprocess.run([PALIMPSEST, "stop"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert stop.returncode == 1
    assert f"process {server.process.pid}" in stop.stderr
    assert f"PALIMPSEST_STATE={server.folder / 'state'} PALIMPSEST_PORT={server.port} palimpsest stop" in stop.stderr
    assert server.http.get("/ping").status_code == 200


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "palimpsest stop", "SIGKILL"])
def test_the_end(tmp_path: Path, demo_store: Path, dog: bytes, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves nothing. (Its folder has its name: a longer one would be too long for TorchServe's sockets.)"""
    with serving(tmp_path, demo_store) as server:
        server.ask("sam", image=dog, gen_args={"point_coords": [750, 500]})
        family = server.family()
        assert len(family) >= 2
        if how == "palimpsest stop":
            environ = environment(server.port, tmp_path, demo_store)
            subprocess.run([PALIMPSEST, "stop"], cwd=ROOT, env=environ, check=True, timeout=60)
        else:
            server.process.send_signal(getattr(signal, how))
        code = server.process.wait(60)
        left = server.leftovers(family)
    if how == "SIGKILL":
        # Nobody was left to remove the folder; the processes are gone all the same, and the next one removes it.
        assert [item for item in left if isinstance(item, psutil.Process)] == []
        assert len(left) == 1
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        homes.sweep()
        assert not list((tmp_path / "tmp").iterdir())
    else:
        assert (code, left) == (0, [])
        assert not list((tmp_path / "state").glob("*.pid"))


def test_a_long_temporary_folder_leaves_room_for_torchserves_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every load would fail with "AF_UNIX path too long"; tests/test_bench.py serves from such a folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert homes.temporary_folder() == (str(tmp_path) if len(str(tmp_path)) <= 72 else "/tmp")
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 72)
    assert homes.temporary_folder() == "/tmp"
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 71)
    assert homes.temporary_folder() == "/" + "x" * 71
