"""Segment Anything behind TorchServe: a picture and clicks or a box -> the mask of the object."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from torch import Tensor

from handlers.editing.geometry import bounding_box
from handlers.pictures import encoding
from handlers.pictures.picture import RGB, Mask
from handlers.requests.base64_text import array_to_text
from handlers.requests.payload import Request
from handlers.requests.reply import Reply
from handlers.sam import network
from handlers.sam.description import MASKS, MULTIMASK, RETURN_LOGITS
from handlers.sam.embeddings import Embeddings, key_of
from handlers.sam.prompt import parse_prompt
from handlers.sam.resize import Resize
from handlers.sam.shaping import Shaping
from handlers.weights.precision import first_finite, wide_copy
from handlers.worker.base import Handler


class SamHandler(Handler):
    """Takes what handlers.sam.description says; the mask is shaped in the order of Shaping.

    Reply: the best-scored mask with its `score`, `box` ([left, top, right, bottom] or null) and `area` (pixels); on
    request `masks` with `scores`, `boxes` and `areas`, and `logits`.
    """

    def load(self, model_dir: Path) -> None:
        weights = self.read_weights(model_dir / "weights.safetensors", network.served_dtype(self.dtype))
        self.model = network.assemble(model_dir / "network.yaml", weights, self.device, self.dtype)
        self.resize = Resize(self.model.image_encoder.img_size)
        self.embeddings = Embeddings()

    def warm_up(self) -> None:
        side = self.model.image_encoder.img_size
        predictor = SamPredictor(self.model)
        predictor.set_image(np.zeros((side, side, 3), np.uint8))
        predictor.predict(np.full((1, 2), side / 2), np.ones(1, np.int64))

    def predict(self, request: Request) -> Reply:
        picture = request.picture("image")
        arguments = request.arguments()
        prompt = parse_prompt(arguments, picture.size, self._logits_shape())
        all_masks = arguments.choice(MASKS) == "all"
        multimask = arguments.flag(MULTIMASK, prompt.is_ambiguous or all_masks)
        return_logits = arguments.flag(RETURN_LOGITS)
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
        """A predictor that has seen the picture, of its own per request: no other's clicks can meet it."""
        predictor = SamPredictor(self.model)
        predictor.transform = self.resize
        shown = self.resize.apply_image(rgb)
        predictor.original_size, predictor.input_size = rgb.shape[:2], shown.shape[:2]
        key = key_of(shown)
        known = self.embeddings.get(key)
        if known is None:
            known = self._embedded(shown)
            self.embeddings.put(key, known)
        predictor.features, predictor.is_image_set = known.to(self.device), True
        return predictor

    def _embedded(self, shown: RGB) -> Tensor:
        """What the encoder makes of a picture of its own size; raises NotFinite."""
        pixels = torch.as_tensor(shown, device=self.device).permute(2, 0, 1).contiguous()[None]
        prepared, encoder = self.model.preprocess(pixels), self.model.image_encoder
        attempts = [lambda: encoder(prepared)]
        if self.dtype != torch.float32:
            attempts.append(lambda: wide_copy(encoder)(prepared))
        return first_finite(attempts)

    def _logits_shape(self) -> tuple[int, int, int]:
        height, width = self.model.prompt_encoder.mask_input_size
        return 1, height, width


def _box(mask: Mask) -> list[int] | None:
    if not mask.any():
        return None
    box = bounding_box(mask)
    return [box.left, box.top, box.right, box.bottom]


def _area(mask: Mask) -> int:
    return int(np.count_nonzero(mask))


def _rounded(score: Any) -> float:
    return round(float(score), 4)
