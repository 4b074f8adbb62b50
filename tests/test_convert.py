"""Converting checkpoints: every container gives the same tensors, and no pickle gets to run anything."""

import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from handlers.building.checkpoint import CheckpointError, UnsafeCheckpoint, read_tensors
from handlers.building.files import ProgressBar
from handlers.lama import convert as lama_convert
from handlers.lama import network as lama
from handlers.lama.folding import folded
from handlers.sam import convert as sam_convert
from training.lama_network import PublishedLaMa

DATA = Path(__file__).parent / "data" / "lama"
CONFIG = DATA / "config.yaml"
Tensors = dict[str, Tensor]


def silent(what: str, total: int | None) -> nullcontext[Callable[[int], None]]:
    return nullcontext(lambda done: None)


def convert_sam(checkpoint: Path, out: Path) -> None:
    sam_convert.convert({checkpoint.name: checkpoint}, out, silent)


def convert_lama(source: Path, config: Path | None, out: Path, progress: ProgressBar = silent) -> None:
    files = {source.name: source} | ({"config.yaml": config} if config else {})
    lama_convert.convert(files, out, progress)


@pytest.fixture(scope="module")
def generator() -> Tensors:
    return load_file(DATA / "generator.safetensors")


@pytest.fixture
def sam() -> Tensors:
    """A state dict with the names that mark SAM's, in the layouts that tensors can have on disk."""
    shared = torch.randn(4, 6)
    return {
        "image_encoder.patch_embed.proj.weight": torch.randn(8, 3, 4, 4),
        "image_encoder.transposed": shared.T,
        "image_encoder.slice": shared[1:3, ::2],
        "image_encoder.half": torch.randn(5).half(),
        "image_encoder.steps": torch.tensor(7),
        "prompt_encoder.no_mask_embed.weight": torch.randn(1, 8),
        "prompt_encoder.double": torch.randn(3, dtype=torch.float64),
        "prompt_encoder.flags": torch.tensor([True, False]),
        "mask_decoder.iou_token.weight": torch.randn(1, 8),
        "mask_decoder.scalar": torch.tensor(0.1),
        "mask_decoder.empty": torch.zeros(0, 3),
    }


# --- containers ---------------------------------------------------------------------------------------------------


