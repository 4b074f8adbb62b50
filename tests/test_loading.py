"""Weights: tensors that are the file's own pages, or reach their buffer in one pass; networks made empty."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HandlerClient
from diffusers import StableDiffusionInpaintPipeline
from residence import anonymous, private_pages
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from handlers.sd import network as sd_network
from handlers.weights import tensors as weights
from handlers.weights.mapped_file import MappedFile
from handlers.weights.tensors import CopiedWeights, MappedWeights, empty_network, fill, open_weights

CPU = torch.device("cpu")


def in_float32(name: str) -> torch.dtype:
    return torch.float32


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Sizes that fit no chunk and no alignment, whole numbers, a scalar, nothing at all."""
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(37, 11),
        "a.bias": torch.randn(3),
        "b.half": torch.randn(1001).half(),
        "c.empty": torch.zeros(0, 4),
        "d.batches": torch.tensor(7),
        "e.flags": torch.tensor([True, False, True]),
        "f.large": torch.randn(100, 100),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def copied(path: Path, dtype: torch.dtype, keep_on_host: bool = False) -> CopiedWeights:
    """What a GPU gets, on the CPU."""
    file = MappedFile(path)
    served = {name: dtype if t.is_floating_point() else t.dtype for name, t in file.tensors.items()}
    return CopiedWeights(file, served, CPU, keep_on_host)


