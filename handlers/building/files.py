"""Files of gigabytes, with progress; files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.numpy import save_file

from handlers.building.checkpoint import Array, CheckpointError

CHUNK = 4 << 20  # bytes


class ProgressBar(Protocol):
    """Shows a long step: `with progress("verify x.pth", total) as advance: advance(done)`, both in bytes."""

    def __call__(self, what: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]: ...


def copy(source: Path, target: Path, progress: ProgressBar) -> None:
    """Copies a file's bytes, making the folders above target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(source, "rb") as reader,
        open(target, "wb") as writer,
        progress(f"copy {target.name}", source.stat().st_size) as advance,
    ):
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            advance(len(chunk))


def write_weights(
    tensors: Mapping[str, Array],
    dtype_of: Callable[[str], type[np.floating[Any]]],
    path: Path,
    source: Path,
    progress: ProgressBar,
) -> None:
    """Casts the floating-point tensors and writes a safetensors file; what keeps its dtype is never copied.

    source: the file that they come from, of which the progress is told. Raises CheckpointError where a value does not
    fit into its dtype.
    """
    cast, size, told = {}, source.stat().st_size, 0
    with progress(f"convert {source.name}", size) as advance:
        for done, (name, array) in enumerate(tensors.items(), 1):
            dtype = dtype_of(name) if array.dtype.kind == "f" else array.dtype
            try:
                with np.errstate(over="raise"):
                    cast[name] = array.astype(dtype, order="C", copy=False)
            except FloatingPointError as error:
                raise CheckpointError(f"{name} has values too large for {np.dtype(dtype)}: {error}") from error
            reached = size * done // (len(tensors) + 1)
            advance(reached - told)
            told = reached
        save_file(cast, path)
        advance(size - told)
    path.chmod(0o644)  # safetensors lets only the owner read, but the server may run as another user


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder whose files move into `out` once the block has succeeded, each in one step."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staging-", dir=out) as folder:
        yield Path(folder)
        for file in Path(folder).iterdir():
            os.replace(file, out / file.name)
