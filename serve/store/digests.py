"""Hashes of what archives hold: the same for the same content, wherever it lies and whenever it was put there."""

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from serve.store.locks import Stopped

RECORD = "MAR-INF/palimpsest.json"
"""What a build of ours writes down of itself; under `files` the size and the sha256 of each file."""
_CHUNK = 1 << 20
# Nanoseconds since a file's last change within which another may follow: somebody still copies the archive.
_UNSETTLED = 2 * 10**9


class Content(NamedTuple):
    """digest: of all files' paths and bytes. settled: whether none of them has changed in this moment."""

    digest: str
    settled: bool


def sha256(file: BinaryIO, stopped: threading.Event) -> str:
    """Of all that is left to read, in hexadecimal digits. Raises Stopped once the event is set, and OSError."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        if stopped.is_set():
            raise Stopped
        digest.update(chunk)
    return digest.hexdigest()


def content(folder: Path, stopped: threading.Event) -> Content:
    """Of a folder. Reads all its files, but for those of an archive of ours that lie there as they were built.

    Raises Stopped and OSError.
    """
    files = _files(folder)
    known = _unchanged(folder, files)
    digest = hashlib.sha256()
    for path in files:
        line = f"{path}\0{known.get(path) or _of_file(folder / path, stopped)}\n"
        digest.update(line.encode(errors="surrogateescape"))
    newest = max((status.st_mtime_ns for status in files.values()), default=0)
    return Content(digest.hexdigest(), is_settled(newest))


def to_record(folder: Path, known: Mapping[str, str]) -> dict[str, Any]:
    """What RECORD is to say of the folder's files, by path. known: digests of some that need not be read."""
    never = threading.Event()
    return {
        path: {"bytes": status.st_size, "sha256": known.get(path) or _of_file(folder / path, never)}
        for path, status in _files(folder).items()
        if path != RECORD
    }


def recorded(folder: Path) -> dict[str, str]:
    """Digests by path that RECORD says, of those files that have their size still and were not changed since."""
    return _unchanged(folder, _files(folder))


def _unchanged(folder: Path, files: Mapping[str, os.stat_result]) -> dict[str, str]:
    try:
        told = json.loads((folder / RECORD).read_bytes())["files"]
        written = files[RECORD].st_mtime_ns
        return {
            path: str(told[path]["sha256"])
            for path, status in files.items()
            if path in told and status.st_size == told[path]["bytes"] and status.st_mtime_ns <= written
        }
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}  # there is no such record, or it makes no sense: all files are read


def is_settled(changed: int) -> bool:
    """Whether what changed then, in nanoseconds as time.time_ns(), did not do so in this moment."""
    return time.time_ns() - changed > _UNSETTLED


def _of_file(path: Path, stopped: threading.Event) -> str:
    with open(path, "rb", buffering=0) as file:
        return sha256(file, stopped)


def _files(folder: Path) -> dict[str, os.stat_result]:
    """All files by their path in the folder, sorted; not what Python leaves behind when a worker starts."""
    found, top = {}, len(str(folder)) + 1
    for path, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [each for each in folders if each != "__pycache__"]
        for file in files:
            whole = os.path.join(path, file)
            status = os.stat(whole)
            if stat.S_ISREG(status.st_mode):
                found[whole[top:]] = status
    return dict(sorted(found.items()))


def _raise(error: OSError) -> None:
    raise error
