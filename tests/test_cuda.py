"""On a GPU: what no fake can show. Skipped where there is none."""

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HandlerClient, pixels
from segment_anything import SamPredictor
from segment_anything.modeling.image_encoder import Block
from serving import ROOT, Server, serving, until
from test_parking import BIG, KEY, BigHandler, big, command, state_after, with_big_weights

from handlers.sam import network
from handlers.sam.attention import fuse
from handlers.weights.mapped_file import MappedFile
from handlers.weights.tensors import CopiedWeights, open_weights
from serve.residency.memory import CudaDevice, find_device

# Not torch's own word: asking it would bring CUDA into every run of the tests.
pytestmark = pytest.mark.skipif(find_device().gpu is None, reason="needs a CUDA GPU")
MIB = 2**20
CLICK = {"point_coords": [750, 500]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_big_weights(tmp_path)


@pytest.fixture
def handler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> BigHandler:
    monkeypatch.setenv("PALIMPSEST_COMMAND_KEY", KEY)
    return big(folder, gpu_id=0)


def test_the_weights_on_the_gpu_are_those_of_the_file(folder: Path) -> None:
    file = MappedFile(folder / "weights.safetensors")
    expected = file.tensors["weight"].clone()
    for dtype in (torch.float32, torch.float16):
        loaded = CopiedWeights(file, {"weight": dtype}, torch.device("cuda", 0), keep_on_host=True)
        assert torch.equal(loaded.tensors["weight"].cpu(), expected.to(dtype))
        assert set(loaded.seconds) == {"read", "copy"}


def test_parking_gives_the_gpus_memory_back_and_waking_the_same_weights(handler: BigHandler) -> None:
    weight = handler.network["first"].weight
    before, allocated = weight.cpu(), torch.cuda.memory_allocated()
    for _ in range(3):
        parked = state_after(handler, "park")
        assert (parked["state"], parked["device_bytes"], parked["host_bytes"]) == ("parked", 0, BIG)
        assert torch.cuda.memory_allocated() == allocated - BIG
        woken = state_after(handler, "wake")
        assert (woken["state"], woken["device_bytes"]) == ("ready", BIG)
        assert torch.equal(weight.cpu(), before)


@pytest.mark.parametrize(("side", "window"), [(16, 8), (64, 0), (64, 14)])
def test_sams_fused_attention_is_the_librarys(side: int, window: int) -> None:
    torch.manual_seed(0)
    plain = Block(64, num_heads=2, use_rel_pos=True, window_size=window, input_size=(side, side)).cuda()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    fused = copy.deepcopy(plain)
    fuse(SimpleNamespace(blocks=[fused]))
    tokens = torch.randn(1, side, side, 64, device="cuda")
    with torch.inference_mode():
        torch.testing.assert_close(fused(tokens), plain(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("point", [[750, 500], [300, 600], [1100, 560], [200, 150]])
def test_sams_half_precision_finds_the_masks_of_single(demo_store: Path, dog: bytes, point: list[int]) -> None:
    folder, device = demo_store / "demo" / "sam", torch.device("cuda", 0)
    masks = []
    for dtype in (torch.float32, torch.float16):
        weights = open_weights(folder / "weights.safetensors", device, network.served_dtype(dtype))
        sam = SamPredictor(network.assemble(folder / "network.yaml", weights.tensors, device, dtype))
        sam.set_image(pixels(dog)[..., :3])
        found, scores, _ = sam.predict(np.array([point]), np.array([1]))
        masks.append(found[scores.argmax()])
    assert (masks[0] & masks[1]).sum() >= 0.99 * (masks[0] | masks[1]).sum()


def test_a_full_gpu_leaves_a_model_parked_until_there_is_room(handler: BigHandler) -> None:
    before = handler.network["first"].weight.cpu()
    state_after(handler, "park")
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        reply = command(handler, "wake")
        assert (reply.status, reply.error["code"]) == (507, "out_of_memory")
        assert state_after(handler, "status")["state"] == "parked"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert state_after(handler, "wake")["state"] == "ready"
    assert torch.equal(handler.network["first"].weight.cpu(), before)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("cuda"), demo_store) as running:
        yield running


def models(server: Server) -> dict[str, Any]:
    return dict(server.http.get("/v1/models").json())


def loaded(server: Server) -> list[dict[str, Any]]:
    return [model for model in models(server)["models"] if model["state"] == "ready"]


def only_sam(server: Server, dog: bytes) -> None:
    for model in loaded(server):
        server.http.post(f"/v1/models/{model['name']}/unload").raise_for_status()
    server.ask("sam", image=dog, gen_args=CLICK)


def worker_of(server: Server) -> int:
    """The process of the one loaded model."""
    device = CudaDevice(0)
    (pid,) = [process.pid for process in server.family() if device.used_by(process.pid)]
    return pid


@pytest.mark.torchserve
def test_sam_and_lama_answer_as_on_the_cpu(
    server: Server, open_handler: Callable[[str], HandlerClient], dog: bytes, dog_mask: bytes
) -> None:
    headers = {"accept": "image/png"}
    click = {"image": ("dog.png", dog), "gen_args": (None, '{"point_coords": [750, 500]}')}
    mask = pixels(server.http.post("/predictions/sam", files=click, headers=headers).content) > 127
    expected = open_handler("sam").json(image=dog, gen_args=CLICK).picture > 127
    assert (mask & expected).sum() > 0.97 * (mask | expected).sum()

    hole = {"image": ("dog.png", dog), "mask_image": ("mask.jpg", dog_mask)}
    erased = pixels(server.http.post("/predictions/lama", files=hole, headers=headers).content).astype(int)
    wanted = open_handler("lama").json(image=dog, mask_image=dog_mask).picture.astype(int)
    assert np.abs(erased - wanted).mean() < 0.5
    assert np.percentile(np.abs(erased - wanted), 99.9) < 24


@pytest.mark.torchserve
def test_one_seed_means_one_picture_on_every_device(
    server: Server, open_handler: Callable[[str], HandlerClient], dog: bytes, dog_mask: bytes
) -> None:
    wish = {"num_inference_steps": 10, "seed": 7}
    files = {"image": ("dog.png", dog), "mask_image": ("mask.jpg", dog_mask), "prompt": (None, "a red ball")}
    answers = [
        server.http.post(
            "/predictions/sd",
            files=files | {"gen_args": (None, '{"num_inference_steps": 10, "seed": 7}')},
            headers={"accept": "image/png"},
        ).content
        for _ in range(2)
    ]
    on_gpu, again = (pixels(answer).astype(int) for answer in answers)
    assert np.abs(on_gpu - again).mean() < 0.1
    on_cpu = open_handler("sd").json(image=dog, mask_image=dog_mask, prompt="a red ball", gen_args=wish).picture
    changed = np.any(on_cpu != pixels(dog)[..., :3], axis=2)
    assert np.abs(on_gpu - on_cpu.astype(int))[changed].mean() < 12


@pytest.mark.torchserve
def test_the_books_are_those_of_the_driver_and_no_start_was_slow(server: Server, dog: bytes) -> None:
    only_sam(server, dog)
    (sam,) = loaded(server)
    assert sam["place"] == "gpu"
    used = CudaDevice(0).used_by(worker_of(server))
    assert used is not None
    assert used > 100 * MIB
    assert sam["reserved_bytes"] >= 0.8 * used
    assert models(server)["memory"]["budget_bytes"] == int(CudaDevice(0).total * 0.92)
    assert "palimpsest_worker_slow_starts_total 0" in server.http.get("/metrics").text


@pytest.mark.torchserve
def test_a_killed_worker_gives_its_memory_back_and_the_next_request_is_served(server: Server, dog: bytes) -> None:
    only_sam(server, dog)
    pid = worker_of(server)
    os.kill(pid, signal.SIGKILL)
    until(lambda: CudaDevice(0).used_by(pid) is None)
    until(lambda: not loaded(server))
    server.ask("sam", image=dog, gen_args=CLICK)
    assert worker_of(server) != pid


@pytest.mark.torchserve
def test_the_standby_worker_becomes_the_next_one_and_has_cuda_set_up(server: Server, dog: bytes) -> None:
    def metric(name: str) -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"palimpsest_{name} "))

    for model in loaded(server):
        server.http.post(f"/v1/models/{model['name']}/unload").raise_for_status()
    until(lambda: metric("standby_workers") == 1)
    standbys = {process.pid for process in server.family() if CudaDevice(0).used_by(process.pid)}
    before = metric("standby_starts_total")
    server.ask("sam", image=dog, gen_args=CLICK)
    assert metric("standby_starts_total") == before + 1
    assert server.worker("sam").pid in standbys
    assert metric("worker_slow_starts_total") == 0


