"""Where to crop, and how a crop maps onto a model's canvas. Pure functions on sizes and masks."""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from handlers.editing import imaging
from handlers.pictures.picture import RGB, Mask

Cells = NDArray[np.intp]
"""Nx2: (row, column) of cells of a coarse grid."""

# A model's native side is this many cells.
_CELLS = 16
# What is thicker than this can't be painted piece by piece: a piece's middle would lie too far from what is known.
_THIN_CELLS = 4


class Box(NamedTuple):
    """A pixel rectangle: left and top inside, right and bottom outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """The view of `array` (HxW...) inside this box."""
        return array[self.top : self.bottom, self.left : self.right]

    def moved(self, right: int, down: int) -> "Box":
        return Box(self.left + right, self.top + down, self.right + right, self.bottom + down)

    def expanded(self, margin: int, size: tuple[int, int]) -> "Box":
        """Larger by `margin` on each side, cut to a picture of `size` (width, height)."""
        return Box(
            max(self.left - margin, 0),
            max(self.top - margin, 0),
            min(self.right + margin, size[0]),
            min(self.bottom + margin, size[1]),
        )


class Piece(NamedTuple):
    """One run of a model: `box` is what it sees, `hole` (as large as box) what it is to paint there."""

    box: Box
    hole: Mask


class Fit(NamedTuple):
    """How a crop maps onto a canvas: resized to `inner` with its aspect kept, the rest of `canvas` padded.

    All are (width, height). Where inner equals crop nothing is resampled, and take(put(x)) is x.
    """

    crop: tuple[int, int]
    inner: tuple[int, int]
    canvas: tuple[int, int]

    @classmethod
    def within(cls, box: Box, limit: int) -> "Fit":
        """Shrunk where a side is over `limit`; no padding."""
        longest = max(box.width, box.height)
        inner = _scaled(box, min(longest, limit), longest)
        return cls((box.width, box.height), inner, inner)

    @classmethod
    def square(cls, box: Box, side: int) -> "Fit":
        """Scaled, up or down, so that the longer side is `side`; padded to a square."""
        inner = _scaled(box, side, max(box.width, box.height))
        return cls((box.width, box.height), inner, (side, side))

    def put(self, crop: RGB) -> RGB:
        """crop -> canvas; the padding repeats the edge, so that it adds no false contour."""
        inner = _resize(crop, self.inner)
        right, below = self.canvas[0] - self.inner[0], self.canvas[1] - self.inner[1]
        return np.asarray(cv2.copyMakeBorder(inner, 0, below, 0, right, cv2.BORDER_REPLICATE))

    def put_mask(self, mask: Mask) -> Mask:
        """Any canvas pixel that a True pixel touches is True; the padding is False."""
        canvas = np.zeros(self.canvas[::-1], bool)
        if self.inner != self.crop:
            # The area average of floats keeps a trace of every pixel, however small it becomes.
            mask = cv2.resize(mask.astype(np.float32), self.inner, interpolation=cv2.INTER_AREA) > 0
        canvas[: self.inner[1], : self.inner[0]] = mask
        return canvas

    def take(self, canvas: RGB) -> RGB:
        """canvas -> crop: the reverse of put."""
        return _resize(np.ascontiguousarray(canvas[: self.inner[1], : self.inner[0]]), self.crop)

    def take_mask(self, canvas: Mask) -> Mask:
        """canvas -> crop: every pixel that `take` computes from a True one is True."""
        inner = canvas[: self.inner[1], : self.inner[0]]
        if self.inner == self.crop:
            return inner
        # Cubic interpolation reaches two pixels far.
        reached = cv2.dilate(inner.astype(np.float32), np.ones((5, 5), np.uint8))
        return np.asarray(cv2.resize(reached, self.crop, interpolation=_method(self.inner, self.crop)) > 0)


def bounding_box(mask: Mask) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def context_box(mask: Mask, native: int) -> Box:
    """A box around the mask for a model that works at `native` x `native` pixels.

    Square, centred on the mask, moved and at last cut to lie inside the picture. Its side is `native`, so that nothing
    is resampled, for a mask of up to 80 % of that; 1.5 times the mask's longer side for larger ones.
    """
    height, width = mask.shape
    inner = bounding_box(mask)
    longest = max(inner.width, inner.height)
    side = native if longest * 1.25 <= native else round(longest * 1.5)
    left, right = _span(inner.left, inner.right, side, width)
    top, bottom = _span(inner.top, inner.bottom, side, height)
    return Box(left, top, right, bottom)


def pieces(mask: Mask, native: int, context: int) -> list[Piece]:
    """Splits a mask into runs of a model that should see at most `native` x `native` pixels (a multiple of 16).

    Each run sees its part of the mask and `context` px around it (native / 4 at most). Parts share a run where it sees
    fewer pixels than theirs would see together, and at most `native` x `native`. What is larger than that and thin (a
    wire, a frame) is painted along its length, so that it needs no scaling; what is larger and thick gets a crop of its
    own, with at least a quarter of its longer side around, to be scaled. The number of runs depends on the picture's
    area, not on the number of blobs. The holes are disjoint and together are the mask.
    """
    cell = native // _CELLS
    grid = _Grid(cell, (native - 2 * context) // cell, context)
    return [_piece(mask, group, grid) for group in _packed(_units(mask, grid), grid)]


class _Grid(NamedTuple):
    """cell: px. most: cells that a run's part of the mask may be wide. context: px around that."""

    cell: int
    most: int
    context: int

    def fits(self, extent: tuple[int, int, int, int]) -> bool:
        top, left, bottom, right = extent
        return max(bottom - top, right - left) <= self.most

    def cost(self, extent: tuple[int, int, int, int]) -> int:
        """The pixels that a run sees, and as many as it would see around nothing, so that runs are few."""
        top, left, bottom, right = extent
        around = 2 * self.context
        return ((bottom - top) * self.cell + around) * ((right - left) * self.cell + around) + around**2


