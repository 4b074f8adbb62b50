"""The file by which a folder of packed archives becomes a store on any web server."""

import os
import time
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from handlers.building.files import ProgressBar
from serve.archives.download import sha256_of
from serve.store.remote import INDEX, LONGEST_NAME, MOST_ARCHIVES, Entry, Index
from serve.store.unpack import SUFFIXES


class IndexFull(Exception):
    """The folder holds more than a store on a URL may."""


class Written(NamedTuple):
    file: Path
    archives: int


def write(folder: Path, progress: ProgressBar) -> Written:
    """Puts FOLDER/INDEX there in one step. Files that are as they were when it was last written are not read again.

    Raises IndexFull and OSError.
    """
    began, (before, written) = time.time_ns(), _earlier(folder / INDEX)
    names = _names(folder)
    if len(names) > MOST_ARCHIVES:
        raise IndexFull(f"{folder} holds {len(names):,} archives, and a store on a URL may have {MOST_ARCHIVES:,}")
    entries = []
    for name in names:
        status, entry = (folder / name).stat(), before.get(name)
        # By the time of its change, which copying cannot set back.
        if entry is None or entry.size != status.st_size or status.st_ctime_ns >= written:
            entry = Entry(name=name, size=status.st_size, sha256=sha256_of(folder / name, progress))
        entries.append(entry)
    new = folder / f".{INDEX}.{os.getpid()}"
    try:
        new.write_text(Index(archives=entries).model_dump_json(indent=1))
        os.utime(new, ns=(began, began))  # what has changed since then is read the next time
        new.replace(folder / INDEX)
    finally:
        new.unlink(missing_ok=True)
    return Written(folder / INDEX, len(entries))


def _names(folder: Path) -> list[str]:
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file()]
    shown = [file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)]
    return sorted(name for name in shown if len(name) <= LONGEST_NAME)


def _earlier(file: Path) -> tuple[dict[str, Entry], int]:
    """What it says by name, and up to when, in nanoseconds; nothing where there is none of use."""
    try:
        written, index = file.stat().st_mtime_ns, Index.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return {}, 0
    return {each.name: each for each in index.archives}, written
