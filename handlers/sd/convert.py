"""A published diffusers pipeline: its files are the archive's as they are."""

import json
from collections.abc import Mapping
from pathlib import Path

from handlers.building.checkpoint import CheckpointError
from handlers.building.files import ProgressBar, copy


def convert(files: Mapping[str, Path], out: Path, progress: ProgressBar) -> None:
    """Copies them; raises CheckpointError where a component that the pipeline names is missing."""
    for path, source in files.items():
        copy(source, out / path, progress)
    (index,) = out.glob("*/model_index.json")
    for component, value in json.loads(index.read_text()).items():
        if isinstance(value, list) and value[0] is not None and not (index.parent / component).is_dir():
            raise CheckpointError(f"model_index.json names {component}, but no file of it was found")
