"""From packed archives, .tar.gz or .mar, to folders: unpacked without trusting the file.

Only plain files and folders are made, each once, under checked names, with our own modes and within limits. Whatever
else a tar or zip can hold (links, devices, absolute names, ...) is refused rather than skipped: nobody packs a model
that way.
"""

import gzip
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from serve.store.locks import Stopped

SUFFIXES = (".tar.gz", ".mar")
MANIFEST = "MAR-INF/MANIFEST.json"
CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 16  # what tarfile reads at a time
_TAR_HEADERS = 2 * _BLOCK  # bytes that one entry's headers may take; tarfile keeps them in memory
_TAR_PADDING = 1 << 24  # bytes after the last entry
# What the three libraries raise for bytes that they can't make sense of.
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, struct.error, ValueError, NotImplementedError,
    RecursionError,
)  # fmt: skip
_MAX_NAME, _MAX_PATH, _MAX_DEPTH = 255, 1024, 32


class InvalidArchive(Exception):
    """The file is not an archive that can be served; the message says why, as in "it holds ..."."""


@dataclass(frozen=True)
class UnpackLimits:
    """entries: files and folders. size: bytes of all files. ratio: those to the packed bytes; weights reach 2, and
    what unpacks to less than ratio_from bytes may have any."""

    entries: int = 20_000
    size: int = 64 * 2**30
    ratio: int = 100
    ratio_from: int = 64 * 2**20


class Unpacked(NamedTuple):
    """root: the folder that holds MAR-INF. size: bytes of all files."""

    root: Path
    size: int


def unpack(file: BinaryIO, out: Path, limits: UnpackLimits, stopped: Callable[[], bool] = lambda: False) -> Unpacked:
    """Unpacks `file` into the empty folder `out`. Raises InvalidArchive, OSError, or Stopped once stopped() is true.

    What was unpacked until then is the caller's to remove.

    The archive's root is the top of the file (`tar czf x.tar.gz .`, .mar), or the only folder there, which
    torch-model-archiver's tgz format makes and whose name TorchServe drops.
    """
    tree = _Tree(out, file.seek(0, 2), limits, stopped)
    file.seek(0)
    read = _read_tar_gz if file.read(2) == _GZIP else _read_zip
    file.seek(0)
    try:
        read(file, tree)
    except EOFError:
        raise InvalidArchive("it ends too early: it is truncated, or still being copied") from None
    except _DAMAGED as error:
        raise InvalidArchive(f"it is no gzipped tar or zip, damaged, or still being copied ({error})") from None
    return Unpacked(_root(out), tree.size)


def _root(out: Path) -> Path:
    # macOS adds hidden files beside the only folder.
    shown = [path for path in out.iterdir() if not path.name.startswith(".")]
    for root in [out, *(shown if len(shown) == 1 else [])]:
        if (root / MANIFEST).is_file():
            return root
    raise InvalidArchive(f"it holds no {MANIFEST}, neither at its top nor in a single folder there")


def _read_tar_gz(file: BinaryIO, tree: "_Tree") -> None:
    with _MeteredGzip(fileobj=file) as stream:
        stream.allow(_TAR_HEADERS)
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_BLOCK) as tar:
            while (entry := tar.next()) is not None:
                _add_tar_entry(tar, entry, stream, tree)
                stream.allow(_TAR_HEADERS)
        # gzip's checksum comes last.
        stream.allow(_TAR_PADDING)
        while stream.read(_BLOCK):
            pass


def _add_tar_entry(tar: tarfile.TarFile, entry: tarfile.TarInfo, stream: "_MeteredGzip", tree: "_Tree") -> None:
    content = tar.extractfile(entry) if entry.isreg() and not entry.issparse() and entry.size >= 0 else None
    if content is not None:
        stream.allow(entry.size + _TAR_HEADERS)
        tree.add_file(entry.name, entry.size, content)
    elif entry.isdir():
        tree.add_folder(entry.name)
    else:
        raise InvalidArchive(f"it holds {entry.name[:80]!r}, which is {_tar_kind(entry)}")


def _tar_kind(entry: tarfile.TarInfo) -> str:
    kinds = [
        (entry.issym(), "a symbolic link: pack with `tar --dereference`"),
        (entry.islnk(), "a hard link: pack with `tar --hard-dereference`"),
        (entry.isdev(), "a device or a pipe"),
        (entry.issparse(), "a sparse file: pack without `--sparse`"),
    ]
    return next((kind for applies, kind in kinds if applies), "neither a file nor a folder")