def test_a_file_in_the_served_dtypes_is_mapped(path: Path, tensors: dict[str, Tensor]) -> None:
    opened = open_weights(path, CPU, lambda name: tensors[name].dtype)
    assert isinstance(opened, MappedWeights)
    assert opened.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(opened.tensors[name], tensor, rtol=0, atol=0)
    assert opened.device_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_mapped_weights_take_no_memory_of_the_workers_own(tmp_path: Path) -> None:
    size = 64 << 20
    save_file({"weight": torch.ones(size // 4)}, tmp_path / "w.safetensors")
    before = anonymous()
    opened = open_weights(tmp_path / "w.safetensors", CPU, in_float32)
    assert float(opened.tensors["weight"].sum()) == size // 4
    assert anonymous() - before < size / 8
    assert private_pages(tmp_path / "w.safetensors") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_other_file_is_copied_and_converted_in_chunks(
    path: Path, tensors: dict[str, Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK", 4096)
    opened = copied(path, dtype)
    for name, tensor in tensors.items():
        expected = tensor.to(dtype) if tensor.is_floating_point() else tensor
        torch.testing.assert_close(opened.tensors[name], expected, rtol=0, atol=0)
    filled = [tensor for tensor in opened.tensors.values() if tensor.numel()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in filled}) == 1
    assert all(tensor.storage_offset() * tensor.itemsize % weights.ALIGNMENT == 0 for tensor in filled)


def test_a_conversion_is_chosen_by_itself(path: Path) -> None:
    opened = open_weights(path, CPU, in_float32)
    assert isinstance(opened, CopiedWeights)
    assert opened.tensors["b.half"].dtype == torch.float32
    assert opened.host_bytes == 0


def test_a_staging_buffer_is_filled_again_only_once_it_was_copied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device copies when it likes: what it was told to copy has to stay until its event has passed."""
    story: list[tuple[str, int]] = []

    class Event:
        def __init__(self, number: int) -> None:
            self.number = number

        def synchronize(self) -> None:
            story.append(("copied", self.number))

    def event(device: torch.device) -> Event:
        return Event(sum(what == "filled" for what, _ in story) - 1)

    fill_chunk = CopiedWeights._fill

    def filling(self: CopiedWeights, target: Tensor, start: int) -> None:
        fill_chunk(self, target, start)
        story.append(("filled", start // weights.CHUNK))

    monkeypatch.setattr(weights, "CHUNK", 4096)
    monkeypatch.setattr(weights, "_event", event)
    monkeypatch.setattr(CopiedWeights, "_fill", filling)
    copied(path, torch.float32)
    chunks = sum(what == "filled" for what, _ in story)
    assert chunks > 4
    for number in range(2, chunks):
        assert story.index(("copied", number - 2)) < story.index(("filled", number))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04 not what it says", "no safetensors file"),
        (struct.pack("<Q", 1 << 40) + b"{}", "cut short"),
        (struct.pack("<Q", 8) + b"{" * 8, "Expecting"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        MappedFile(tmp_path / "w.safetensors")


def test_a_file_that_was_cut_short_is_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="buffer"):
        MappedFile(path)


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match="F8_E4M3"):
        MappedFile(tmp_path / "w.safetensors")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.ones(1), persistent=False)


def test_an_empty_network_draws_nothing_and_leaves_no_trace() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with empty_network():
        small = Small()
    assert all(tensor.is_meta for tensor in [*small.parameters(), *small.buffers()])
    assert torch.equal(torch.get_rng_state(), state)
    assert not Small().layer.weight.is_meta
    assert not torch.equal(torch.get_rng_state(), state)


def test_initialisers_work_again_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), empty_network():
        _ = 1 / 0
    assert float(nn.init.ones_(torch.zeros(1))) == 1


def test_filling_names_what_does_not_fit() -> None:
    tensors = {name: tensor.clone() for name, tensor in Small().state_dict().items()}

    def made() -> Small:
        with empty_network():
            small = Small()
        small.scale = torch.ones(1)
        return small

    small = made()
    fill(small, tensors)
    assert small.layer.weight.data_ptr() == tensors["layer.weight"].data_ptr()
    assert small.norm.running_var.data_ptr() == tensors["norm.running_var"].data_ptr()
    assert not small.training
    with pytest.raises(RuntimeError, match=r"layer\.bias"):
        fill(made(), {name: tensor for name, tensor in tensors.items() if name != "layer.bias"})
    with pytest.raises(RuntimeError, match=r"layer\.weight is \[5, 4\] in the weights, and \[3, 4\] in the network"):
        fill(made(), tensors | {"layer.weight": torch.zeros(5, 4)})
    with pytest.raises(RuntimeError, match=r"no place for: head\.weight"):
        fill(made(), tensors | {"head.weight": torch.zeros(1)})
    with empty_network():
        forgotten = Small()
    with pytest.raises(RuntimeError, match="scale"):
        fill(forgotten, tensors)


@pytest.mark.parametrize("name", ["sam", "lama", "sd"])
def test_the_warm_up_of_a_gpu_runs(open_handler: Callable[[str], HandlerClient], name: str) -> None:
    ran: list[str] = []
    with register_module_forward_hook(lambda module, *_: ran.append(type(module).__name__)), torch.inference_mode():
        open_handler(name).handler.warm_up()
    assert "Conv2d" in ran


@pytest.fixture
def pipeline_folder(demo_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_store / "demo" / "sd" / "pipeline", tmp_path / "pipeline")


def read(path: Path) -> dict[str, Tensor]:
    return dict(open_weights(path, CPU, in_float32).tensors)


def rename(path: Path, new_name: Callable[[str], str], **more: Tensor) -> None:
    save_file({new_name(name): tensor for name, tensor in load_file(path).items()} | more, path)


@pytest.mark.slow
def test_the_pipeline_is_the_one_that_diffusers_loads(pipeline_folder: Path) -> None:
    theirs: Any = StableDiffusionInpaintPipeline.from_pretrained(pipeline_folder).to(torch.float32)  # as served
    # As the published files are: names of the first releases, position ids among the weights.
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def old_name(name: str) -> str:
        for new, former in old.items():
            name = name.replace(new, former)
        return name

    rename(pipeline_folder / "vae" / "diffusion_pytorch_model.safetensors", old_name)
    positions = torch.arange(77)[None]
    rename(
        pipeline_folder / "text_encoder" / "model.safetensors",
        lambda name: "text_model." + name.removeprefix("text_model."),
        **{"text_model.embeddings.position_ids": positions},
    )
    ours: Any = sd_network.load(pipeline_folder, read, CPU)
    for part in ("unet", "vae", "text_encoder"):
        network, reference = getattr(ours, part), getattr(theirs, part)
        expected = dict([*reference.named_parameters(), *reference.named_buffers()])
        found = dict([*network.named_parameters(), *network.named_buffers()])
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
        assert not network.training
    assert ours.scheduler.config == theirs.scheduler.config
    assert ours.tokenizer("a hamster").input_ids == theirs.tokenizer("a hamster").input_ids
