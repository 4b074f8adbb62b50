"""Progress and cancellation of one request, shared with the gateway through a small file.

The file holds three little-endian uint32: steps done, steps in all (both written here), and whether the job is
cancelled (written by the gateway). A request names it in the header `x-palimpsest-job`, which the gateway strips from
what clients send; it lies in the folder that PALIMPSEST_JOBS names in the worker's environment. Without either, nothing
is shared and every request runs to its end.
"""

import mmap
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

from handlers.errors import Cancelled

HEADER = "x-palimpsest-job"
FOLDER = "PALIMPSEST_JOBS"
_LAYOUT = struct.Struct("<III")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

Report = Callable[[int, int], None]
"""Told (step, steps) after each step; may raise Cancelled."""


class Job:
    """One request's steps. memory: 12 writable bytes, shared or not."""

    def __init__(self, memory: mmap.mmap | bytearray | None = None) -> None:
        self._memory = bytearray(_LAYOUT.size) if memory is None else memory

    def report(self, step: int, steps: int) -> None:
        """`step` of `steps` are done; raises Cancelled where nobody waits for the next."""
        struct.pack_into("<II", self._memory, 0, step, steps)
        if _LAYOUT.unpack_from(self._memory)[2]:
            raise Cancelled


UNWATCHED: Report = Job().report
"""Where no client waits."""


def attach(name: str) -> Job:
    """The job that a request's header names; one that nobody watches where there is no such file."""
    folder = os.environ.get(FOLDER)
    if not folder or not _NAME.fullmatch(name):
        return Job()
    try:
        handle = os.open(Path(folder) / name, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return Job()
    try:
        return Job(mmap.mmap(handle, _LAYOUT.size))
    except (OSError, ValueError):  # not a file, or a shorter one
        return Job()
    finally:
        os.close(handle)
