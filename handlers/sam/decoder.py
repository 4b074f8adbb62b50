"""The cheap half of SAM: an embedding and a prompt -> candidates; those that are asked for -> masks."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor

from handlers.pictures.picture import Mask
from handlers.sam.embeddings import Sight
from handlers.sam.prompt import Prompt
from handlers.sam.resize import Resize


class Candidates(NamedTuple):
    """scores: N float32, 0..1 or so. logits: 1xNxhxw float32 on the network's device, h = w = 256 as published."""

    scores: NDArray[np.float32]
    logits: Tensor


def candidates(
    sam: Sam, resize: Resize, sight: Sight, embedding: Tensor, prompt: Prompt, multimask: bool
) -> Candidates:
    """One candidate, or three with multimask. embedding: 1xCxhxw, of the picture that sight is of."""
    size, device = sight.size[::-1], sam.device

    def tensor(array: NDArray[np.generic], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.as_tensor(array, dtype=dtype, device=device)[None]

    points = box = mask = None
    if len(prompt.points):
        points = tensor(resize.apply_coords(prompt.points, size)), tensor(prompt.labels, torch.int)
    if prompt.box is not None:
        box = tensor(resize.apply_boxes(prompt.box, size)[0])
    if prompt.mask_input is not None:
        mask = tensor(prompt.mask_input)
    sparse, dense = sam.prompt_encoder(points=points, boxes=box, masks=mask)
    logits, scores = sam.mask_decoder(
        image_embeddings=embedding.to(device),
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    return Candidates(scores[0].cpu().numpy(), logits)


def mask_of(sam: Sam, sight: Sight, logits: Tensor) -> Mask:
    """logits: hxw -> the mask at the picture's full resolution."""
    return np.asarray((spread(sam, sight, logits) > sam.mask_threshold).cpu().numpy())


def spread(sam: Sam, sight: Sight, logits: Tensor) -> Tensor:
    """logits: hxw -> those of the picture's pixels, without the padding that the encoder saw, at sight.size."""
    whole: Tensor = sam.postprocess_masks(logits[None, None], sight.shown, sight.size[::-1])
    return whole[0, 0]
