"""What one run of a model is shown and what of its paint is taken, at every scale."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.editing import geometry
from handlers.editing.edit import Edit
from handlers.editing.geometry import Box, Fit
from handlers.pictures.picture import Picture

NATIVE, CONTEXT = 64, 16
FITS = {"within": Fit.within, "square": Fit.square}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def wire() -> np.ndarray:
    """A mask that is painted piece by piece, in crops that overlap."""
    mask = np.zeros((100, 400), bool)
    mask[48:52, 5:390] = True
    return mask


def test_a_later_run_knows_what_earlier_ones_painted() -> None:
    picture, mask = noise(100, 400), wire()
    edit, unknown, expected = Edit(Picture(picture), mask), mask.copy(), picture.copy()
    known_paint = 0
    for piece in geometry.pieces(mask, NATIVE, CONTEXT):

        def model(rgb: np.ndarray, hole: np.ndarray, box: Box = piece.box) -> np.ndarray:
            nonlocal known_paint
            np.testing.assert_array_equal(hole, box.of(unknown))
            np.testing.assert_array_equal(rgb, box.of(expected))
            known_paint += int((box.of(mask) & ~hole).sum())
            return 255 - rgb

        edit.repaint(piece, Fit.within(piece.box, NATIVE), model)
        here = piece.box.of(expected)
        here[piece.hole] = 255 - here[piece.hole]
        piece.box.of(unknown)[piece.hole] = False
    assert known_paint > 0
    assert not unknown.any()
    np.testing.assert_array_equal(edit.picture.samples, expected)


def test_paint_fades_in_from_the_masks_edge_not_from_a_pieces() -> None:
    grey, mask = np.full((100, 400, 3), 50, np.uint8), wire()
    edit = Edit(Picture(grey), mask, feather=1)
    pieces = geometry.pieces(mask, NATIVE, CONTEXT)
    assert len(pieces) > 4
    for piece in pieces:
        edit.repaint(piece, Fit.within(piece.box, NATIVE), lambda rgb, hole: np.full_like(rgb, 250))
    row = edit.picture.samples[:, :, 0]
    assert row[47:53, 200].tolist() == [50, 150, 250, 250, 150, 50]
    assert set(row[50, 6:389]) == {250}


def test_half_of_a_step_is_rounded_not_cut() -> None:
    edit = Edit(Picture(np.full((9, 9, 3), 10, np.uint8)), np.ones((9, 9), bool) & (np.arange(9) > 3), feather=2)
    (piece,) = geometry.pieces(np.ones((9, 9), bool) & (np.arange(9) > 3), NATIVE, CONTEXT)
    edit.repaint(piece, Fit.within(piece.box, NATIVE), lambda rgb, hole: np.full_like(rgb, 15))
    assert edit.picture.samples[4, :, 0].tolist() == [10, 10, 10, 10, 12, 13, 15, 15, 15]  # 11.67, 13.33


def test_neither_picture_nor_mask_is_written_to() -> None:
    picture, mask = noise(40, 40), np.ones((40, 40), bool)
    before = picture.copy()
    (piece,) = geometry.pieces(mask, NATIVE, CONTEXT)
    Edit(Picture(picture), mask).repaint(piece, Fit.within(piece.box, NATIVE), lambda rgb, hole: 255 - rgb)
    np.testing.assert_array_equal(picture, before)
    assert mask.all()


sides = st.integers(1, 200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FITS)
@settings(deadline=None, max_examples=150)
@given(sides, sides, st.integers(8, 64), st.data())
def test_all_that_a_changed_pixel_reaches_is_taken(
    kind: str, width: int, height: int, side: int, data: st.DataObject
) -> None:
    """Where the resampled paint differs from the resampled picture, it is the paint that ends in the picture."""
    box = Box(0, 0, width, height)
    fit, picture = FITS[kind](box, side), noise(height, width)
    x, y = data.draw(st.integers(0, fit.inner[0] - 1)), data.draw(st.integers(0, fit.inner[1] - 1))
    mask = np.ones((height, width), bool)
    seen: list[np.ndarray] = []

    def model(rgb: np.ndarray, hole: np.ndarray) -> np.ndarray:
        assert hole[: fit.inner[1], : fit.inner[0]].all()
        painted = rgb.copy()
        painted[y, x] ^= 255
        seen.extend([rgb, painted])
        return painted

    edit = Edit(Picture(picture), mask)
    edit.repaint(geometry.Piece(box, mask), fit, model)
    before, after = fit.take(seen[0]), fit.take(seen[1])
    reached = (before != after).any(axis=2)
    np.testing.assert_array_equal(edit.picture.samples[reached], after[reached])
    # And no more than what cubic interpolation, with a pixel to spare, may reach.
    far = np.ones((height, width), bool)
    scale_x, scale_y = width / fit.inner[0], height / fit.inner[1]
    left, right = int((x - 5) * scale_x), int((x + 6) * scale_x) + 1
    top, bottom = int((y - 5) * scale_y), int((y + 6) * scale_y) + 1
    far[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = False
    np.testing.assert_array_equal(edit.picture.samples[far], picture[far])


@pytest.mark.slow
@pytest.mark.parametrize("kind", FITS)
@settings(deadline=None, max_examples=150)
@given(sides, sides, st.integers(8, 64), st.data())
def test_a_single_masked_pixel_is_unknown_to_the_model(
    kind: str, width: int, height: int, side: int, data: st.DataObject
) -> None:
    fit = FITS[kind](Box(0, 0, width, height), side)
    mask = np.zeros((height, width), bool)
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    mask[row, column] = True
    canvas = fit.put_mask(mask)
    assert canvas.shape == fit.canvas[::-1]
    x, y = column * fit.inner[0] // width, row * fit.inner[1] // height
    assert canvas[y, x]
    assert not canvas[fit.inner[1] :].any()
    assert not canvas[:, fit.inner[0] :].any()


@pytest.mark.parametrize("size", [(30, 64), (64, 30), (1, 64), (300, 20)])
def test_what_pads_a_canvas_is_the_pictures_edge(size: tuple[int, int]) -> None:
    width, height = size
    ramp = np.broadcast_to(np.linspace(10, 200, width)[None, :, None], (height, width, 3)).astype(np.uint8).copy()
    fit = Fit.square(Box(0, 0, width, height), NATIVE)
    canvas = fit.put(ramp).astype(int)
    assert canvas.shape == (NATIVE, NATIVE, 3)
    inner = canvas[: fit.inner[1], : fit.inner[0]]
    assert (canvas[fit.inner[1] :, : fit.inner[0]] == inner[-1:]).all()
    assert (canvas[:, fit.inner[0] :] == canvas[:, fit.inner[0] - 1 :][:, :1]).all()


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(8, 512))
def test_a_fit_keeps_the_aspect_and_never_a_side_of_zero(width: int, height: int, side: int) -> None:
    for fit in (Fit.within(Box(0, 0, width, height), side), Fit.square(Box(0, 0, width, height), side)):
        longest = max(fit.inner)
        assert longest == (side if fit.canvas == (side, side) else min(side, max(width, height)))
        for inner, outer in zip(fit.inner, (width, height), strict=True):
            assert inner >= 1
            assert abs(inner - outer * longest / max(width, height)) <= (0.5 if inner > 1 else 1)


def test_shrinking_averages_and_growing_interpolates() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[::2] = 200
    assert (Fit.within(Box(0, 0, 128, 128), 64).put(stripes) == 100).all()
    step = np.zeros((4, 4, 3), np.uint8)
    step[:, 2:] = 200
    row = Fit.square(Box(0, 0, 4, 4), 64).put(step)[32, :, 0].astype(int)
    assert max(np.abs(np.diff(row))) < 30  # not blocks of one colour


# Where a model looks


def test_a_large_mask_has_context_of_half_its_side() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[400:600, 300:700] = True
    assert geometry.context_box(mask, 256) == Box(200, 200, 800, 800)
    assert geometry.context_box(mask, 512) == Box(244, 244, 756, 756)
    assert geometry.context_box(mask, 496) == Box(200, 200, 800, 800)  # 80 % of it are less than the mask
    mask[:] = False
    mask[3:5, 990:] = True
    assert geometry.context_box(mask, 256) == Box(744, 0, 1000, 256)
    mask[:] = False
    mask[300:560, 300:560] = True
    assert geometry.context_box(mask, 300) == Box(235, 235, 625, 625)
    mask[:] = False
    mask[500, 500:701] = True
    assert geometry.context_box(mask, 250).width == 302


def test_pieces_of_a_wire_overlap_their_neighbours() -> None:
    mask = wire()
    pieces = sorted(geometry.pieces(mask, NATIVE, CONTEXT), key=lambda piece: piece.box.left)
    for left, right in pairwise(pieces):
        assert left.box.right - right.box.left >= NATIVE // 8
    for piece in pieces:
        inner = geometry.bounding_box(piece.hole)
        assert inner.top >= NATIVE // 8
        assert piece.box.height - inner.bottom >= NATIVE // 8


def test_what_is_thick_is_painted_at_once_with_a_quarter_around() -> None:
    mask = np.zeros((1000, 1000), bool)
    mask[300:700, 300:720] = True
    (piece,) = geometry.pieces(mask, 256, 32)
    assert piece.box == Box(195, 195, 825, 805)
    # Four cells of 16 pixels are thin, more are thick.
    for thickness, thin in ((62, True), (70, False)):
        mask[:] = False
        mask[500 : 500 + thickness, 50:950] = True
        assert (len(geometry.pieces(mask, 256, 32)) > 1) == thin


def test_a_diagonal_line_is_not_torn_apart() -> None:
    """Its cells touch at their corners only; a speck that some of them fit with must not draw those away."""
    mask = np.zeros((600, 600), bool)
    diagonal = np.arange(80, 240)
    mask[diagonal, diagonal] = mask[3, 3] = True
    speck, line = sorted(geometry.pieces(mask, 256, 32), key=lambda piece: int(piece.hole.sum()))
    assert speck.hole.sum() == 1
    assert line.hole.sum() == len(diagonal)