class Rooted(nn.Module):
    """What the published TorchScript export traces: the training module inside a wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.model(torch.cat((image * (1 - mask), mask), dim=1))


def save_lightning(path: Path, generator: Tensors, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Lightning checkpoint with what surrounds the weights; its classes exist only while it is saved."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    weight = torch.randn(3, 3, requires_grad=True)
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    with monkeypatch.context() as patch:
        for depth in range(1, 4):
            module = ".".join(name.split(".")[:depth])
            patch.setitem(sys.modules, module, types.ModuleType(module))
        sys.modules[name].ModelCheckpoint = callback  # type: ignore[attr-defined]
        checkpoint = {
            "epoch": 39,
            "pytorch-lightning_version": "1.2.9",
            "state_dict": OrderedDict(
                {
                    **generator,
                    "discriminator.model0.0.weight": torch.randn(4, 3),
                    "loss_resnet_pl.weight": nn.Parameter(torch.randn(4)),
                }
            ),
            "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "monitor": callback()}},
            "optimizer_states": [optimizer.state_dict()],
            "hyper_parameters": OmegaConf.create({"losses": {"l1": [1, 2.0, "x", None, True]}}),
            "fid": np.float64(1.5),
            "device": torch.device("cpu"),
        }
        torch.save(checkpoint, path)
    return path


def save_torchscript(path: Path, generator: Tensors) -> Path:
    network = PublishedLaMa(lama.load_config(CONFIG)).eval()
    network.load_state_dict(generator)
    traced = torch.jit.trace(Rooted(network), (torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)))
    torch.jit.save(traced, path)
    return path


def zip_of(path: Path, checkpoint: Path, compression: int) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.write(CONFIG, "big-lama/config.yaml")
        archive.write(checkpoint, "big-lama/models/best.ckpt")
    return path


Make = Callable[[Path, Tensors, pytest.MonkeyPatch], tuple[Path, Path | None]]


def stored_zip(folder: Path, generator: Tensors, patch: pytest.MonkeyPatch) -> tuple[Path, None]:
    checkpoint = save_lightning(folder / "inner", generator, patch)
    return zip_of(folder / "big-lama.zip", checkpoint, zipfile.ZIP_STORED), None


def deflated_zip(folder: Path, generator: Tensors, patch: pytest.MonkeyPatch) -> tuple[Path, None]:
    checkpoint = save_lightning(folder / "inner", generator, patch)
    return zip_of(folder / "big-lama.zip", checkpoint, zipfile.ZIP_DEFLATED), None


def unpacked_zip(folder: Path, generator: Tensors, patch: pytest.MonkeyPatch) -> tuple[Path, None]:
    (folder / "config.yaml").write_bytes(CONFIG.read_bytes())
    (folder / "models").mkdir()
    return save_lightning(folder / "models" / "best.ckpt", generator, patch), None


def bare_checkpoint(folder: Path, generator: Tensors, patch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    return save_lightning(folder / "best.ckpt", generator, patch), CONFIG


def torchscript(folder: Path, generator: Tensors, patch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    return save_torchscript(folder / "big-lama.pt", generator), CONFIG


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("make", [stored_zip, deflated_zip, unpacked_zip, bare_checkpoint, torchscript])
def test_lama_containers_give_the_generator_folded(
    make: Make, generator: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    source, config = make(tmp_path / "in", generator, monkeypatch)
    reported: list[int] = []

    def progress(what: str, total: int | None) -> nullcontext[Callable[[int], None]]:
        assert (what, total) == (f"convert {source.name}", source.stat().st_size)
        return nullcontext(reported.append)

    convert_lama(source, config, tmp_path / "out", progress)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.yaml", "weights.safetensors"]
    assert (tmp_path / "out" / "config.yaml").read_bytes() == CONFIG.read_bytes()
    arrays = {name: tensor.numpy() for name, tensor in generator.items()}
    expected = {name: torch.from_numpy(array) for name, array in folded(arrays, 3, 2).items()}
    assert_same(load_file(tmp_path / "out" / "weights.safetensors"), expected)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").iterdir())
    assert min(reported) >= 0
    assert sum(reported) == source.stat().st_size
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    assert_predicts_case_0(tmp_path / "out")


@torch.inference_mode()
def assert_predicts_case_0(archive: Path) -> None:
    with torch.device("meta"):
        network = lama.build(lama.load_config(archive / "config.yaml"))
    network.load_state_dict(load_file(archive / "weights.safetensors"), assign=True)
    image = torch.from_numpy(np.array(Image.open(DATA / "case0_image.png").convert("RGB"))).permute(2, 0, 1) / 255
    mask = torch.from_numpy(np.array(Image.open(DATA / "case0_mask.png").convert("L")) >= 128).float()
    predicted = lama.inpaint(network, image[None], mask[None, None])[0]
    assert np.abs(predicted.numpy() - np.load(DATA / "case0_predicted.npy")).max() <= 1e-4


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_sam_has_its_encoder_in_half_precision_rounded_as_torch_does(sam: Tensors, tmp_path: Path) -> None:
    torch.save(sam, tmp_path / "sam.pth")
    convert_sam(tmp_path / "sam.pth", tmp_path / "out")
    expected = {
        name: tensor.to(torch.float16 if name.startswith("image_encoder.") else torch.float32)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in sam.items()
    }
    assert_same(load_file(tmp_path / "out" / "weights.safetensors"), expected)


def test_half_precision_rounding_of_ties_and_subnormals(sam: Tensors, tmp_path: Path) -> None:
    halves = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).float()
    ties = (halves[1:] + halves[:-1]) / 2
    values = torch.cat((halves, ties, torch.nextafter(ties, halves[1:]), torch.nextafter(ties, halves[:-1])))
    sam["image_encoder.values"] = torch.cat((values, -values))
    torch.save(sam, tmp_path / "sam.pth")
    convert_sam(tmp_path / "sam.pth", tmp_path)
    found = load_file(tmp_path / "weights.safetensors")["image_encoder.values"]
    assert torch.equal(found.view(torch.int16), sam["image_encoder.values"].half().view(torch.int16))


def test_value_too_large_for_half_precision_is_an_error(sam: Tensors, tmp_path: Path) -> None:
    sam["image_encoder.large"] = torch.tensor([1.0, 70000.0])
    torch.save(sam, tmp_path / "sam.pth")
    with pytest.raises(CheckpointError, match=r"image_encoder\.large"):
        convert_sam(tmp_path / "sam.pth", tmp_path)


def test_tensors_are_views_of_the_file(sam: Tensors, tmp_path: Path) -> None:
    torch.save(sam, tmp_path / "sam.pth")
    tensors = read_tensors(tmp_path / "sam.pth")
    assert np.shares_memory(tensors["image_encoder.transposed"], tensors["image_encoder.slice"])
    assert not any(array.flags.writeable for array in tensors.values())


# --- hostile pickles ----------------------------------------------------------------------------------------------


class Calls:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.reduced


def write_checkpoint(path: Path, pickled: bytes, storage: bytes = bytes(16)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", storage)
    return path


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def stack_global(module: str, name: str, argument: str) -> bytes:
    return b"\x80\x04" + short(module) + short(name) + b"\x93" + short(argument) + b"\x85R."


def hostile_pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Programs that would create `marker`, and the name that each must be refused for."""
    command = f"touch {marker}"
    code = f"__import__('os').system({command!r})"
    system = Calls(os.system, command)
    state = OrderedDict({"image_encoder.a": 1.0, "b": {"c": [system]}})
    return {
        "reduce": (pickle.dumps(system, 2), "posix.system"),
        "reduce in protocol 4": (pickle.dumps(system, 4), "posix.system"),
        "eval": (pickle.dumps(Calls(eval, code), 2), "__builtin__.eval"),
        "exec in protocol 5": (pickle.dumps(Calls(exec, code), 5), "builtins.exec"),
        "deep in a state dict": (pickle.dumps(state, 2), "posix.system"),
        "popen": (pickle.dumps(Calls(subprocess.Popen, ["touch", str(marker)]), 4), "subprocess.Popen"),
        "new object": (b"\x80\x02csubprocess\nPopen\n" + short(command) + b"\x85\x81.", "subprocess.Popen"),
        "inst": (b"(S'%s'\nios\nsystem\n." % command.encode(), "os.system"),
        "obj": (b"(cos\nsystem\nS'%s'\no." % command.encode(), "os.system"),
        "getattr": (b"cbuiltins\ngetattr\n(cos\n__dict__\n" + short("system") + b"tR.", "builtins.getattr"),
        "dotted name": (stack_global("pytorch_lightning", "os.system", command), "pytorch_lightning.os.system"),
        "dotted name of a class": (
            stack_global("omegaconf.base", "Metadata.__init__.__globals__", command),
            "omegaconf.base.Metadata.__init__",
        ),
        "module in an allowed package": (
            b"cpytorch_lightning.os\nsystem\n" + short(command) + b"\x85R.",
            "pytorch_lightning.os.system",
        ),
        "prefix only": (stack_global("pytorch_lightning_evil", "Run", command), "pytorch_lightning_evil.Run"),
        "function of an allowed module": (
            stack_global("torch._utils", "_import_dotted_name", "os"),
            "_import_dotted_name",
        ),
        "torch load": (stack_global("torch.serialization", "load", str(marker)), "torch.serialization.load"),
        "persistent id": (b"\x80\x02" + pickle.dumps(system, 2)[2:-1] + b"Q.", "posix.system"),
    }


