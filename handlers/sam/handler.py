"""Segment Anything behind TorchServe: a picture and clicks or a box -> the mask of the object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handlers.editing.geometry import bounding_box
from handlers.pictures.picture import RGB, Mask
from handlers.requests.base64_text import array_to_text
from handlers.requests.payload import Request
from handlers.requests.reply import Reply
from handlers.sam import network
from handlers.sam.decoder import candidates, mask_of
from handlers.sam.description import MASKS, MULTIMASK, RETURN_LOGITS
from handlers.sam.embeddings import Embeddings, Sight, key_of
from handlers.sam.prompt import Prompt, parse_prompt
from handlers.sam.resize import Resize
from handlers.sam.shaping import Shaping
from handlers.sam.snapping import small_copy, snapped_mask
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
        shown = np.zeros((side, side, 3), np.uint8)
        sight = Sight((side, side), (side, side), b"", ())
        prompt = Prompt(np.full((1, 2), side / 2), np.ones(1, np.int64), None, None)
        seen = self._seen_first(self._copies(shown))
        found = candidates(self.model, self.resize, sight, seen[0], prompt, multimask=True)
        self._mask(sight, found.logits[0, 0], prompt, seen)

    def predict(self, request: Request) -> Reply:
        sight, copies = self._look(request)
        arguments = request.arguments()
        prompt = parse_prompt(arguments, sight.size, self._logits_shape())
        all_masks = arguments.choice(MASKS) == "all"
        multimask = arguments.flag(MULTIMASK, prompt.is_ambiguous or all_masks)
        return_logits = arguments.flag(RETURN_LOGITS)
        shaping = Shaping.parse(arguments)
        arguments.finish()

        seen = self._seen(request, sight, copies)
        with request.timings.stage("mask"):
            scores, logits = candidates(self.model, self.resize, sight, seen[0], prompt, multimask)
            best = int(scores.argmax())
            wanted = range(len(scores)) if all_masks else [best]
            masks = {each: shaping.applied(self._mask(sight, logits[0, each], prompt, seen)) for each in wanted}
        mask = masks[best]
        if not mask.any():
            request.warnings.append("nothing was found at this prompt: the mask is empty")

        fields: dict[str, Any] = {"score": _rounded(scores[best]), "box": _box(mask), "area": _area(mask)}
        if all_masks:
            fields["scores"] = [_rounded(score) for score in scores]
            fields["boxes"] = [_box(each) for each in masks.values()]
            fields["areas"] = [_area(each) for each in masks.values()]
        if return_logits:
            fields["logits"] = array_to_text(logits[:, best].cpu().numpy())
        return Reply(mask, fields, request.warnings, masks=list(masks.values()) if all_masks else [])

    def _mask(self, sight: Sight, logits: Tensor, prompt: Prompt, seen: Sequence[Tensor]) -> Mask:
        if len(seen) == 1:
            return mask_of(self.model, sight, logits)
        return snapped_mask(self.model, sight, logits, prompt, seen[1].numpy())

    def _look(self, request: Request) -> tuple[Sight, list[RGB]]:
        """Returns what is known of a picture; of one that is not known, its copies, too."""
        content = request.content("image")
        known = self.embeddings.sight(content)
        if known:
            request.note("image", known.notes)
            return known, []
        picture = request.picture("image")
        with request.timings.stage("decode"):
            copies = self._copies(picture.rgb)
            sight = Sight(picture.size, copies[0].shape[:2], key_of(*copies), picture.notes)
        self.embeddings.remember(content, sight)
        return sight, copies

    def _copies(self, picture: RGB) -> list[RGB]:
        """What the encoder is shown; and what masks are snapped in, where they are."""
        side, shown = self.model.snapped_side, self.resize.apply_image(picture)
        return [shown, small_copy(picture, side)] if side else [shown]

    def _seen(self, request: Request, sight: Sight, copies: Sequence[RGB]) -> tuple[Tensor, ...]:
        """The embedding; and the copy in which masks are snapped, where they are."""
        known = self.embeddings.get(sight.key)
        with request.timings.stage("recall" if known else "embed"):
            if not known:
                known = self._seen_first(copies)  # there are some: what _look knows is kept
                self.embeddings.put(sight.key, *known)
        return known

    def _seen_first(self, copies: Sequence[RGB]) -> tuple[Tensor, ...]:
        shown, *others = copies
        return self._embedded(shown), *(torch.from_numpy(other) for other in others)

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
