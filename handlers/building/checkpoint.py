"""The tensors of published checkpoints, without torch and without running what a pickle asks for.

Read are PyTorch's zip format (SAM's `.pth`, Lightning's `.ckpt`) and TorchScript (`big-lama.pt`).

A pickle is a program that calls whatever it names. Here every name becomes a fresh `_Record` class that only
remembers what it is given: nothing is imported, and a name that is not allowed below is refused. What the records
say about tensors is interpreted afterwards, as views of the file mapped into memory.
"""

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MAX_PICKLE_BYTES = 64 << 20

STORAGE_DTYPES = {
    "torch.DoubleStorage": "<f8",
    "torch.FloatStorage": "<f4",
    "torch.HalfStorage": "<f2",
    "torch.LongStorage": "<i8",
    "torch.IntStorage": "<i4",
    "torch.ShortStorage": "<i2",
    "torch.CharStorage": "|i1",
    "torch.ByteStorage": "|u1",
    "torch.BoolStorage": "|b1",
}
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
TORCHSCRIPT_PREFIX = "__torch__."

# All that a checkpoint of SAM or LaMa may name: tensors, plain data, and the training state around the weights.
ALLOWED_GLOBALS = re.compile(
    r"torch\._utils\._rebuild_(tensor_v2|parameter)"
    r"|torch\.([A-Z][A-Za-z0-9]*Storage|Size|device|float16|float32|float64|int64|bool)"
    r"|torch\.jit\._pickle\.(build_(bool|double|int|tensor)list|restore_type_tag)"
    r"|collections\.(OrderedDict|defaultdict|Counter)"
    # PyTorch pickles in protocol 2, which spells Python 3's names in Python 2's way.
    r"|(builtins|__builtin__)\.(bool|bytearray|complex|dict|float|frozenset|int|list|long|object|set|str|tuple|unicode)"
    r"|_codecs\.encode|typing\.[A-Z]\w*|argparse\.Namespace|pathlib\.(Pure)?PosixPath"
    r"|numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|ndarray|dtype)"
    r"|omegaconf\.(base|nodes|dictconfig|listconfig)\.[A-Z]\w*"
    r"|pytorch_lightning\.(callbacks|utilities)(\.[a-z_]+)*\.[A-Z]\w*"
    r"|__torch__(\.\w+)*\.\w+"
)


class CheckpointError(Exception):
    """The file is not a checkpoint that can be converted; the message says what to do."""


class UnsafeCheckpoint(CheckpointError):
    """The file's pickle names something other than tensors and plain data. None of it was run."""


def read_tensors(path: Path) -> dict[str, Array]:
    """The tensors of a state dict, of a Lightning checkpoint's `state_dict` or of a TorchScript module, by key.

    The arrays are read-only views of the mapped file, so reading them all costs no memory; the file must not
    change while they are in use. Raises UnsafeCheckpoint for a pickle that names anything but tensors and plain
    data, CheckpointError for a damaged file or one of another format, OSError if it cannot be read.
    """
    with open_zip(path) as archive, damage_reported(path):
        pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is a zip file but not a PyTorch checkpoint")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError(f"{path} was written on a big-endian machine: save it again on another")
        content = _Unpickler(path, _read_pickle(path, archive, pickles[0])).load()
        storages = _Storages(path, archive, f"{root}data/")
        tensors = {name: _view(name, record, storages) for name, record in _tensor_records(content)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: give a state dict, a Lightning checkpoint or TorchScript")
    return tensors


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            start = file.read(4)
    if start == b"PK\x03\x04":
        raise CheckpointError(f"{path} is cut short: download it again")
    if start.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is a pickle in the format from before PyTorch 1.6: load it there with weights_only=True and "
            "save it again with torch.save"
        )
    raise CheckpointError(f"{path} is not a PyTorch checkpoint, TorchScript file or zip of one")


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    # Damaged or hostile bytes can make the zip and pickle readers raise almost anything.
    try:
        yield
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: download it again ({error!r})") from error


def _read_pickle(path: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).file_size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{name} in {path} is larger than any checkpoint's: not read")
    return archive.read(name)


class _Record:
    """Stands for an object of the pickle: remembers its arguments, items and state, and does nothing."""

    qualified_name: str
    args: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.items, record.state = args, {}, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass


class _Storage(NamedTuple):
    qualified_name: str
    key: str
    numel: int


class _Unpickler(pickle.Unpickler):
    """Python's pickle parser in which the only things that can be called are `_Record` classes."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._classes: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> type[_Record]:
        qualified_name = f"{module}.{name}"
        if "." in name or not ALLOWED_GLOBALS.fullmatch(qualified_name):
            raise UnsafeCheckpoint(
                f"{self._path} names {qualified_name}, which is neither a tensor nor plain data. Nothing was run; "
                "do not load this file with anything else"
            )
        if qualified_name not in self._classes:
            self._classes[qualified_name] = type(name, (_Record,), {"qualified_name": qualified_name})
        return self._classes[qualified_name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_class, key, _device, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"persistent object of kind {kind!r}")
        return _Storage(storage_class.qualified_name, key, numel)


def _tensor_records(content: Any) -> Iterator[tuple[str, _Record]]:
    entries = _entries(content)
    if "state_dict" in entries:
        entries = _entries(entries["state_dict"])
    return _walk(entries, "")


def _walk(entries: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, _Record]]:
    for name, value in entries.items():
        if not isinstance(value, _Record):
            continue
        if value.qualified_name == PARAMETER:
            value = value.args[0]
        if value.qualified_name == TENSOR:
            yield f"{prefix}{name}", value
        elif value.qualified_name.startswith(TORCHSCRIPT_PREFIX):
            yield from _walk(_entries(value), f"{prefix}{name}.")


def _entries(node: Any) -> Mapping[Any, Any]:
    """What a dict, an OrderedDict or a TorchScript module holds by name."""
    if isinstance(node, _Record):
        node = node.state if node.qualified_name.startswith(TORCHSCRIPT_PREFIX) else node.items
    return node if isinstance(node, dict) else {}


class _Storages:
    """The bytes of a checkpoint's storages, mapped once: a mapping for each tensor would use up file handles."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str) -> None:
        self._path = path
        self._archive = archive
        self._folder = folder
        self._file = np.memmap(path, dtype=np.uint8, mode="r")

    def bytes_of(self, key: str) -> Array:
        entry = self._archive.getinfo(f"{self._folder}{key}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self._path} was compressed after PyTorch wrote it: get the original file")
        header = self._file[entry.header_offset : entry.header_offset + 30].tobytes()
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = entry.header_offset + len(header) + name_length + extra_length
        return self._file[start : start + entry.file_size]


def _view(name: str, record: _Record, storages: _Storages) -> Array:
    storage, offset, shape, strides = record.args[:4]
    if storage.qualified_name not in STORAGE_DTYPES:
        raise CheckpointError(f"{name} is a {storage.qualified_name}, which is not supported: save it as float32")
    dtype = np.dtype(STORAGE_DTYPES[storage.qualified_name])
    data = storages.bytes_of(storage.key)
    if data.nbytes != storage.numel * dtype.itemsize:
        raise ValueError(f"{name} has {data.nbytes} bytes for {storage.numel} values of {dtype}")
    # Checked in Python's integers, for numpy's own check of the bounds can overflow.
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min((offset, *shape, *strides)) < 0 or math.prod(shape) > storage.numel or last >= max(storage.numel, 1):
        raise ValueError(f"{name} reaches beyond its storage")
    return np.ndarray(
        shape, dtype, data, offset=offset * dtype.itemsize, strides=[stride * dtype.itemsize for stride in strides]
    )
