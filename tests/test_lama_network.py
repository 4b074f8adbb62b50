"""LaMa's network against the golden data of the published reference (tests/data/lama)."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from handlers.lama import network as lama

DATA = Path(__file__).parent / "data" / "lama"
BIG_LAMA = Path(lama.__file__).with_name("big_lama.yaml")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # On networks this small, handing work to other threads takes longer than the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.device("meta"):
        network = lama.build(lama.load_config(DATA / "config.yaml"))
    network.load_state_dict(load_file(DATA / "generator.safetensors"), assign=True)
    return network


def golden_inputs(case: int) -> tuple[Tensor, Tensor]:
    image = np.array(Image.open(DATA / f"case{case}_image.png").convert("RGB"))
    mask = np.array(Image.open(DATA / f"case{case}_mask.png").convert("L"))
    return torch.from_numpy(image).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask >= 128)[None, None].float()


@pytest.mark.parametrize("case", range(4))
@torch.inference_mode()
def test_predicts_what_the_reference_predicts(network: nn.Module, case: int) -> None:
    image, mask = golden_inputs(case)
    predicted = lama.inpaint(network, image, mask)
    inpainted = mask * predicted + (1 - mask) * image
    assert np.abs(predicted[0].numpy() - np.load(DATA / f"case{case}_predicted.npy")).max() <= 1e-4
    assert np.abs(inpainted[0].numpy() - np.load(DATA / f"case{case}_inpainted.npy")).max() <= 1e-4


def test_full_size_network_has_the_published_keys_and_shapes() -> None:
    with torch.device("meta"):
        network = lama.build(lama.load_config(BIG_LAMA))
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert shapes == json.loads((DATA / "big_lama_keys.json").read_text())
    assert {name for name, _ in network.named_buffers()} <= shapes.keys()
    assert not network.training


@given(height=st.integers(1, 41), width=st.integers(1, 41))
@settings(max_examples=25, deadline=None)
def test_any_size_keeps_its_size(network: nn.Module, height: int, width: int) -> None:
    image, mask = torch.rand(2, 3, height, width), torch.ones(2, 1, height, width)
    with torch.inference_mode():
        predicted = lama.inpaint(network, image, mask)
    assert predicted.shape == image.shape
    assert ((predicted >= 0) & (predicted <= 1)).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (7, 5), (40, 40), (1, 200)])
@torch.inference_mode()
def test_padding_reflects_as_numpy_does(size: tuple[int, int]) -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append(inputs)
            return inputs[:, :3]

    image, mask = torch.rand(1, 3, *size), (torch.rand(1, 1, *size) > 0.5).float()
    lama.inpaint(Recorder(), image, mask)
    padded = [max(-(-length // 8) * 8, 16) for length in size]
    widths = [(0, 0), (0, 0), (0, padded[0] - size[0]), (0, padded[1] - size[1])]
    expected = np.pad(torch.cat((image * (1 - mask), mask), dim=1).numpy(), widths, mode="reflect")
    assert np.array_equal(seen[0].numpy(), expected)


@torch.inference_mode()
def test_what_lies_under_the_mask_is_not_seen(network: nn.Module) -> None:
    image, mask = golden_inputs(0)
    noisy = torch.where(mask == 1, torch.rand_like(image), image)
    assert torch.equal(lama.inpaint(network, noisy, mask), lama.inpaint(network, image, mask))


@torch.inference_mode()
def test_half_precision_transforms_in_float32(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    half = lama.build(lama.load_config(DATA / "config.yaml")).half()
    half.load_state_dict(network.state_dict())
    dtypes = []
    forward = torch.fft.rfft2
    monkeypatch.setattr(torch.fft, "rfft2", lambda x, **kw: dtypes.append(x.dtype) or forward(x, **kw))
    image, mask = golden_inputs(2)
    predicted = lama.inpaint(half, image.half(), mask.half())
    assert predicted.dtype == torch.float16
    assert set(dtypes) == {torch.float32}
    assert (predicted.float() - lama.inpaint(network, image, mask)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training_model.concat_mask", False),
        ("generator.kind", "pix2pixhd_global"),
        ("generator.input_nc", 3),
        ("generator.add_out_act", "tanh"),
        ("generator.init_conv_kwargs.enable_lfu", True),
        ("generator.downsample_conv_kwargs.enable_lfu", True),
        ("generator.resnet_conv_kwargs.enable_lfu", True),
        ("generator.init_conv_kwargs.ratio_gout", 0.5),
        ("generator.resnet_conv_kwargs.ratio_gout", 0.5),
        ("generator.resnet_conv_kwargs.ratio_gin", 1),
        ("generator.n_downsampling", 4),
        ("generator.ngf", None),
        ("generator.spatial_transform_layers", [1]),
        ("generator.resnet_conv_kwargs.gated", True),
    ],
)
def test_unsupported_setting_is_named(key: str, value: object) -> None:
    config = lama.load_config(DATA / "config.yaml")
    OmegaConf.update(config, key, value)
    with pytest.raises(ValueError, match=key.rpartition(".")[2]):
        lama.build(config)


def test_settings_beside_the_generator_are_left_unresolved() -> None:
    config = lama.load_config(DATA / "config.yaml")
    config.losses = OmegaConf.create({"resnet_pl": {"weights_path": "${env:TORCH_HOME}"}})
    with torch.device("meta"):
        lama.build(config)


def test_config_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("- generator\n")
    with pytest.raises(ValueError, match="mapping"):
        lama.load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"training_model\.concat_mask"):
        lama.build(DictConfig({}))
