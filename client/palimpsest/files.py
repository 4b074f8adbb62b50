"""Pictures' files: names, formats, and how they are written."""

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from palimpsest.fields import Format

FORMATS: dict[str, Format] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".tif": "tiff",
    ".tiff": "tiff",
}
"""Suffix -> the server's word for the format: those that it writes."""

_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"II": "tiff", b"MM": "tiff"}


def format_of(path: str | os.PathLike[str]) -> Format:
    """What a file of that name is to be. Raises ValueError, which names the suffixes that there are."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{os.fspath(path)}: a picture's file ends on one of {', '.join(FORMATS)}")
    return FORMATS[suffix]


def is_format(data: bytes, format: str) -> bool:
    """Whether a file that the server wrote is of the format, by its first bytes."""
    return any(data.startswith(signature) for signature, each in _SIGNATURES.items() if each == format)


def write(path: Path, data: bytes) -> None:
    """Writes all of the file or nothing: what stood there is replaced in one step. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the name without the bytes
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_parts(paths: Iterable[Path]) -> None:
    """Removes what write() left of these files where it was killed, as far as that is allowed."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, ours in names.items():
        for each in folder.glob(".*.part"):
            if each.stem[1:].rpartition(".")[0] in ours:
                with suppress(OSError):
                    each.unlink()
