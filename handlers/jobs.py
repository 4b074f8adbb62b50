"""Progress and cancellation of one request, shared with the gateway through twelve bytes of its memory.

They are three little-endian uint32: steps done, steps in all (both written here), and whether the job is cancelled
(written by the gateway). A ticket names them (contract/ticket.py); without one nothing is shared and every request runs
to its end.
"""

import mmap
import struct
from collections.abc import Callable

from handlers.errors import Cancelled

_LAYOUT = struct.Struct("<III")

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


def attach(descriptor: int) -> Job:
    """The job whose bytes a descriptor shares, which may be closed; raises OSError or ValueError where it can't."""
    return Job(mmap.mmap(descriptor, _LAYOUT.size))