class _MeteredGzip(gzip.GzipFile):
    """Raises InvalidArchive beyond what was allowed: tarfile reads headers into memory, whatever their size."""

    _allowed = 0

    def allow(self, size: int) -> None:
        """Allows `size` bytes more from here on."""
        self._allowed = self.tell() + size

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if self.tell() > self._allowed:
            raise InvalidArchive("it has headers or padding of an absurd size")
        return data


def _read_zip(file: BinaryIO, tree: "_Tree") -> None:
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.orig_filename  # `filename` ends at a NUL
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InvalidArchive(f"it holds {name[:80]!r}, which is a link, a device or a pipe")
            if entry.is_dir():
                tree.add_folder(name)
                continue
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InvalidArchive(f"it holds {name[:80]!r}, which is encrypted or packed in an unusual way")
            with archive.open(entry) as content:
                tree.add_file(name, entry.file_size, content)


class _Tree:
    """The folder that an archive is unpacked into. packed: bytes of the file. size: bytes of all files so far."""

    def __init__(self, out: Path, packed: int, limits: UnpackLimits, stopped: Callable[[], bool]) -> None:
        self._out, self._packed, self._limits, self._stopped = out, packed, limits, stopped
        # Case-folded path -> the path as spelt first, and whether it is a folder.
        self._claimed: dict[str, tuple[str, bool]] = {}
        self._entries = 0
        self.size = 0

    def add_folder(self, name: str) -> None:
        self._count_entry()
        self._make_folders(_parts(name))

    def add_file(self, name: str, size: int, content: IO[bytes]) -> None:
        """size: as declared; content of any other size is refused."""
        self._count_entry()
        parts = _parts(name)
        if not parts:
            raise InvalidArchive("its top is a file")
        self._make_folders(parts[:-1])
        path = "/".join(parts)
        if not self._claim(path, folder=False):
            raise InvalidArchive(f"it holds {path[:80]!r} twice")
        self._count_bytes(size)
        with open(self._out / path, "xb") as file:
            self._copy(content, file, size)

    def _make_folders(self, parts: list[str]) -> None:
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            if self._claim(path, folder=True):
                self._count_entry()
                (self._out / path).mkdir()

    def _claim(self, path: str, folder: bool) -> bool:
        """Whether the path is new. One that differs only by case from another would overwrite it on some disks."""
        key = unicodedata.normalize("NFC", path).casefold()
        if key not in self._claimed:
            self._claimed[key] = (path, folder)
            return True
        if self._claimed[key] != (path, folder):
            raise InvalidArchive(f"it holds both {self._claimed[key][0][:80]!r} and {path[:80]!r}")
        return False

    def _count_entry(self) -> None:
        self._entries += 1
        if self._entries > self._limits.entries:
            raise InvalidArchive(f"it holds more than {self._limits.entries:,} files and folders")

    def _count_bytes(self, size: int) -> None:
        self.size += size
        if self.size > self._limits.size:
            raise InvalidArchive(f"it unpacks to {self.size:,} bytes or more, and {self._limits.size:,} are allowed")
        if self.size > max(self._limits.ratio_from, self._packed * self._limits.ratio):
            raise InvalidArchive(f"its {self._packed:,} bytes unpack to {self.size:,} or more, which no weights do")

    def _copy(self, content: IO[bytes], file: BinaryIO, size: int) -> None:
        while size:
            if self._stopped():
                raise Stopped
            chunk = content.read(min(size, CHUNK))
            if not chunk:
                raise EOFError
            file.write(chunk)
            size -= len(chunk)


def _parts(name: str) -> list[str]:
    """The components of an entry's name; none for the root. Raises InvalidArchive for one that could lead elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts:
        raise InvalidArchive(f"it holds {name[:80]!r}, which leads out of it")
    # Not printable are control characters, and the surrogates that undecodable bytes become.
    if "\\" in name or not name.isprintable():
        raise InvalidArchive(f"it holds {name[:80]!r}, whose name has a backslash or unprintable characters")
    too_long = len(name.encode()) > _MAX_PATH or any(len(part.encode()) > _MAX_NAME for part in parts)
    if too_long or len(parts) > _MAX_DEPTH:
        raise InvalidArchive(f"it holds {name[:80]!r}..., whose name is too long or too deep")
    return parts
