"""LaMa's published checkpoints to safetensors."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from handlers.building.checkpoint import Array, CheckpointError, damage_reported, open_zip, read_tensors
from handlers.building.files import ProgressBar, staging, write_weights
from handlers.lama.folding import folded

CONFIG = "config.yaml"
MAX_NESTED_BYTES = 4 << 30


def convert(files: Mapping[str, Path], out: Path, progress: ProgressBar) -> None:
    """Writes `out`/weights.safetensors, the generator alone in float32 and folded, and `out`/config.yaml.

    The first of `files` is big-lama.zip, its best.ckpt, or the TorchScript file big-lama.pt. Its config.yaml is the
    second file; else the zip's own, or the one beside a `.ckpt` or one folder up (as in the zip); else what is in `out`
    already. Raises CheckpointError; files that were in `out` are then as they were.
    """
    (source, *given) = files.values()
    with staging(out) as folder, tempfile.TemporaryDirectory(prefix=".unpacked-", dir=out) as scratch:
        checkpoint, own_config = _unpacked(source, Path(scratch))
        config = given[0] if given else own_config or out / CONFIG
        if not config.is_file():
            raise CheckpointError(f"{source} comes without a config.yaml: name the one that belongs to it")
        weights = _generator(read_tensors(checkpoint))
        weights = folded(weights, *_halvings_and_blocks(weights, source, config))
        write_weights(weights, lambda name: np.float32, folder / "weights.safetensors", source, progress)
        shutil.copyfile(config, folder / CONFIG)


def _unpacked(source: Path, scratch: Path) -> tuple[Path, Path | None]:
    """The paths of the PyTorch file and of its config. What big-lama.zip holds is unpacked into `scratch`."""
    with open_zip(source) as archive, damage_reported(source):
        members = {
            kind: [name for name in archive.namelist() if re.fullmatch(rf"([^/]+/)?{kind}", name)]
            for kind in (r"models/best\.ckpt", r"config\.yaml")
        }
        checkpoints, configs = members.values()
        if not checkpoints:
            return source, _config_near(source)
        if len(checkpoints) > 1 or len(configs) != 1:
            raise CheckpointError(f"{source} must hold one models/best.ckpt and one config.yaml, as big-lama.zip does")
        for name, target in ((checkpoints[0], "best.ckpt"), (configs[0], CONFIG)):
            if archive.getinfo(name).file_size > MAX_NESTED_BYTES:
                raise CheckpointError(f"{name} in {source} is larger than any LaMa checkpoint: not unpacked")
            with archive.open(name) as packed, (scratch / target).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    return scratch / "best.ckpt", scratch / CONFIG


def _config_near(checkpoint: Path) -> Path | None:
    if checkpoint.suffix != ".ckpt":
        return None
    places = (checkpoint.parent / CONFIG, checkpoint.parent.parent / CONFIG)
    return next((place for place in places if place.is_file()), None)


def _generator(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The generator's tensors under the published keys; the TorchScript export wraps the model in another module."""
    matches = ((re.fullmatch(r"(?:.*\.)?(generator\.model\..+)", name), array) for name, array in tensors.items())
    return {match[1]: array for match, array in matches if match}


def _halvings_and_blocks(weights: Mapping[str, Array], source: Path, config: Path) -> tuple[int, int]:
    """Reads both numbers from the config; the first and the last convolution tell whether source and config fit."""
    try:
        settings = yaml.safe_load(config.read_bytes())["generator"]
        width, inputs, outputs = settings["ngf"], settings["input_nc"], settings["output_nc"]
        halvings, blocks = settings["n_downsampling"], settings["n_blocks"]
        last = 4 + 4 * halvings + blocks
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config} is not the config of a LaMa generator: {error!r}") from error
    for key, shape in (
        ("generator.model.1.ffc.convl2l.weight", (width, inputs, 7, 7)),
        (f"generator.model.{last}.weight", (outputs, width, 7, 7)),
    ):
        found = weights[key].shape if key in weights else "missing"
        if found != shape:
            raise CheckpointError(
                f"{key} is {found} in {source} and {shape} by {config}: give a LaMa checkpoint and its own config"
            )
    return halvings, blocks
