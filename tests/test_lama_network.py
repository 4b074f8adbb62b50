"""LaMa's network against the golden data of the published reference (tests/data/lama)."""

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
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
from handlers.lama.detail import detail
from handlers.lama.prefill import prefill

DATA = Path(__file__).parent / "data" / "lama"
DEMO = Path(lama.__file__).parent / "demo"
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
        ("generator.prefilled_side", 8),
        ("generator.prefilled_side", "96"),
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
        assert lama.build(config).generator is not None
    assert OmegaConf.to_container(config.losses)["resnet_pl"]["weights_path"] == "${env:TORCH_HOME}"


def test_config_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("- generator\n")
    with pytest.raises(ValueError, match="mapping"):
        lama.load_config(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"training_model\.concat_mask"):
        lama.build(DictConfig({}))


sizes = st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1)


def random_inputs(height: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, height, width, generator=generator)
    return image, (torch.rand(1, 1, height, width, generator=generator) < 0.5).float()


@given(*sizes)
@settings(max_examples=30, deadline=None)
def test_a_guess_continues_what_is_around_the_hole(height: int, width: int, seed: int) -> None:
    image, mask = random_inputs(height, width, seed)
    filled = prefill(image, mask)
    assert torch.allclose(filled * (1 - mask), image * (1 - mask), atol=1e-6)
    if mask.mean() < 1:
        known = image[(mask == 0).expand_as(image)]
        assert filled.min() >= known.min() - 1e-5
        assert filled.max() <= known.max() + 1e-5
    under = torch.where(mask == 1, torch.rand_like(image), image)
    assert torch.equal(prefill(under, mask), filled)


def test_a_guess_takes_the_nearer_colour() -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 8:56] = 1
    filled = prefill(image, mask)[0, 0, 32]
    assert filled[10] < 0.2
    assert filled[53] > 0.8
    assert (filled.diff() > -0.05).all()


def test_detail_is_copied_from_where_the_surroundings_look_alike() -> None:
    tile = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(3))
    image = tile.repeat(1, 10, 13)
    mask = torch.zeros(1, *image.shape[1:])
    mask[:, 50:90, 100:150] = 1
    filled = prefill(image[None], mask[None])[0]
    found, hole = detail(filled, mask), mask[0] == 1
    assert torch.equal(found[:, ~hole], torch.zeros_like(found[:, ~hole]))
    missing = (image - filled)[:, hole]
    assert (missing - found[:, hole]).square().mean() < 0.3 * missing.square().mean()


@pytest.fixture(scope="module")
def prefilled() -> lama.LaMa:
    config = lama.load_config(DATA / "config.yaml")
    config.generator.prefilled_side = 32
    network = lama.build(config)
    network.load_state_dict(load_file(DATA / "generator.safetensors"))
    return network


@given(*sizes)
@settings(max_examples=30, deadline=None)
@torch.inference_mode()
def test_a_prefilled_network_paints_every_size(prefilled: lama.LaMa, height: int, width: int, seed: int) -> None:
    image, mask = random_inputs(height, width, seed)
    painted = lama.inpaint(prefilled, image, mask)
    assert painted.shape == image.shape
    assert painted.min() >= 0
    assert painted.max() <= 1
    under = torch.where(mask == 1, torch.rand_like(image), image)
    assert torch.equal(lama.inpaint(prefilled, under, mask), painted)


@torch.inference_mode()
def test_the_demo_fills_holes_better_than_opencv() -> None:
    """In the sample photograph, on which it was not trained."""
    network = lama.build(lama.load_config(DEMO / "config.yaml"))
    network.load_state_dict(load_file(DEMO / "weights.safetensors"))
    picture = np.array(Image.open(DATA.parent / "dog-on-bench.png").convert("RGB"))
    hole = np.zeros(picture.shape[:2], np.uint8)
    for centre in ((250, 300), (1250, 300), (250, 850), (1200, 850)):
        cv2.ellipse(hole, centre, (150, 100), 20, 0, 360, 1, -1)
    image, mask = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255, torch.from_numpy(hole)[None, None].float()
    ours = lama.inpaint(network, image, mask)[0].permute(1, 2, 0).numpy() * 255
    classical = [cv2.inpaint(picture, hole, 5, method) for method in (cv2.INPAINT_TELEA, cv2.INPAINT_NS)]
    mine, *others = (
        np.square(filled[hole == 1] - picture[hole == 1].astype(float)).mean() for filled in (ours, *classical)
    )
    assert 10 * np.log10(min(others) / mine) > 0.5  # dB
    edges = [np.abs(cv2.Laplacian(x.astype(np.float32), cv2.CV_32F))[hole == 1].mean() for x in (ours, picture)]
    assert edges[0] > 0.3 * edges[1]  # no smear
