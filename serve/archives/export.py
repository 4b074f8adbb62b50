"""One file of an archive, for a stock TorchServe, KServe or SageMaker, with the libraries that its code needs by name.

Same archive, same bytes: entries are sorted, without times and owners. Published hardly compress, so a `.mar` stores
them and a `.tar.gz` is packed at the fastest level.
"""

import ast
import gzip
import io
import json
import os
import sys
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from handlers.building.files import CHUNK, ProgressBar

MANIFEST = "MAR-INF/MANIFEST.json"
REQUIREMENTS = "requirements.txt"
ADVICE = f"""A stock TorchServe needs
- the libraries that {REQUIREMENTS} in the file names: install them beside it (`pip install -r {REQUIREMENTS}`), or
  set install_py_dep_per_model=true in its config.properties and it installs them for this model;
- max_request_size=134217728 and max_response_size=536870912 there: over its default of 6.5 MB a request is refused,
  and a reply kills the worker."""
# What these need when they run, although they do not list it.
UNLISTED = {"diffusers": ("accelerate", "transformers"), "segment_anything": ("torchvision",)}
PROVIDED = {"ts"}  # by whoever serves the archive
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say
WEIGHT_SUFFIXES = (".safetensors",)

Content = Path | bytes  # of a file in the archive: where it lies, or what is in it


class Format(StrEnum):
    TAR_GZ = "tar.gz"
    MAR = "mar"


class ExportError(Exception):
    """There is no such archive, or it can't be written as one file."""


def export(archive: Path, file_format: Format, out: Path, progress: ProgressBar) -> None:
    """Writes the no-archive directory `archive` to the file `out`, in one step. Raises ExportError and OSError."""
    if not is_archive(archive):
        raise ExportError(f"{archive} is not an archive: it has no {MANIFEST}")
    files = _files(archive)
    if REQUIREMENTS not in files:
        files |= _with_requirements(archive, files)
    write = {Format.TAR_GZ: _write_tar_gz, Format.MAR: _write_mar}[file_format]
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        _replacing(out) as file,
        progress(f"pack {out.name}", sum(map(_size, files.values()))) as advance,
    ):
        write(dict(sorted(files.items())), file, advance)


def is_archive(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def requirements(sources: Iterable[bytes], own: Collection[str]) -> list[str]:
    """The distributions that the code imports, in the versions that are installed here: "numpy==2.4.0".

    own: what the code may import besides, because it brings it along.
    """
    modules = {module for source in sources for module in _imported(source)}
    modules |= {more for module in modules for more in UNLISTED.get(module, ())}
    modules -= {*own, *PROVIDED, *sys.stdlib_module_names}
    known = metadata.packages_distributions()
    names = {name for module in modules for name in known.get(module, ())}
    # Without the local part: "+cpu" is this machine's.
    return sorted(f"{name}=={metadata.version(name).partition('+')[0]}" for name in names)


def _with_requirements(archive: Path, files: dict[str, Content]) -> dict[str, Content]:
    """The file, and the manifest that names it."""
    sources = [path.read_bytes() for name, path in files.items() if name.endswith(".py") and isinstance(path, Path)]
    own = {name.partition("/")[0].removesuffix(".py") for name in files}
    manifest = json.loads((archive / MANIFEST).read_text())
    manifest.setdefault("model", {})["requirementsFile"] = REQUIREMENTS
    return {
        MANIFEST: json.dumps(manifest, indent=2).encode(),
        REQUIREMENTS: "".join(f"{line}\n" for line in requirements(sources, own)).encode(),
    }


def _imported(source: bytes) -> Iterator[str]:
    """The top-level modules of all imports, those within functions included; none of what is no Python of today."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _files(archive: Path) -> dict[str, Content]:
    """Path in the archive -> file; without what workers cached while they served it."""
    files = {path.relative_to(archive): path for path in archive.rglob("*") if path.is_file()}
    return {name.as_posix(): files[name] for name in sorted(files) if "__pycache__" not in name.parts}


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _open(content: Content) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb")


def _write_tar_gz(files: dict[str, Content], file: BinaryIO, advance: Callable[[int], None]) -> None:
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=1) as packed,
        tarfile.open(mode="w", fileobj=packed, format=tarfile.GNU_FORMAT) as tar,
    ):
        for name, content in files.items():
            # TorchServe drops the first component of every name, as in what `tar czf x.tar.gz .` writes.
            entry = tarfile.TarInfo(f"./{name}")
            entry.size, entry.mode = _size(content), 0o644
            with _open(content) as source:
                tar.addfile(entry, _Counted(source, advance))


def _write_mar(files: dict[str, Content], file: BinaryIO, advance: Callable[[int], None]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr = 0o644 << 16
            entry.file_size = _size(content)  # beforehand, so that zipfile knows whether it needs zip64
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(WEIGHT_SUFFIXES) else zipfile.ZIP_DEFLATED
            with _open(content) as source, archive.open(entry, "w") as packed:
                while chunk := source.read(CHUNK):
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
