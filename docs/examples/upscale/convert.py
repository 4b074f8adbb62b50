"""A published checkpoint, a state dict as `torch.save` writes it, to safetensors."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from handlers.building.checkpoint import CheckpointError, read_tensors
from handlers.building.files import ProgressBar, staging, write_weights


def convert(files: Mapping[str, Path], out: Path, progress: ProgressBar) -> None:
    """Writes `out`/weights.safetensors in float32. Raises CheckpointError."""
    (checkpoint,) = files.values()
    tensors = read_tensors(checkpoint)
    if "0.weight" not in tensors:
        raise CheckpointError(f"{checkpoint} has no tensor 0.weight: give the state dict of an ESPCN")
    with staging(out) as folder:
        write_weights(tensors, lambda name: np.float32, folder / "weights.safetensors", checkpoint, progress)
