"""SAM's published checkpoints to safetensors in the serving dtype."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from handlers.building.checkpoint import CheckpointError, read_tensors
from handlers.building.files import ProgressBar, staging, write_weights


def convert(files: Mapping[str, Path], out: Path, progress: ProgressBar) -> None:
    """Writes `out`/weights.safetensors from a `.pth`: image_encoder.* in float16, everything else in float32.

    Raises CheckpointError; files that were in `out` are then as they were.
    """
    (checkpoint,) = files.values()
    tensors = read_tensors(checkpoint)
    for key in (
        "image_encoder.patch_embed.proj.weight",
        "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.iou_token.weight",
    ):
        if key not in tensors:
            raise CheckpointError(f"{checkpoint} has no tensor {key}: give one of the files sam_vit_*.pth")
    with staging(out) as folder:
        write_weights(tensors, _dtype, folder / "weights.safetensors", checkpoint, progress)


def _dtype(name: str) -> type[np.floating[Any]]:
    return np.float16 if name.startswith("image_encoder.") else np.float32