@pytest.mark.parametrize("style", hostile_pickles(Path("marker")))
def test_hostile_pickle_is_refused_by_name_and_not_run(style: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickled, name = hostile_pickles(marker)[style]
    path = write_checkpoint(tmp_path / "evil.pth", pickled)
    with pytest.raises(UnsafeCheckpoint, match=name.replace(".", r"\.")):
        read_tensors(path)
    with pytest.raises(UnsafeCheckpoint):
        convert_sam(path, tmp_path / "out")
    with pytest.raises(UnsafeCheckpoint):
        convert_lama(zip_of(tmp_path / "evil.zip", path, zipfile.ZIP_DEFLATED), None, tmp_path / "out")
    assert not marker.exists()


def test_allowed_names_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(*names: object) -> None:
        raise AssertionError(f"{names} was looked up")

    module = types.ModuleType("pytorch_lightning.callbacks.evil")
    module.__getattr__ = imported  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks.evil", module)
    pickled = stack_global("pytorch_lightning.callbacks.evil", "Evil", "touch marker")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_tensors(write_checkpoint(tmp_path / "a.pth", pickled))


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02comegaconf.base\nMetadata\n}X\x01\x00\x00\x00a\x4b\x01sb.",  # BUILD on a class
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02(X\x06\x00\x00\x00moduleK\x00K\x00K\x00K\x00tQ.",  # a persistent id that is no storage
        b"\x80\x02K\x01Q.",
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"\x80\x02}",
        b"",
    ],
)
def test_malformed_pickle_is_damage(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(write_checkpoint(tmp_path / "a.pth", pickled))


class Storage:
    def __init__(self, kind: str, numel: int) -> None:
        self.kind, self.numel = kind, numel


class StoragePickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", getattr(torch, obj.kind), "0", "cpu", obj.numel) if isinstance(obj, Storage) else None


def write_tensor(path: Path, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Path:
    tensor = Calls(torch._utils._rebuild_tensor_v2, storage, offset, shape, strides, False, OrderedDict())
    with path.with_suffix(".pkl").open("wb") as file:
        StoragePickler(file, 2).dump({"a": tensor})
    return write_checkpoint(path, path.with_suffix(".pkl").read_bytes())


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides"),
    [
        (4, 1, (4,), (1,)),
        (4, 0, (2, 2), (3, 1)),
        (4, -1, (2,), (1,)),
        (4, 3, (2,), (-1,)),
        (4, 0, (5,), (0,)),
        (4, 0, (2, 2), (1,)),
        (4, 0, (3,), (2**61,)),
        (400, 0, (400,), (1,)),
        (2, 0, (2,), (1,)),
    ],
)
def test_tensor_beyond_its_storage_is_damage(
    numel: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], tmp_path: Path
) -> None:
    path = write_tensor(tmp_path / "a.pth", Storage("FloatStorage", numel), offset, shape, strides)
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(path)


