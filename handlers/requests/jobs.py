"""Progress and cancellation of one request, shared with the gateway through a few bytes of its memory.

A ticket names them (contract/ticket.py); without one nothing is shared and every request runs to its end.
"""

import mmap
from collections.abc import Callable

from contract.progress import SIZE, Progress, packed_steps
from handlers.requests.errors import Cancelled

Report = Callable[[int, int], None]
"""Told (step, steps) after each step; may raise Cancelled."""


class SharedProgress:
    """One request's steps. memory: contract.progress.SIZE writable bytes, shared or not."""

    def __init__(self, memory: mmap.mmap | bytearray | None = None) -> None:
        self._memory = bytearray(SIZE) if memory is None else memory

    def report(self, step: int, steps: int) -> None:
        """`step` of `steps` are done; raises Cancelled where nobody waits for the next."""
        done = packed_steps(step, steps)
        self._memory[: len(done)] = done
        if Progress.read(self._memory).cancelled:
            raise Cancelled


UNWATCHED: Report = SharedProgress().report
"""Where no client waits."""


def part(report: Report, index: int, count: int) -> Report:
    """Reports the steps of one part of the work, of `count` as long ones, as steps of all."""
    return lambda step, steps: report(index * steps + step, count * steps)


def attach(descriptor: int) -> SharedProgress:
    """The job whose bytes a descriptor shares, which may be closed; raises OSError or ValueError where it can't."""
    return SharedProgress(mmap.mmap(descriptor, SIZE))
