"""Masks are laid on the picture's edges, whatever the picture and the mask are."""

import cv2
import numpy as np
import pytest
import torch
from conftest import HandlerClient, encoded
from hypothesis import given
from hypothesis import strategies as st
from kornia.filters import guided_blur

from handlers.sam.embeddings import Embeddings
from handlers.sam.snapping import FLAT, RADIUS, guided, small_copy, snapped

HEIGHT, WIDTH = 150, 200
NO_CLICKS = np.zeros((0, 2), np.int64), np.zeros(0, np.int64)


def disc(radius: int, x: int = 100, y: int = 75) -> np.ndarray:
    """HxW bool."""
    return cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), (x, y), radius, 1, -1) > 0


def scene(target: np.ndarray) -> np.ndarray:
    """A grainy picture in which the target has another colour than the rest."""
    picture = np.where(target[..., None], (190, 120, 70), (90, 110, 130))
    return (picture + np.random.default_rng(0).normal(0, 12, picture.shape)).clip(0, 255).astype(np.uint8)


def logits_of(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, 6, -6).astype(np.float32)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("coarse", [disc(34), disc(47), disc(40, 106, 71)], ids=["too small", "too large", "beside it"])
def test_a_coarse_mask_is_laid_on_the_edge(coarse: np.ndarray) -> None:
    target = disc(40)
    shares = snapped(scene(target), logits_of(coarse), *NO_CLICKS)
    assert iou(coarse, target) < 0.8
    assert shares is not None
    assert iou(shares > 0.5, target) > 0.98


def test_far_from_its_rim_a_mask_stays_whatever_the_colours_are() -> None:
    """Another thing of the object's colour does not join it, and a hole of the surroundings' stays the object's."""
    target = disc(40)
    picture = scene(target & ~disc(10) | disc(15, 180, 20))
    shares = snapped(picture, logits_of(target), *NO_CLICKS)
    assert shares is not None
    assert iou(shares > 0.5, target) > 0.98


def test_clicks_hold_whatever_the_colours_say() -> None:
    target = disc(40)
    clicks = np.array([[143, 75], [64, 75], [199, 149], [0, 0]])
    shares = snapped(scene(target), logits_of(target), clicks, np.array([1, 0, 1, 0]))
    assert shares is not None
    assert [bool(shares[y, x] > 0.5) for x, y in clicks] == [True, False, True, False]


@pytest.mark.parametrize("value", [-5.0, 5.0])
def test_where_nothing_or_everything_is_inside_there_is_no_telling(value: float) -> None:
    picture = scene(disc(40))
    assert snapped(picture, np.full((HEIGHT, WIDTH), value, np.float32), *NO_CLICKS) is None


SIDES = st.integers(1, 48) | st.just(256)


@given(SIDES, SIDES, st.integers(0, 2**32 - 1), st.floats(-25, 25), st.sampled_from([1, 3, 256]))
def test_any_picture_and_mask_have_one_answer(height: int, width: int, seed: int, mean: float, colours: int) -> None:
    rng = np.random.default_rng(seed)
    picture = (rng.integers(0, colours, (height, width, 3)) * 255 // max(1, colours - 1)).astype(np.uint8)
    logits = rng.normal(mean, 8, (height, width)).astype(np.float32)
    clicks = np.stack([rng.integers(0, width, 9), rng.integers(0, height, 9)], 1)
    labels = rng.integers(0, 2, 9)
    first = snapped(picture, logits, clicks, labels)
    cv2.setRNGSeed(seed % 1000)  # as whatever ran before may have left it
    second = snapped(picture, logits, clicks, labels)
    if first is None or second is None:
        assert first is second
        return
    assert first.shape == logits.shape
    assert np.isfinite(first).all()
    assert np.array_equal(first, second)


def test_the_guided_filter_is_kornias() -> None:
    rng = np.random.default_rng(0)
    guide, values = rng.random((40, 60, 3), np.float32), rng.random((40, 60), np.float32)
    expected = guided_blur(
        torch.from_numpy(guide).permute(2, 0, 1)[None], torch.from_numpy(values)[None, None], 2 * RADIUS + 1, FLAT
    )
    np.testing.assert_allclose(guided(guide.transpose(2, 0, 1), values), expected[0, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (5000, 1), (300, 700), (2000, 3000), (100, 60)])
def test_the_copy_has_its_longer_side(height: int, width: int) -> None:
    copy = small_copy(np.full((height, width, 3), 77, np.uint8), 256)
    assert max(copy.shape[:2]) == 256
    assert copy.shape[0] == max(1, round(256 * height / max(height, width)))
    assert (copy == 77).all()


def test_clicks_that_leave_nothing_of_a_mask_leave_nothing() -> None:
    """Nor where so little of it is left, in a window so large, that GrabCut sees none."""
    everywhere = np.ones((256, 256), np.uint8)
    for x in range(0, 256, 64):
        everywhere[::64, x] = 0
    small = np.zeros((40, 40), np.float32) - 6
    small[20:24, 20:24] = 6
    for logits in (small, logits_of(everywhere > 0), logits_of(everywhere == 0)):
        picture = np.full((*logits.shape, 3), 90, np.uint8)
        clicks = np.argwhere(logits > 0)[:, ::-1] if logits is small else np.zeros((0, 2), np.int64)
        shares = snapped(picture, logits, clicks, np.zeros(len(clicks), np.int64))
        assert shares is None or not len(clicks) or (shares < 0.5).all()


@pytest.fixture
def sam(open_handler) -> HandlerClient:
    client: HandlerClient = open_handler("sam")
    client.handler.embeddings = Embeddings()
    return client


@pytest.mark.parametrize("scale", [1, 4])
def test_the_answer_follows_the_edge_at_full_resolution(sam: HandlerClient, scale: int) -> None:
    target = cv2.resize(disc(40).astype(np.uint8), None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) > 0
    picture = np.where(target[..., None], (200, 60, 50), (70, 120, 90)).astype(np.uint8)
    answer = sam.json(image=encoded(picture), gen_args={"point_coords": [100 * scale, 75 * scale]})
    assert iou(answer.picture > 0, target) > 0.97


def test_pictures_that_the_encoder_cannot_tell_apart_have_masks_of_their_own(sam: HandlerClient) -> None:
    """What is kept of one is not taken for the other, whose edges are elsewhere."""
    one = np.full((256, 256, 3), 120, np.uint8)
    other = one.copy()
    other[96:160:2, 96:160:2] = other[97:160:2, 97:160:2] = 160  # of which every 2 x 2 pixels have one mean
    other[96:160:2, 97:160:2] = other[97:160:2, 96:160:2] = 80
    click = {"point_coords": [128, 128]}
    alone = sam.json(image=encoded(other), gen_args=click).body
    sam.handler.embeddings = Embeddings()
    sam.json(image=encoded(one), gen_args=click)
    assert sam.json(image=encoded(other), gen_args=click).body == alone


def test_an_answer_is_the_same_for_a_picture_that_is_known(sam: HandlerClient) -> None:
    picture, click = encoded(scene(disc(40))), {"point_coords": [100, 75], "return_logits": True}
    first = sam.json(image=picture, gen_args=click)
    assert sam.json(image=picture, gen_args=click).body == first.body