SUSPENDS = """
import os, torch
from handlers.worker import suspension
from serve.residency.memory import CudaDevice
tensor = torch.arange(2**24, device="cuda")
pinned = torch.ones(2**20, pin_memory=True)
torch.cuda.synchronize()
device, pid = CudaDevice(0), os.getpid()
for _ in range(3):
    assert device.used_by(pid)
    suspension.suspend()
    assert not device.used_by(pid)
    suspension.resume()
    assert torch.equal(tensor.cpu(), torch.arange(2**24))
    assert pinned.cuda().sum().item() == 2**20
"""


@pytest.mark.skipif(not find_device().suspends, reason="needs a driver with the process checkpoint")
def test_the_driver_takes_a_process_off_the_gpu_and_puts_it_back_with_all_it_had() -> None:
    """In a process of its own: one that cannot be resumed is lost."""
    done = subprocess.run([sys.executable, "-c", SUSPENDS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


SPOILT_AFTER = """
import ctypes
from serve.engine.zygote import unsafe_to_fork
ctypes.CDLL("libcuda.so.1")
print(unsafe_to_fork())
import torch
torch.cuda.init()
print(unsafe_to_fork())
"""


def test_a_zygote_is_spoilt_by_cuda_and_not_by_the_drivers_library() -> None:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SPOILT_AFTER], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    before, after = done.stdout.splitlines()
    assert before == "None"
    assert after != "None"
