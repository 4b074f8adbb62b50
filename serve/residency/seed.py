"""What an archive says of itself before it was ever loaded: its size, its limits, and what tells its content apart."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from contract import commands
from serve.store.catalog import Archive
from serve.store.digests import RECORD
from serve.store.unpack import MANIFEST

TIMEOUT = 120  # seconds: TorchServe's, for an archive whose model-config.yaml does not say
_SMALL = 64 << 10  # bytes of a file that is told apart by what it holds


@dataclass(frozen=True)
class Seed:
    """What an archive itself says: the bytes that it takes (0: not said) and those of its files; whether its handler
    takes commands; TorchServe's time limits for a request and a load in seconds. content: alike in archives whose
    files are.
    """

    load: int
    weights: int
    takes_commands: bool
    response_timeout: int
    startup_timeout: int
    content: str


def read_seed(archive: Archive) -> Seed:
    config: Any = {}
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        config = yaml.safe_load((archive.path / "model-config.yaml").read_text())
    config = config if isinstance(config, dict) else {}
    handler = config["handler"] if isinstance(config.get("handler"), dict) else {}
    files = _sizes(archive)
    return Seed(
        _whole(handler.get("memory_mib"), 0) * 2**20,
        sum(files.values()),
        handler.get("commands") == commands.VERSION,
        _whole(config.get("responseTimeout"), TIMEOUT),
        _whole(config.get("startupTimeout"), TIMEOUT),
        _content(archive, files),
    )


def _whole(value: Any, default: int) -> int:
    """The value as a number above 0, else the default."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(int(value), 0) or default
    return default


def _sizes(archive: Archive) -> dict[str, int]:
    """Bytes of each file, by its path in the archive; of those that are left where the archive is being removed."""
    sizes = {}
    for file in archive.files():
        with contextlib.suppress(OSError):
            sizes[str(file.relative_to(archive.path))] = file.stat().st_size
    return sizes


def _content(archive: Archive, sizes: Mapping[str, int]) -> str:
    """A digest of the files' paths and sizes and of what small ones hold.

    Not the archive's version: what a model takes depends on the sizes of its weights and not on their values, so it
    is known of one that is packed, or was trained further, too. Without the manifest, which has the model's name and
    the day on which it was packed, what our builds say of the files' bytes, and what Python leaves behind.
    """
    digest = hashlib.sha256()
    for path, size in sorted(sizes.items()):
        if path not in (MANIFEST, RECORD) and "__pycache__" not in path:
            digest.update(f"{path}\0{size}\0".encode(errors="surrogateescape"))
            if size <= _SMALL:
                with contextlib.suppress(OSError):
                    digest.update((archive.path / path).read_bytes())
    return digest.hexdigest()[:32]
