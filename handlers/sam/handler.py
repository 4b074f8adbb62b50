"""Segment Anything behind TorchServe: a picture and clicks or a box -> the mask of the object."""

from pathlib import Path
from typing import Any

import numpy as np
from segment_anything import SamPredictor

from handlers import imaging, payload
from handlers.base import Handler
from handlers.payload import Arguments, BadRequest, Reply, Request
from handlers.sam import network

MAX_POINTS = 128
MAX_KERNEL = 255


class SamHandler(Handler):
    """Fields: `image`; `gen_args` with

    point_coords, point_labels: one [x, y] or a list of them, in pixels of the upright picture; 1 marks the object
        (the default), 0 what is not.
    box: [left, top, right, bottom].
    mask_input: the `logits` text of an earlier reply, to refine that mask.
    multimask_output: three candidates or one; by default three for a lone click and one for anything clearer,
        as SAM was trained.
    masks: "best" (the default) or "all".
    return_logits: whether the reply carries `logits`.
    dilate_kernel_size: grows the mask by a square of this many pixels.

    Reply: the best-scored mask, its `score`, its `box`, and on request `masks` with `scores`, and `logits`.
    """

    def load(self, model_dir: Path) -> None:
        self.model = network.load(
            model_dir / "network.yaml", model_dir / "weights.safetensors", self.device, self.dtype
        )

    def warm_up(self) -> None:
        side = self.model.image_encoder.img_size
        predictor = SamPredictor(self.model)
        predictor.set_image(np.zeros((side, side, 3), np.uint8))
        predictor.predict(np.full((1, 2), side / 2), np.ones(1, np.int64))

    def predict(self, request: Request) -> Reply:
        picture = request.picture("image")
        arguments = request.arguments()
        prompt = _prompt(arguments, picture.size, self._logits_shape())
        all_masks = arguments.choice("masks", "best", ("best", "all")) == "all"
        ambiguous = prompt["box"] is None and prompt["mask_input"] is None and len(prompt["point_coords"]) == 1
        multimask = arguments.flag("multimask_output", ambiguous or all_masks)
        return_logits = arguments.flag("return_logits", False)
        kernel_size = arguments.integer("dilate_kernel_size", 0, 0, MAX_KERNEL)
        arguments.finish()

        # A predictor of its own per request: its embedding must never meet another request's clicks.
        predictor = SamPredictor(self.model)
        predictor.set_image(picture.rgb)
        masks, scores, logits = predictor.predict(**prompt, multimask_output=multimask)
        masks = [imaging.dilate(mask, kernel_size) for mask in masks]
        best = int(scores.argmax())
        if not masks[best].any():
            request.warnings.append("nothing was found at this prompt: the mask is empty")

        fields: dict[str, Any] = {"score": _rounded(scores[best]), "box": _box(masks[best])}
        if all_masks:
            fields["masks"] = [payload.to_base64(imaging.encode(mask, "image/png")) for mask in masks]
            fields["scores"] = [_rounded(score) for score in scores]
        if return_logits:
            fields["logits"] = payload.array_to_text(logits[best][None])
        return Reply(masks[best], fields | {"warnings": request.warnings})

    def _logits_shape(self) -> tuple[int, int, int]:
        height, width = self.model.prompt_encoder.mask_input_size
        return 1, height, width


def _prompt(arguments: Arguments, size: tuple[int, int], logits_shape: tuple[int, int, int]) -> dict[str, Any]:
    """SamPredictor.predict's arguments: points Nx2, labels N, box 4 (all in pixels), mask_input 1xHxW logits."""
    coords, labels = _points(arguments.get("point_coords"), arguments.get("point_labels"), size)
    box = _checked_box(arguments.get("box"), size)
    mask_input = arguments.get("mask_input")
    if not len(coords) and box is None:
        raise BadRequest(
            "gen_args must hold point_coords ([x, y] or a list of them) or box ([left, top, right, bottom])",
            "gen_args",
        )
    return {
        "point_coords": coords if len(coords) else None,
        "point_labels": labels if len(coords) else None,
        "box": box,
        "mask_input": None
        if mask_input is None
        else payload.text_to_array(mask_input, logits_shape, "gen_args.mask_input"),
    }


def _points(coords: Any, labels: Any, size: tuple[int, int]) -> tuple[Any, Any]:
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
        if isinstance(mark, bool) or mark not in (0, 1):
            raise BadRequest(
                f"gen_args.point_labels[{index}] must be 1 (the object) or 0 (not the object), not {mark!r:.40}",
                "gen_args.point_labels",
            )
    return np.array(points, np.float64), np.array(marks, np.int64)


def _check_point(index: int, point: Any, size: tuple[int, int]) -> None:
    where = f"gen_args.point_coords[{index}]"
    if not _is_pair(point):
        raise BadRequest(f"{where} must be two finite numbers [x, y], not {point!r:.60}", "gen_args.point_coords")
    if not (0 <= point[0] <= size[0] and 0 <= point[1] <= size[1]):
        raise BadRequest(
            f"{where} = {point!r:.60} lies outside the {size[0]}x{size[1]} picture", "gen_args.point_coords"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(payload.is_number(v) for v in value)


def _checked_box(box: Any, size: tuple[int, int]) -> Any:
    if box is None:
        return None
    if not (isinstance(box, list) and len(box) == 4 and all(payload.is_number(v) for v in box)):
        raise BadRequest("gen_args.box must be four finite numbers [left, top, right, bottom]", "gen_args.box")
    left, top, right, bottom = box
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise BadRequest(
            f"gen_args.box = {box} must have left < right and top < bottom inside the {size[0]}x{size[1]} picture",
            "gen_args.box",
        )
    return np.array(box, np.float64)


def _box(mask: imaging.Mask) -> list[int] | None:
    if not mask.any():
        return None
    box = imaging.bounding_box(mask)
    return [box.left, box.top, box.right, box.bottom]


def _rounded(score: Any) -> float:
    return round(float(score), 4)
