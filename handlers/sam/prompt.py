"""What a request points at: points, labels, a box, an earlier mask; checked against the picture."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from handlers.requests.base64_text import text_to_array
from handlers.requests.errors import BadRequest
from handlers.requests.payload import Arguments, is_number
from handlers.sam.description import BOX, LABELS, MASK_INPUT, MAX_POINTS, POINTS


class Prompt(NamedTuple):
    """points: Nx2 float64, [x, y] in pixels of the upright picture. labels: N int64, 1 or 0. box: 4 float64, left, top,
    right, bottom. mask_input: 1xHxW float32 logits."""

    points: NDArray[np.float64]
    labels: NDArray[np.int64]
    box: NDArray[np.float64] | None
    mask_input: NDArray[np.float32] | None

    @property
    def is_ambiguous(self) -> bool:
        """Whether it is one lone point, which may mean a part or the whole."""
        return self.box is None and self.mask_input is None and len(self.points) == 1


def parse_prompt(arguments: Arguments, size: tuple[int, int], logits_shape: tuple[int, int, int]) -> Prompt:
    """Reads point_coords, point_labels, box and mask_input for a picture of `size` (width, height).

    Raises BadRequest where one is malformed or outside the picture, and where there is neither point nor box.
    """
    points, labels = _points(arguments.structure(POINTS), arguments.structure(LABELS), size)
    box = _box(arguments.structure(BOX), size)
    mask_input = arguments.structure(MASK_INPUT)
    if not len(points) and box is None:
        raise BadRequest(
            "gen_args must hold point_coords ([x, y] or a list of them) or box ([left, top, right, bottom])",
            "gen_args",
        )
    logits = None if mask_input is None else text_to_array(mask_input, logits_shape, "gen_args.mask_input")
    return Prompt(points, labels, box, logits)


def _points(coords: Any, labels: Any, size: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if coords is None and labels is None:
        return np.zeros((0, 2)), np.zeros(0, np.int64)
    points = [coords] if _is_pair(coords) else coords
    if not isinstance(points, list) or not 1 <= len(points) <= MAX_POINTS:
        raise BadRequest(
            f"gen_args.point_coords must be [x, y] or a list of 1 to {MAX_POINTS} of them",
            "gen_args.point_coords",
        )
    marks = [1] * len(points) if labels is None else labels if isinstance(labels, list) else [labels]
    if len(marks) != len(points):
        raise BadRequest(
            f"gen_args.point_labels has {len(marks)} labels for {len(points)} points", "gen_args.point_labels"
        )
    for index, (point, mark) in enumerate(zip(points, marks, strict=True)):
        _check_point(index, point, size)
        _check_label(index, mark)
    return np.array(points, np.float64), np.array(marks, np.int64)


def _check_point(index: int, point: Any, size: tuple[int, int]) -> None:
    where = f"gen_args.point_coords[{index}]"
    if not _is_pair(point):
        raise BadRequest(f"{where} must be two finite numbers [x, y], not {point!r:.60}", "gen_args.point_coords")
    if not (0 <= point[0] <= size[0] and 0 <= point[1] <= size[1]):
        raise BadRequest(
            f"{where} = {point!r:.60} lies outside the {size[0]}x{size[1]} picture", "gen_args.point_coords"
        )


def _check_label(index: int, mark: Any) -> None:
    if isinstance(mark, bool) or mark not in (0, 1):
        raise BadRequest(
            f"gen_args.point_labels[{index}] must be 1 (the object) or 0 (not the object), not {mark!r:.40}",
            "gen_args.point_labels",
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(v) for v in value)


def _box(box: Any, size: tuple[int, int]) -> NDArray[np.float64] | None:
    if box is None:
        return None
    if not (isinstance(box, list) and len(box) == 4 and all(is_number(v) for v in box)):
        raise BadRequest("gen_args.box must be four finite numbers [left, top, right, bottom]", "gen_args.box")
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise BadRequest(
            f"gen_args.box = {box} must have left < right and top < bottom inside the {size[0]}x{size[1]} picture",
            "gen_args.box",
        )
    return np.array(box, np.float64)
