"""Parking: a worker keeps living without its weights, and has the very same ones when it wakes."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import HandlerClient, HandlerReply
from PIL import Image
from residence import anonymous, private_pages, proportional
from safetensors.torch import save_file
from torch import Tensor, nn
from ts.context import RequestProcessor

from handlers.requests.payload import Request
from handlers.requests.reply import Reply
from handlers.weights import tensors as weights
from handlers.weights.mapped_file import MappedFile
from handlers.weights.tensors import CopiedWeights, MappedWeights, empty_network, fill
from handlers.worker.base import Handler

KEY = "a secret of the gateway's"
CPU = torch.device("cpu")
MODELS = ("sam", "lama", "sd")


@pytest.fixture(autouse=True)
def gateways_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_COMMAND_KEY", KEY)


def send(handler: Handler, body: Mapping[str, Any] | None = None, **headers: str) -> HandlerReply:
    """headers: with underscores for hyphens."""
    processor = RequestProcessor({name.replace("_", "-"): value for name, value in headers.items()})
    context = SimpleNamespace(
        request_processor=[processor],
        set_response_status=lambda code, idx: processor.report_status(code),
        set_response_header=lambda idx, name, value: processor.add_response_property(name, value),
        set_response_content_type=lambda idx, value: processor.add_response_property("content-type", value),
    )
    (answer,) = handler.handle([{"body": json.dumps(body or {}).encode()}], context)
    return HandlerReply(processor.get_response_status_code(), processor.get_response_headers(), answer)


def command(handler: Handler, name: str, key: str = KEY) -> HandlerReply:
    return send(handler, X_Palimpsest_Command=name, X_Palimpsest_Key=key)


def state_after(handler: Handler, name: str) -> dict[str, Any]:
    reply = command(handler, name)
    assert reply.status == 200, reply.body
    return reply.fields


class BigHandler(Handler):
    """One matrix of 16 MiB, used twice; a request returns a few numbers of it as a mask."""

    SIDE = 2048

    def load(self, model_dir: Path) -> None:
        with empty_network():
            self.network = nn.ModuleDict({"first": nn.Linear(self.SIDE, self.SIDE, bias=False)})
            self.network["second"] = self.network["first"]
        tensors = self.read_weights(model_dir / "weights.safetensors", lambda name: self.dtype)
        fill(self.network, {f"{part}.weight": tensors["weight"] for part in ("first", "second")})

    def warm_up(self) -> None:
        pass

    def numbers(self) -> Tensor:
        return self.network["second"](torch.ones(1, self.SIDE, dtype=self.dtype))

    def predict(self, request: Request) -> Reply:
        return Reply((self.numbers()[0].reshape(32, 64) > 0).numpy(), {"sum": float(self.numbers().sum())})


BIG = BigHandler.SIDE**2 * 4
# The smaller copy, bfloat16, is half of it. Less than that, the allocator and other tests' leftovers come and go.
LOST_COPY = 0.4 * BIG


def with_big_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    save_file({"weight": torch.randn(BigHandler.SIDE, BigHandler.SIDE)}, folder / "weights.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_big_weights(tmp_path)


def big(folder: Path, dtype: str = "float32", gpu_id: int | None = None) -> BigHandler:
    handler = BigHandler()
    properties = {"model_dir": str(folder), "gpu_id": gpu_id}
    handler.initialize(SimpleNamespace(system_properties=properties, model_yaml_config={"handler": {"dtype": dtype}}))
    return handler


@pytest.fixture
def small_picture(dog: bytes, dog_mask: bytes) -> dict[str, bytes]:
    def reduced(data: bytes, mode: str) -> bytes:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).convert(mode).resize((150, 104)).save(buffer, "PNG")
        return buffer.getvalue()

    return {"image": reduced(dog, "RGB"), "mask_image": reduced(dog_mask, "L")}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_demo_model_answers_the_same_after_it_was_parked(
    demo_store: Path, tmp_path: Path, name: str, small_picture: dict[str, bytes]
) -> None:
    archive = shutil.copytree(demo_store / "demo" / name, tmp_path / name)
    client = HandlerClient(name, archive)
    fields: dict[str, Any] = {"image": small_picture["image"], "gen_args": {"point_coords": [75, 50]}}
    if name != "sam":
        fields = small_picture | {"prompt": "a red ball", "gen_args": {"seed": 1, "num_inference_steps": 1}}
        fields |= {"gen_args": {}} if name == "lama" else {}
    before = client.json(**fields)
    assert before.status == 200
    ready = state_after(client.handler, "status")
    for _ in range(2):
        parked = state_after(client.handler, "park")
        assert (parked["state"], parked["device_bytes"]) == ("parked", 0)
        refused = client.json(**fields)
        assert (refused.status, refused.error["code"]) == (503, "parked")
        woken = state_after(client.handler, "wake")
        assert (woken["state"], woken["device_bytes"]) == ("ready", ready["device_bytes"])
        assert client.json(**fields).body == before.body
    for path in archive.rglob("*.safetensors"):
        assert private_pages(path) == 0


@pytest.mark.slow
def test_parking_takes_the_files_pages_out_of_the_worker_and_waking_puts_them_back(folder: Path) -> None:
    handler = big(folder)
    numbers = handler.numbers()
    path = folder / "weights.safetensors"
    # The first parking also gives back what earlier tests left unused.
    state_after(handler, "park")
    state_after(handler, "wake")
    shared, own = proportional(path), anonymous()
    assert shared >= BIG
    state_after(handler, "park")
    assert proportional(path) == 0
    assert anonymous() - own < LOST_COPY
    state_after(handler, "wake")
    assert torch.equal(handler.numbers(), numbers)
    assert proportional(path) == shared
    assert anonymous() - own < LOST_COPY


def test_converted_weights_are_given_back_and_read_again(folder: Path) -> None:
    handler = big(folder, "bfloat16")
    numbers = handler.numbers()
    for _ in range(2):
        assert state_after(handler, "park")["device_bytes"] == 0
        parked = anonymous()
        assert state_after(handler, "wake")["device_bytes"] == BIG // 2
        assert anonymous() - parked > 0.4 * BIG
        assert torch.equal(handler.numbers(), numbers)
    first, second = handler.network["first"].weight, handler.network["second"].weight
    assert first.data_ptr() == second.data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parking_again_and_again_leaves_nothing_behind(folder: Path, dtype: str) -> None:
    handler = big(folder, dtype)

    def cycle() -> tuple[int, int]:
        state_after(handler, "park")
        state_after(handler, "wake")
        return anonymous(), len(os.listdir("/proc/self/fd"))

    first_memory, first_files = cycle()
    for _ in range(20):
        memory, files = cycle()
    assert memory - first_memory < LOST_COPY
    assert files == first_files


def test_commands_may_be_repeated(folder: Path) -> None:
    handler = big(folder)
    numbers = handler.numbers()
    for name, state in [("wake", "ready"), ("park", "parked"), ("park", "parked"), ("status", "parked")]:
        assert state_after(handler, name)["state"] == state
    assert state_after(handler, "wake")["state"] == "ready"
    assert torch.equal(handler.numbers(), numbers)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["removed", "replaced", "overwritten"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_whose_file_changed_stays_parked_and_says_so(folder: Path, dtype: str, change: str) -> None:
    handler = big(folder, dtype)
    numbers = handler.numbers()
    path, aside = folder / "weights.safetensors", folder / "aside"
    state_after(handler, "park")
    if change == "overwritten":
        with path.open("r+b") as stream:
            stream.truncate(1000)
    else:
        path.rename(aside)
    if change == "replaced":
        shutil.copy(aside, path)
    reply = command(handler, "wake")
    assert (reply.status, reply.error["code"]) == (409, "weights_changed")
    assert "weights.safetensors" in reply.error["message"]
    assert state_after(handler, "status")["state"] == "parked"
    assert send(handler, {}).status == 503
    if change != "overwritten":
        aside.rename(path)
        assert state_after(handler, "wake")["state"] == "ready"
        assert torch.equal(handler.numbers(), numbers)


def test_a_device_without_room_leaves_the_worker_parked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = big(folder)
    numbers = handler.numbers()
    state_after(handler, "park")

    def no_room(self: MappedWeights) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(MappedWeights, "restore", no_room)
        reply = command(handler, "wake")
    assert (reply.status, reply.error["code"]) == (507, "out_of_memory")
    assert state_after(handler, "status")["state"] == "parked"
    state_after(handler, "wake")
    assert torch.equal(handler.numbers(), numbers)


def test_a_host_without_room_leaves_the_worker_ready(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handler = big(folder)

    def no_room(self: MappedWeights) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(MappedWeights, "save", no_room)
    reply = command(handler, "park")
    assert (reply.status, reply.error["code"]) == (507, "out_of_memory")
    assert state_after(handler, "status")["state"] == "ready"
    assert send(handler, {}).status == 200


@pytest.mark.slow
@pytest.mark.parametrize("name", ["park", "wake", "status", "nonsense"])
@pytest.mark.parametrize("key", ["", "guess", KEY + " ", KEY[:-1] + "\u00e9"])
def test_commands_without_the_key_are_refused(folder: Path, name: str, key: str) -> None:
    handler = big(folder)
    reply = command(handler, name, key)
    assert (reply.status, reply.error["code"]) == (403, "forbidden")
    assert send(handler, {}).status == 200


@pytest.mark.parametrize("key", ["", KEY])
def test_a_worker_that_knows_no_key_obeys_nobody(folder: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PALIMPSEST_COMMAND_KEY")
    assert command(big(folder), "park", key).status == 403


def test_an_unknown_command_is_named_as_such(folder: Path) -> None:
    reply = command(big(folder), "explode")
    assert reply.status == 400
    assert "park, wake, suspend, resume, status" in reply.error["message"]


def test_the_phases_of_a_start_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_WORKER_STARTED", str(time.monotonic() - 100_000))
    began = time.monotonic()
    phases = state_after(big(folder), "status")["phases"]
    assert list(phases) == ["fork", "import", "build", "read", "copy", "warm_up"]
    assert all(seconds >= 0 for seconds in phases.values())
    # This process is younger than what it takes for its launcher.
    assert phases["fork"] + phases["import"] == pytest.approx(100_000, abs=5)
    assert phases["fork"] > 1
    assert phases["build"] + phases["read"] + phases["copy"] + phases["warm_up"] <= time.monotonic() - began


class OnGpu:
    """CopiedWeights as a GPU has them, with several blocks and chunks, on the CPU."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(weights, "CHUNK", 1 << 20)
        monkeypatch.setattr(weights, "HOST_BLOCK", 6 << 20)
        self.pinned: list[int] = []
        original = weights._pinned

        def pinned(size: int) -> Tensor:
            self.pinned.append(size)
            return original(size)

        monkeypatch.setattr(weights, "_pinned", pinned)
        file = MappedFile(path)
        self.weights = CopiedWeights(file, {"weight": torch.float32}, CPU, keep_on_host=True)


