"""handlers.sam.network: published sizes, loading without a copy, half-precision encoder."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from segment_anything import SamPredictor, sam_model_registry
from segment_anything.modeling.image_encoder import Block

from handlers.sam import network
from handlers.sam.attention import FusedAttention, _places, fuse
from handlers.sam.decoder import candidates, mask_of
from handlers.sam.embeddings import Sight
from handlers.sam.prompt import Prompt
from handlers.sam.resize import Resize

SAM = Path(network.__file__).parent
DEMO = SAM / "demo" / "network.yaml"
WEIGHTS = SAM / "demo" / "weights.safetensors"
DATA = Path(__file__).parent / "data"


@pytest.mark.slow
@pytest.mark.parametrize("size", ["vit_h", "vit_l", "vit_b"])
def test_published_sizes_have_the_published_parameters(size: str) -> None:
    with torch.device("meta"):
        ours = network.build(network.load_config(SAM / f"{size}.yaml"))
        published = sam_model_registry[size]()

    def shapes(sam: torch.nn.Module) -> dict[str, torch.Size]:
        return {key: tensor.shape for key, tensor in sam.state_dict().items()}

    assert shapes(ours) == shapes(published)
    assert ours.image_encoder.img_size == published.image_encoder.img_size
    assert [block.window_size for block in ours.image_encoder.blocks] == [
        block.window_size for block in published.image_encoder.blocks
    ]


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam") / "weights.safetensors"
    save_file(network.build(network.load_config(DEMO)).state_dict(), path)
    return path


@pytest.mark.slow
def test_load_restores_every_tensor_and_the_pixel_statistics(random_weights: Path) -> None:
    torch.manual_seed(0)
    built = network.build(network.load_config(DEMO))
    loaded = network.load(DEMO, random_weights)
    assert all(not parameter.is_meta for parameter in loaded.parameters())
    assert not loaded.training
    for key, tensor in built.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, rtol=0, atol=0)
    torch.testing.assert_close(loaded.pixel_mean, built.pixel_mean)
    torch.testing.assert_close(loaded.pixel_std, built.pixel_std)


def test_load_names_a_missing_tensor(random_weights: Path, tmp_path: Path) -> None:
    state = network.build(network.load_config(DEMO)).state_dict()
    del state["mask_decoder.iou_token.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(RuntimeError, match=r"mask_decoder\.iou_token\.weight"):
        network.load(DEMO, tmp_path / "weights.safetensors")


def test_config_names_a_missing_key() -> None:
    config = network.load_config(DEMO)
    del config["embedding_dim"]
    with pytest.raises(KeyError, match="embedding_dim"):
        network.build(config)


@pytest.fixture(scope="module")
def dog() -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(DATA / "dog-on-bench.png")), cv2.COLOR_BGR2RGB)


@pytest.fixture(scope="module")
def dog_mask() -> np.ndarray:
    return cv2.imread(str(DATA / "dog-on-bench-mask.jpg"), cv2.IMREAD_GRAYSCALE) >= 128


def predictor(picture: np.ndarray, dtype: torch.dtype = torch.float32) -> SamPredictor:
    result = SamPredictor(network.load(DEMO, WEIGHTS, encoder_dtype=dtype))
    result.set_image(picture)
    return result


def best_mask(sam: SamPredictor, points: list[list[int]], labels: list[int], logits: Any = None) -> tuple[Any, Any]:
    masks, scores, low = sam.predict(
        np.array(points), np.array(labels), mask_input=logits, multimask_output=len(points) == 1
    )
    best = scores.argmax()
    return masks[best], low[best : best + 1]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.95), (torch.float16, 0.99)])
def test_a_half_precision_encoder_finds_the_same_mask(dog: np.ndarray, dtype: torch.dtype, least: float) -> None:
    exact, half = predictor(dog), predictor(dog, dtype)
    assert half.model.image_encoder.neck[0].weight.dtype == dtype
    assert half.get_image_embedding().dtype == torch.float32
    assert {parameter.dtype for parameter in half.model.mask_decoder.parameters()} == {torch.float32}
    point, label = [[750, 500]], [1]
    assert iou(best_mask(half, point, label)[0], best_mask(exact, point, label)[0]) >= least


def test_the_shipped_weights_find_the_dog(dog: np.ndarray, dog_mask: np.ndarray) -> None:
    mask, _ = best_mask(predictor(dog), [[750, 500]], [1])
    assert iou(mask, dog_mask) >= 0.6


def test_clicks_on_what_is_wrong_improve_the_mask(dog: np.ndarray, dog_mask: np.ndarray) -> None:
    """Each further click is put where the mask is wrong by the widest, as SAM is evaluated; logits are passed on."""
    sam = predictor(dog)
    points, labels = [[750, 500]], [1]
    mask, logits = best_mask(sam, points, labels)
    first = iou(mask, dog_mask)
    for _ in range(2):
        wrong = cv2.distanceTransform((mask != dog_mask).astype(np.uint8), cv2.DIST_L2, 5)
        y, x = np.unravel_index(wrong.argmax(), wrong.shape)
        points.append([int(x), int(y)])
        labels.append(int(dog_mask[y, x]))
        mask, logits = best_mask(sam, points, labels, logits)
    assert iou(mask, dog_mask) > first + 0.05


@pytest.mark.parametrize("bench", [[480, 560], [1050, 560]])
def test_a_negative_click_takes_away_what_a_positive_one_adds(
    dog: np.ndarray, dog_mask: np.ndarray, bench: list[int]
) -> None:
    sam, points = predictor(dog), [[750, 500], bench]
    both, logits = best_mask(sam, points, [1, 1])
    assert both[bench[1], bench[0]]
    alone, _ = best_mask(sam, points, [1, 0], logits)
    assert not alone[bench[1], bench[0]]
    assert iou(alone, dog_mask) > iou(both, dog_mask) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("side", "window"), [(16, 0), (64, 0), (16, 8), (16, 14), (64, 14)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fused_attention_is_the_librarys(side: int, window: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is for a GPU is computed on the CPU here."""
    torch.manual_seed(0)
    plain = Block(32, num_heads=2, use_rel_pos=True, window_size=window, input_size=(side, side))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(plain)
    fuse(SimpleNamespace(blocks=[fused]))
    if device == "cuda":
        monkeypatch.setattr(FusedAttention, "_attend_on_cpu", FusedAttention._attend)
    tokens = torch.randn(1, side, side, 32)
    with torch.inference_mode():
        expected = plain(tokens)
        torch.testing.assert_close(fused(tokens), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("asked", ["points", "box", "mask"])
def test_masks_are_the_librarys(dog: np.ndarray, asked: str, multimask: bool) -> None:
    sam = predictor(dog)
    sight = Sight((dog.shape[1], dog.shape[0]), sam.input_size, b"", ())
    points = np.array([[750.0, 500], [100, 100]]) if asked != "box" else np.zeros((0, 2))
    box = np.array([400.0, 200, 1100, 900]) if asked == "box" else None
    logits = np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32) if asked == "mask" else None
    prompt = Prompt(points, np.array([1, 0])[: len(points)], box, logits)
    given = (prompt.points, prompt.labels) if len(points) else (None, None)
    masks, scores, low = sam.predict(*given, box=box, mask_input=logits, multimask_output=multimask)
    resize = Resize(sam.model.image_encoder.img_size)
    with torch.inference_mode():
        found = candidates(sam.model, resize, sight, sam.features, prompt, multimask)
        for each, expected in enumerate(masks):
            assert np.array_equal(mask_of(sam.model, sight, found.logits[0, each]), expected)
    assert np.array_equal(found.scores, scores)
    assert np.array_equal(found.logits[0].numpy(), low)


