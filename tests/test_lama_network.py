"""LaMa's network and its refinement against the golden data of the published reference (tests/data/lama)."""

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

from handlers.building.checkpoint import CheckpointError
from handlers.editing.prefill import prefill
from handlers.lama import network as lama
from handlers.lama.detail import detail
from handlers.lama.folding import folded
from handlers.lama.handler import LamaHandler
from handlers.lama.refinement import refine
from handlers.pictures.picture import Picture
from training.lama_network import PublishedLaMa, product_weights

DATA = Path(__file__).parent / "data" / "lama"
DEMO = Path(lama.__file__).parent / "demo"
BIG_LAMA = Path(lama.__file__).with_name("big_lama.yaml")
PUBLISHED = json.loads((DATA / "big_lama_keys.json").read_text())


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
    network.load_state_dict(golden_weights(), assign=True)
    return network.requires_grad_(False)


def golden_weights() -> dict[str, Tensor]:
    return product_weights(load_file(DATA / "generator.safetensors"), lama.load_config(DATA / "config.yaml"))


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


@pytest.mark.slow
def test_full_size_network_is_what_the_published_keys_and_shapes_fold_to() -> None:
    published = {key: np.broadcast_to(np.float32(1), shape) for key, shape in PUBLISHED.items()}
    with torch.device("meta"):
        network = lama.build(lama.load_config(BIG_LAMA))
    expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert {key: array.shape for key, array in folded(published, 3, 18).items()} == expected
    assert not network.training


def test_a_missing_or_a_strange_tensor_is_named() -> None:
    weights = {key: tensor.numpy() for key, tensor in load_file(DATA / "generator.safetensors").items()}
    for key in ("generator.model.6.conv2.ffc.convg2g.fu.bn.running_var", "generator.model.18.bias"):
        with pytest.raises(CheckpointError, match=key):
            folded({name: array for name, array in weights.items() if name != key}, 3, 2)
    with pytest.raises(CheckpointError, match=r"model\.1\.strange"):
        folded(weights | {"generator.model.1.strange": np.ones(1)}, 3, 2)


@torch.inference_mode()
def test_a_trained_network_and_the_product_s_compute_the_same() -> None:
    torch.manual_seed(5)
    config = lama.load_config(DEMO / "config.yaml")
    published = PublishedLaMa(config).eval()
    for layer in published.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                tensor.uniform_(0.5, 1.5)
    network = lama.build(config)
    network.load_state_dict(product_weights(published.state_dict(), config))
    inputs = torch.rand(2, 4, 40, 56)
    assert torch.allclose(network.generator(inputs), published.generator(inputs), atol=1e-5)


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


def test_what_one_place_cannot_give_a_wide_hole_gets_from_others() -> None:
    """No part of the picture is as wide as the hole."""
    tile = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(3))
    image = tile.repeat(1, 5, 12)
    mask = torch.zeros(1, *image.shape[1:])
    mask[:, :, 70:170] = 1
    found = detail(prefill(image[None], mask[None])[0], mask).abs().amax(dim=0)
    assert (found[:, 75:165] > 0).float().mean() > 0.95


def test_detail_begins_at_nothing_at_a_holes_edge() -> None:
    image = torch.rand(3, 120, 120, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(1, *image.shape[1:])
    mask[:, 40:80, 40:80] = 1
    found = detail(prefill(image[None], mask[None])[0], mask).abs().mean(dim=0)
    edge = torch.cat((found[40, 40:80], found[79, 40:80], found[40:80, 40], found[40:80, 79]))
    assert edge.mean() < 0.3 * found[45:75, 45:75].mean()


@pytest.fixture(scope="module")
def prefilled() -> lama.LaMa:
    config = lama.load_config(DATA / "config.yaml")
    config.generator.prefilled_side = 32
    network = lama.build(config)
    network.load_state_dict(golden_weights())
    return network


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_refines_as_the_authors_do(network: lama.LaMa) -> None:
    image, mask = golden_inputs(3)
    reports: list[tuple[int, int]] = []
    refined = refine(network, image, mask, lambda *report: reports.append(report), least_side=64)
    assert refined is not None
    hole = mask[0, 0] == 1
    assert torch.equal(refined[0, :, ~hole], image[0, :, ~hole])
    apart = np.abs(refined[0, :, hole].numpy() - np.load(DATA / "case3_refined.npy")) * 255
    # Adam magnifies rounding, so a few pixels may be further off with another machine's.
    assert np.quantile(apart, 0.999) <= 2
    assert apart.mean() <= 0.5
    assert reports == [(step, 30) for step in range(1, 31)]


def test_refinement_ends_at_a_step(network: lama.LaMa) -> None:
    class Left(Exception):
        pass

    def leave(step: int, steps: int) -> None:
        if step == 2:
            raise Left

    with pytest.raises(Left):
        refine(network, *golden_inputs(3), leave, least_side=64)


@pytest.mark.slow
def test_refinement_takes_features_of_no_gradient_in_inference_mode(network: lama.LaMa) -> None:
    with torch.inference_mode():
        image, mask = golden_inputs(1)
        mask[..., 20:70, 20:60] = 1
        assert refine(network, image, mask, least_side=36) is not None


@pytest.mark.slow
def test_a_large_picture_is_refined_smaller_and_keeps_its_size(
    network: lama.LaMa, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    forward = lama.Generator.front
    monkeypatch.setattr(lama.Generator, "front", lambda self, x: sizes.append(x.shape[-2:].numel()) or forward(self, x))
    monkeypatch.setattr("handlers.lama.refinement.MOST_PIXELS", 10_000)
    image, mask = golden_inputs(3)
    mask[..., 80:200, 100:300] = 1
    refined = refine(network, image, mask, least_side=40)
    assert refined is not None
    assert refined.shape == image.shape
    assert max(sizes) < 12_000  # padded


@pytest.mark.parametrize("what", ["small", "thin", "all"])
def test_what_can_t_be_refined_is_left_to_one_pass(network: lama.LaMa, what: str) -> None:
    image, mask = torch.rand(1, 3, 128, 128), torch.zeros(1, 1, 128, 128)
    mask[..., 30:90, 30:90] = 1
    if what == "thin":
        mask = torch.zeros_like(mask)
        mask[..., 60:80, :] = 1
    elif what == "all":
        mask = torch.ones_like(mask)
    assert refine(network, image, mask, least_side=100 if what == "small" else 64) is None


@torch.inference_mode()
def test_the_handler_refines_each_crop_and_tells_the_steps(network: lama.LaMa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.lama.refinement.LEAST_SIDE", 64)
    monkeypatch.setattr("handlers.lama.refinement.ITERATIONS", 3)
    handler = LamaHandler()
    handler.network, handler.config, handler.device, handler.dtype = network, {}, torch.device("cpu"), torch.float32
    picture = Picture(np.random.default_rng(2).integers(0, 255, (130, 400, 3), np.uint8))
    mask = np.zeros((130, 400), bool)
    mask[40:90, 40:90] = True
    reports: list[tuple[int, int]] = []
    refined, any_refined = handler.erase_finely(picture, mask, report=lambda *report: reports.append(report))
    assert any_refined
    assert np.array_equal(refined.samples[~mask], picture.samples[~mask])
    assert not np.array_equal(refined.samples, handler.erase(picture, mask).samples)
    assert reports == [(0, 1), (1, 3), (2, 3), (3, 3)]
