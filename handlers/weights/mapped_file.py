"""A safetensors file as tensors that are the file's own pages.

Format: https://huggingface.co/docs/safetensors (eight bytes: the length of a JSON header; the header; the data).
"""

import json
import mmap
import os
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_MADV_POPULATE_READ = 22  # Linux 5.14; mmap has no name for it
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FileChanged(Exception):
    """The file is no longer the one that was loaded; the message says what to do."""


class MappedFile:
    """A safetensors file mapped into memory. Raises OSError, or ValueError for anything else.

    tensors: views of the mapping, in the file's order. Nothing may write to them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as stream:
            self._identity = _identity(os.fstat(stream.fileno()))
            length = int.from_bytes(stream.read(8), "little")
            # Copy on write, so that PyTorch may have it; nothing is ever written.
            self._mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        if 8 + length > len(self._mapping):
            raise ValueError(f"{path} is no safetensors file, or cut short")
        header = json.loads(self._mapping[8 : 8 + length])
        header.pop("__metadata__", None)
        places = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.tensors = {name: self._view(8 + length, **place) for name, place in places}

    def read(self) -> None:
        """Brings the pages in, from disk where they are not in memory yet."""
        self._mapping.madvise(mmap.MADV_WILLNEED)
        with suppress(OSError):  # an older kernel brings them in one by one, at their first use
            self._mapping.madvise(_MADV_POPULATE_READ)

    def forget(self) -> None:
        """Takes the pages out of this process; they stay in the page cache while the machine has room."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def check(self) -> None:
        """Raises FileChanged where the path no longer leads to the file that was mapped, unaltered."""
        try:
            same = _identity(self._path.stat()) == self._identity
        except OSError:
            same = False
        if not same:
            raise FileChanged(
                f"{self._path.name} was removed or replaced while the model was parked: unload the model and load it"
            )

    def _view(self, data: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
        kind = _DTYPES.get(dtype)
        if kind is None:
            raise ValueError(f"{self._path} holds tensors of type {dtype}, which is not supported")
        count = (data_offsets[1] - data_offsets[0]) // kind.itemsize
        if not count:
            return torch.empty(shape, dtype=kind)
        return torch.frombuffer(self._mapping, dtype=kind, count=count, offset=data + data_offsets[0]).view(shape)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