def test_no_work_is_done_for_the_padding_of_windows() -> None:
    block = Block(8, num_heads=2, use_rel_pos=True, window_size=14, input_size=(16, 16))
    fuse(SimpleNamespace(blocks=[block]))
    seen: list[int] = []
    for projection in (block.attn.qkv, block.attn.proj):
        projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel() // 8))
    with torch.inference_mode():
        block(torch.randn(1, 16, 16, 8))
    assert seen == [16 * 16] * 2


def test_the_tables_of_positions_are_made_once_for_all_blocks() -> None:
    _places.cache_clear()
    encoder = network.load(DEMO, WEIGHTS).image_encoder
    with torch.inference_mode():
        for _ in range(2):
            encoder(torch.zeros(1, 3, 128, 128))
    assert _places.cache_info().misses == len({block.attn.window for block in encoder.blocks})


def test_a_served_encoder_is_the_librarys(dog: np.ndarray) -> None:
    plain = network.build(network.load_config(DEMO))
    plain.load_state_dict(load_file(WEIGHTS))
    served = SamPredictor(network.load(DEMO, WEIGHTS))
    served.set_image(dog)
    expected = SamPredictor(plain)
    expected.set_image(dog)
    torch.testing.assert_close(served.features, expected.features, rtol=0, atol=1e-4)
