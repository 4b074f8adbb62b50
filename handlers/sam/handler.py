"""Segment Anything behind TorchServe: a picture and clicks or a box -> the mask of the object."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

from handlers import encoding
from handlers.base import Handler
from handlers.base64_text import array_to_text
from handlers.finite import first_finite, wide_copy
from handlers.geometry import bounding_box
from handlers.payload import Request
from handlers.picture import RGB, Mask
from handlers.reply import Reply
from handlers.sam import network
from handlers.sam.prompt import parse_prompt
from handlers.sam.shaping import Shaping


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
    smooth, fill_holes, erode, dilate, dilate_kernel_size, invert: what is done to each mask, in this order (Shaping).

    Reply: the best-scored mask with its `score`, `box` ([left, top, right, bottom] or null) and `area` (pixels); on
    request `masks` with `scores`, `boxes` and `areas`, and `logits`.
    """

    def load(self, model_dir: Path) -> None:
        weights = self.read_weights(model_dir / "weights.safetensors", network.served_dtype(self.dtype))
        self.model = network.assemble(model_dir / "network.yaml", weights, self.device, self.dtype)

    def warm_up(self) -> None:
        side = self.model.image_encoder.img_size
        predictor = SamPredictor(self.model)
        predictor.set_image(np.zeros((side, side, 3), np.uint8))
        predictor.predict(np.full((1, 2), side / 2), np.ones(1, np.int64))

    def predict(self, request: Request) -> Reply:
        picture = request.picture("image")
        arguments = request.arguments()
        prompt = parse_prompt(arguments, picture.size, self._logits_shape())
        all_masks = arguments.choice("masks", "best", ("best", "all")) == "all"
        multimask = arguments.flag("multimask_output", prompt.is_ambiguous or all_masks)
        return_logits = arguments.flag("return_logits", False)
        shaping = Shaping.parse(arguments)
        arguments.finish()

        predictor = self._look_at(picture.rgb)
        raw_masks, scores, logits = predictor.predict(**prompt.as_arguments(), multimask_output=multimask)
        masks = [shaping.applied(mask) for mask in raw_masks]
        best = int(scores.argmax())
        if not masks[best].any():
            request.warnings.append("nothing was found at this prompt: the mask is empty")

        fields: dict[str, Any] = {"score": _rounded(scores[best]), "box": _box(masks[best]), "area": _area(masks[best])}
        if all_masks:
            fields["masks"] = [encoding.encode_mask(mask) for mask in masks]
            fields["scores"] = [_rounded(score) for score in scores]
            fields["boxes"] = [_box(mask) for mask in masks]
            fields["areas"] = [_area(mask) for mask in masks]
        if return_logits:
            fields["logits"] = array_to_text(logits[best][None])
        return Reply(masks[best], fields, request.warnings)

    def _look_at(self, rgb: RGB) -> SamPredictor:
        """A predictor of its own per request: its embedding must never meet another request's clicks."""
        predictor = _predictor(self.model)
        predictor.set_image(rgb)
        attempts = [lambda: predictor.features]
        if self.dtype != torch.float32:
            attempts.append(lambda: self._embedded_wide(rgb))
        predictor.features = first_finite(attempts)
        return predictor

    def _embedded_wide(self, rgb: RGB) -> torch.Tensor:
        model = copy.copy(self.model)
        model._modules = {**self.model._modules, "image_encoder": wide_copy(self.model.image_encoder)}
        predictor = _predictor(model)
        predictor.set_image(rgb)
        return predictor.features

    def _logits_shape(self) -> tuple[int, int, int]:
        height, width = self.model.prompt_encoder.mask_input_size
        return 1, height, width


class _Resize(ResizeLongestSide):
    """SAM's own rounds the shorter side of a very long picture to 0."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        height, width = ResizeLongestSide.get_preprocess_shape(oldh, oldw, long_side_length)
        return max(height, 1), max(width, 1)


def _predictor(model: Any) -> SamPredictor:
    predictor = SamPredictor(model)
    predictor.transform = _Resize(model.image_encoder.img_size)
    return predictor


def _box(mask: Mask) -> list[int] | None:
    if not mask.any():
        return None
    box = bounding_box(mask)
    return [box.left, box.top, box.right, box.bottom]


def _area(mask: Mask) -> int:
    return int(np.count_nonzero(mask))


def _rounded(score: Any) -> float:
    return round(float(score), 4)