def _units(mask: Mask, grid: _Grid) -> list[Cells]:
    """Sets of cells that must not be torn apart: whole blobs, but single cells of those that are long and thin."""
    marked = imaging.cells(mask, grid.cell)
    _, labels = cv2.connectedComponents(marked.astype(np.uint8), connectivity=8)
    found = np.argwhere(marked)
    label = labels[marked]
    order = np.argsort(label, kind="stable")
    blobs = np.split(found[order], np.flatnonzero(np.diff(label[order])) + 1)
    units: list[Cells] = []
    for blob in blobs:
        torn = not grid.fits(_extent(blob)) and _is_thin(mask, blob, grid.cell)
        units += np.split(blob, len(blob)) if torn else [blob]
    return units


def _packed(units: list[Cells], grid: _Grid) -> list[Cells]:
    """First fit: each unit joins the first group with which one run is cheaper than two; then so do the groups."""
    groups: list[list[Cells]] = []
    extents: list[tuple[int, int, int, int]] = []
    for unit in units:
        own = _extent(unit)
        for index, extent in enumerate(extents):
            joint = _joint(own, extent)
            if grid.fits(joint) and grid.cost(joint) <= grid.cost(own) + grid.cost(extent):
                groups[index].append(unit)
                extents[index] = joint
                break
        else:
            groups.append([unit])
            extents.append(own)
    packed = [np.concatenate(group) for group in groups]
    return packed if len(packed) == len(units) else _packed(packed, grid)


def _piece(mask: Mask, group: Cells, grid: _Grid) -> Piece:
    height, width = mask.shape
    cell = grid.cell
    top, left, bottom, right = _extent(group)
    own = np.zeros((bottom - top, right - left), bool)
    own[group[:, 0] - top, group[:, 1] - left] = True
    around = Box(left * cell, top * cell, min(right * cell, width), min(bottom * cell, height))
    own_pixels = own.repeat(cell, axis=0).repeat(cell, axis=1)[: around.height, : around.width]
    local = around.of(mask) & own_pixels
    tight = bounding_box(local)
    inner = tight.moved(around.left, around.top)
    around_large = 0 if grid.fits((top, left, bottom, right)) else max(inner.width, inner.height) // 4
    box = inner.expanded(max(grid.context, around_large), (width, height))
    hole = np.zeros((box.height, box.width), bool)
    inner.moved(-box.left, -box.top).of(hole)[:] = tight.of(local)
    return Piece(box, hole)


def _is_thin(mask: Mask, blob: Cells, cell: int) -> bool:
    height, width = mask.shape
    top, left, bottom, right = _extent(blob)
    # With a pixel of what is around, or a wire that fills its cells would have no edge.
    box = Box(left * cell, top * cell, right * cell, bottom * cell).expanded(1, (width, height))
    distance = imaging.distance_inside(box.of(mask))
    return float(distance.max()) * 2 <= _THIN_CELLS * cell


def _extent(group: Cells) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) in cells."""
    (top, left), (bottom, right) = group.min(axis=0), group.max(axis=0)
    return int(top), int(left), int(bottom) + 1, int(right) + 1


def _joint(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _scaled(box: Box, to: int, longest: int) -> tuple[int, int]:
    return max(1, round(box.width * to / longest)), max(1, round(box.height * to / longest))


def _resize(pixels: RGB, size: tuple[int, int]) -> RGB:
    height, width = pixels.shape[:2]
    if size == (width, height):
        return pixels
    return np.asarray(cv2.resize(pixels, size, interpolation=_method((width, height), size)))


def _method(old: tuple[int, int], new: tuple[int, int]) -> int:
    return int(cv2.INTER_AREA if new[0] < old[0] or new[1] < old[1] else cv2.INTER_CUBIC)


def _span(low: int, high: int, side: int, limit: int) -> tuple[int, int]:
    side = min(side, limit)
    start = min(max((low + high - side) // 2, 0), limit - side)
    return start, start + side
