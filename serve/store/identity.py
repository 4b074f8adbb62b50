"""What tells at a glance, without reading it, that something else lies in a place: a few stat calls."""

import hashlib
import os
import stat
from pathlib import Path

from serve.store.digests import RECORD
from serve.store.unpack import MANIFEST

# Not the folder's own time: Python writes __pycache__ into it when a worker starts.
_IDENTIFYING = (MANIFEST, RECORD, "model-config.yaml", "handler.py")
_DIGITS = 16  # hexadecimal


def folder_identity(path: Path) -> str | None:
    """Of the folder and of the files that say what it is; None where it is no archive."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        # By the descriptor: the path may name another folder a moment later.
        files = [_status(name, folder) for name in _IDENTIFYING]
        inode = os.fstat(folder).st_ino
    finally:
        os.close(folder)
    return _digits((inode, files)) if files[0] else None


def file_identity(file: Path) -> str | None:
    """None where there is no regular file."""
    status = _status(file)
    return _digits(status) if status else None


def _digits(identity: object) -> str:
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:_DIGITS]


def _status(path: Path | str, folder: int | None = None) -> tuple[int, int, int] | None:
    """Inode, bytes and nanoseconds of the last change of a regular file; None where there is none."""
    try:
        status = os.stat(path, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
