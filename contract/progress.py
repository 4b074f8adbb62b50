"""How far a request is, and whether anybody still waits for it: a few bytes that gateway and worker share.

The worker writes step and steps; the gateway writes that the job is cancelled, and reads.
"""

import struct
from typing import NamedTuple

from contract.buffers import Buffer

_ALL = struct.Struct("<III")
_STEPS = struct.Struct("<II")
SIZE = _ALL.size
"""Bytes."""
CANCELLED_AT = _STEPS.size
"""Where CANCELLED is to be written."""
CANCELLED = (1).to_bytes(4, "little")


class Progress(NamedTuple):
    """step of steps are done. Without steps the model has not said anything yet."""

    step: int = 0
    steps: int = 0
    cancelled: bool = False

    @classmethod
    def read(cls, memory: Buffer) -> "Progress":
        """memory: SIZE bytes."""
        step, steps, cancelled = _ALL.unpack_from(memory)
        return cls(step, steps, bool(cancelled))


def packed_steps(step: int, steps: int) -> bytes:
    """Returns the bytes that are written at the beginning."""
    return _STEPS.pack(step, steps)
