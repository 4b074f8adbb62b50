"""One file of an archive, for a stock TorchServe, KServe or SageMaker.

Same archive, same bytes: entries are sorted, without times and owners. Weights hardly compress, so a `.mar` stores
them and a `.tar.gz` is packed at the fastest level.
"""

import gzip
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from serve.archives.download import CHUNK, Progress

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say
WEIGHT_SUFFIXES = {".safetensors"}


class Format(StrEnum):
    TAR_GZ = "tar.gz"
    MAR = "mar"


class ExportError(Exception):
    """There is no such archive, or it can't be written as one file."""


def export(archive: Path, file_format: Format, out: Path, progress: Progress) -> None:
    """Writes the no-archive directory `archive` to the file `out`, in one step. Raises ExportError and OSError."""
    if not (archive / "MAR-INF" / "MANIFEST.json").is_file():
        raise ExportError(f"{archive} is not an archive: it has no MAR-INF/MANIFEST.json")
    files = _files(archive)
    write = {Format.TAR_GZ: _write_tar_gz, Format.MAR: _write_mar}[file_format]
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        _replacing(out) as file,
        progress(f"pack {out.name}", sum(path.stat().st_size for path in files.values())) as advance,
    ):
        write(files, file, advance)


def _files(archive: Path) -> dict[str, Path]:
    """Path in the archive -> file; without what workers cached while they served it."""
    files = {path.relative_to(archive): path for path in archive.rglob("*") if path.is_file()}
    return {name.as_posix(): files[name] for name in sorted(files) if "__pycache__" not in name.parts}


def _write_tar_gz(files: dict[str, Path], file: BinaryIO, advance: Callable[[int], None]) -> None:
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=1) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, path in files.items():
            # TorchServe drops the first component of every name, as in what `tar czf x.tar.gz .` writes.
            entry = tarfile.TarInfo(f"./{name}")
            entry.size, entry.mode = path.stat().st_size, 0o644
            with open(path, "rb") as content:
                tar.addfile(entry, _Counted(content, advance))


def _write_mar(files: dict[str, Path], file: BinaryIO, advance: Callable[[int], None]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, path in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.file_size = path.stat().st_size  # beforehand, so that zipfile knows whether it needs zip64
            entry.compress_type = zipfile.ZIP_STORED if path.suffix in WEIGHT_SUFFIXES else zipfile.ZIP_DEFLATED
            with open(path, "rb") as content, archive.open(entry, "w") as packed:
                while chunk := content.read(CHUNK):
                    packed.write(chunk)
                    advance(len(chunk))


class _Counted:
    """A file whose reads are counted."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance = file, advance

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(size)
        self._advance(len(chunk))
        return chunk


@contextmanager
def _replacing(out: Path) -> Iterator[BinaryIO]:
    """A new file that takes out's place when it is complete, and is removed when it is not."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
