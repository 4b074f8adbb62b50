"""Published checkpoints of SAM and LaMa to safetensors in the serving dtype."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from serve.archives.checkpoint import Array, CheckpointError, damage_reported, open_zip, read_tensors

Progress = Callable[[float], None]

WEIGHTS = "weights.safetensors"
CONFIG = "config.yaml"
MAX_NESTED_BYTES = 4 << 30


def convert_sam(checkpoint: Path, out: Path, progress: Progress | None = None) -> None:
    """Writes `out`/weights.safetensors from SAM's `.pth`: image_encoder.* in float16, everything else in float32.

    `progress` is called with 0..1. Raises CheckpointError; files that were in `out` are then as they were.
    """
    tensors = read_tensors(checkpoint)
    for key in (
        "image_encoder.patch_embed.proj.weight",
        "prompt_encoder.no_mask_embed.weight",
        "mask_decoder.iou_token.weight",
    ):
        if key not in tensors:
            raise CheckpointError(f"{checkpoint} has no tensor {key}: give one of the files sam_vit_*.pth")
    with _staging(out) as staging:
        _write_weights(tensors, _sam_dtype, staging / WEIGHTS, progress)


def convert_lama(source: Path, config: Path | None, out: Path, progress: Progress | None = None) -> None:
    """Writes `out`/weights.safetensors, the generator alone in float32, and `out`/config.yaml.

    `source` is big-lama.zip, its best.ckpt, or the TorchScript file big-lama.pt. If `config` is None, it is the
    zip's own or, for a `.ckpt`, the config.yaml beside it or one folder up (as in the zip); a TorchScript file has
    none. `progress` is called with 0..1. Raises CheckpointError; files that were in `out` are then as they were.
    """
    with _staging(out) as staging, tempfile.TemporaryDirectory(prefix=".unpacked-", dir=out) as scratch:
        checkpoint, own_config = _unpack_lama(source, Path(scratch))
        config = config or own_config
        if config is None:
            raise CheckpointError(f"{source} comes without a config.yaml: name the one that belongs to it")
        weights = _generator(read_tensors(checkpoint))
        _check_generator(weights, source, config)
        _write_weights(weights, lambda name: np.float32, staging / WEIGHTS, progress)
        shutil.copyfile(config, staging / CONFIG)


def _sam_dtype(name: str) -> type[np.floating[Any]]:
    return np.float16 if name.startswith("image_encoder.") else np.float32


def _unpack_lama(source: Path, scratch: Path) -> tuple[Path, Path | None]:
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


def _check_generator(weights: Mapping[str, Array], source: Path, config: Path) -> None:
    """The first and the last convolution tell whether source and config belong together."""
    try:
        settings = yaml.safe_load(config.read_bytes())["generator"]
        width, inputs, outputs = settings["ngf"], settings["input_nc"], settings["output_nc"]
        last = 4 + 4 * settings["n_downsampling"] + settings["n_blocks"]
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


def _write_weights(
    tensors: Mapping[str, Array],
    dtype_of: Callable[[str], type[np.floating[Any]]],
    path: Path,
    progress: Progress | None,
) -> None:
    """Casts the floating-point tensors and writes the file; what keeps its dtype is never copied."""
    cast = {}
    for done, (name, array) in enumerate(tensors.items()):
        if progress:
            progress(done / len(tensors))
        dtype = dtype_of(name) if array.dtype.kind == "f" else array.dtype
        try:
            with np.errstate(over="raise"):
                cast[name] = array.astype(dtype, order="C", copy=False)
        except FloatingPointError as error:
            raise CheckpointError(f"{name} has values too large for {np.dtype(dtype)}: {error}") from error
    save_file(cast, path)
    path.chmod(0o644)  # safetensors lets only the owner read, but the server may run as another user
    if progress:
        progress(1.0)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A folder whose files move into `out` once the block has succeeded, each in one step."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=out) as folder:
        yield Path(folder)
        for file in Path(folder).iterdir():
            os.replace(file, out / file.name)