def test_a_gpus_weights_come_back_from_host_memory_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "weights.safetensors"
    gpu = OnGpu(path, monkeypatch)
    expected = gpu.weights.tensors["weight"].clone()
    assert gpu.pinned == [1 << 20] * 2
    assert gpu.weights.host_bytes == 0
    path.unlink()
    for _ in range(2):
        gpu.weights.save()
        gpu.weights.drop()
        assert (gpu.weights.device_bytes, gpu.weights.host_bytes) == (0, BIG)
        gpu.weights.restore()
        assert torch.equal(gpu.weights.tensors["weight"], expected)
    # Once, in blocks that PyTorch rounds up by less than one.
    assert gpu.pinned[2:] == [6 << 20, 6 << 20, 4 << 20]


def test_a_gpus_weights_stay_where_they_are_when_the_host_has_no_room(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = OnGpu(folder / "weights.safetensors", monkeypatch)
    expected = gpu.weights.tensors["weight"].clone()

    def no_room(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_pinned", no_room)
        with pytest.raises(RuntimeError):
            gpu.weights.save()
    assert (gpu.weights.device_bytes, gpu.weights.host_bytes) == (BIG, 0)
    assert torch.equal(gpu.weights.tensors["weight"], expected)
    gpu.weights.save()
    assert gpu.weights.host_bytes == BIG


def test_views_of_the_weights_survive(folder: Path) -> None:
    """Transposed ones and parts: they look at the same storage."""
    handler = big(folder)
    turned: Callable[[], Tensor] = handler.network["first"].weight.detach().t
    view, corner = turned(), turned()[3:5, 7:9]
    expected = corner.clone()
    state_after(handler, "park")
    state_after(handler, "wake")
    assert torch.equal(corner, expected)
    assert not view.is_contiguous()
    assert torch.equal(view.t(), handler.network["first"].weight)
