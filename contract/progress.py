"""How far a request is, whether anybody still waits for it, and a draft of what comes: memory that both sides share.

The worker writes step and steps, and where there is room for one the newest preview; the gateway writes that the job is
cancelled, and reads.
"""

import struct
from mmap import mmap
from typing import NamedTuple
from zlib import crc32

from contract.buffers import Buffer

_ALL = struct.Struct("<III")
_STEPS = struct.Struct("<II")
SIZE = _ALL.size
"""Bytes, without a preview."""
CANCELLED_AT = _STEPS.size
"""Where CANCELLED is to be written."""
CANCELLED = (1).to_bytes(4, "little")

# number, size and checksum of the picture; then variant and box
_PREVIEW = struct.Struct("<IIII4i")
MAX_PREVIEW = 2**16
"""Bytes of a preview's picture; a larger one is not shown."""
SIZE_WITH_PREVIEW = SIZE + _PREVIEW.size + MAX_PREVIEW
"""Bytes where somebody wants to see previews."""


class Progress(NamedTuple):
    """step of steps are done. Without steps the model has not said anything yet."""

    step: int = 0
    steps: int = 0
    cancelled: bool = False

    @classmethod
    def read(cls, memory: Buffer) -> "Progress":
        """memory: SIZE bytes or more."""
        step, steps, cancelled = _ALL.unpack_from(memory)
        return cls(step, steps, bool(cancelled))


class Preview(NamedTuple):
    """A small picture of what a variant (from 0) is about to be. number: one more than that of the one before.

    box: left, top, right, bottom of where it belongs, in pixels of the upright picture. picture: a PNG file.
    """

    number: int
    variant: int
    box: tuple[int, int, int, int]
    picture: bytes

    def write(self, memory: bytearray | mmap) -> None:
        """memory: SIZE_WITH_PREVIEW bytes; the picture has MAX_PREVIEW at most."""
        head = _PREVIEW.pack(self.number, len(self.picture), crc32(self.picture), self.variant, *self.box)
        written = head + self.picture
        memory[SIZE : SIZE + len(written)] = written

    @classmethod
    def read(cls, memory: Buffer) -> "Preview | None":
        """The newest; None where there is none yet, or another is just being written."""
        if len(memory) < SIZE_WITH_PREVIEW:
            return None
        number, size, checksum, variant, *box = _PREVIEW.unpack_from(memory, SIZE)
        start = SIZE + _PREVIEW.size
        picture = bytes(memory[start : start + min(size, MAX_PREVIEW)])
        if number == 0 or len(picture) != size or crc32(picture) != checksum:
            return None
        left, top, right, bottom = box
        return cls(number, variant, (left, top, right, bottom), picture)


def packed_steps(step: int, steps: int) -> bytes:
    """Returns the bytes that are written at the beginning."""
    return _STEPS.pack(step, steps)