def test_dtype_without_a_counterpart_is_named(tmp_path: Path) -> None:
    path = write_tensor(tmp_path / "a.pth", Storage("BFloat16Storage", 8), 0, (8,), (1,))
    with pytest.raises(CheckpointError, match=r"torch\.BFloat16Storage"):
        read_tensors(path)


# --- other files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_says_so(share: float, sam: Tensors, tmp_path: Path) -> None:
    torch.save(sam, tmp_path / "sam.pth")
    whole = (tmp_path / "sam.pth").read_bytes()
    (tmp_path / "sam.pth").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="cut short: download it again"):
        convert_sam(tmp_path / "sam.pth", tmp_path / "out")


def test_truncated_checkpoint_in_a_zip(generator: Tensors, tmp_path: Path) -> None:
    torch.save(generator, tmp_path / "best.ckpt")
    os.truncate(tmp_path / "best.ckpt", 1000)
    source = zip_of(tmp_path / "big-lama.zip", tmp_path / "best.ckpt", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="cut short"):
        convert_lama(source, None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_flipped_bytes_in_a_compressed_zip(generator: Tensors, tmp_path: Path) -> None:
    torch.save(generator, tmp_path / "best.ckpt")
    source = zip_of(tmp_path / "big-lama.zip", tmp_path / "best.ckpt", zipfile.ZIP_DEFLATED)
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 0xFF
    source.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        convert_lama(source, None, tmp_path / "out")


def test_pickle_without_a_zip_around_it(sam: Tensors, tmp_path: Path) -> None:
    torch.save(sam, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before PyTorch 1\.6"):
        convert_sam(tmp_path / "old.pth", tmp_path / "out")


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b""])
def test_file_of_another_kind(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "sam.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        convert_sam(tmp_path / "sam.pth", tmp_path / "out")


def test_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        convert_lama(tmp_path / "a.zip", CONFIG, tmp_path / "out")


def test_recompressed_checkpoint(sam: Tensors, tmp_path: Path) -> None:
    torch.save(sam, tmp_path / "sam.pth")
    with (
        zipfile.ZipFile(tmp_path / "sam.pth") as archive,
        zipfile.ZipFile(tmp_path / "again.pth", "w", zipfile.ZIP_DEFLATED) as again,
    ):
        for name in archive.namelist():
            again.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        read_tensors(tmp_path / "again.pth")


def test_missing_storage_is_damage(sam: Tensors, tmp_path: Path) -> None:
    torch.save(sam, tmp_path / "sam.pth")
    with (
        zipfile.ZipFile(tmp_path / "sam.pth") as archive,
        zipfile.ZipFile(tmp_path / "less.pth", "w") as less,
    ):
        for name in archive.namelist():
            if not name.endswith("data/0"):
                less.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(tmp_path / "less.pth")


def test_lama_checkpoint_given_as_sam(generator: Tensors, tmp_path: Path) -> None:
    torch.save(generator, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match="sam_vit"):
        convert_sam(tmp_path / "best.ckpt", tmp_path / "out")


def test_sam_checkpoint_given_as_lama(sam: Tensors, tmp_path: Path) -> None:
    torch.save(sam, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"generator\.model\.1\.ffc\.convl2l\.weight is missing"):
        convert_lama(tmp_path / "best.ckpt", CONFIG, tmp_path / "out")


def test_config_of_another_checkpoint(generator: Tensors, tmp_path: Path) -> None:
    torch.save(generator, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"\(8, 4, 7, 7\) .* and \(64, 4, 7, 7\)"):
        convert_lama(tmp_path / "best.ckpt", Path(lama.__file__).with_name("big_lama.yaml"), tmp_path / "out")


def test_config_without_a_generator(generator: Tensors, tmp_path: Path) -> None:
    torch.save(generator, tmp_path / "best.ckpt")
    (tmp_path / "config.yaml").write_text("visualizer: {kind: directory}\n")
    with pytest.raises(CheckpointError, match="not the config of a LaMa generator"):
        convert_lama(tmp_path / "best.ckpt", None, tmp_path / "out")


def test_lama_checkpoint_without_a_config(generator: Tensors, tmp_path: Path) -> None:
    torch.save(generator, tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"without a config\.yaml"):
        convert_lama(tmp_path / "best.ckpt", None, tmp_path / "out")


def test_failed_conversion_leaves_what_was_there(sam: Tensors, tmp_path: Path) -> None:
    sam["mask_decoder.large"] = torch.tensor([1e300], dtype=torch.float64)
    torch.save(sam, tmp_path / "sam.pth")
    out = tmp_path / "out"
    out.mkdir()
    save_file({"old": torch.ones(1)}, out / "weights.safetensors")
    before = (out / "weights.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"mask_decoder\.large"):
        convert_sam(tmp_path / "sam.pth", out)
    assert [path.name for path in out.iterdir()] == ["weights.safetensors"]
    assert (out / "weights.safetensors").read_bytes() == before
