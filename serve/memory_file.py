"""Bytes in memory that another process can open: bodies and replies on their way between clients and workers."""

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from secrets import token_hex
from types import TracebackType
from typing import NamedTuple

import pybase64

from contract import ticket

PIECE = 192 * 1024  # bytes read at once; a multiple of three, so that pieces of base64 fit together
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class MemoryFile:
    """A file in no folder: it is gone with the last descriptor, whatever becomes of this process.

    Whoever makes one closes it, or hands it on to one who will. on_close: told once that the memory is given back.
    """

    def __init__(self, descriptor: int | None = None, name: str = "") -> None:
        self._name = name or token_hex(16)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self.descriptor = os.memfd_create(self._name, flags) if descriptor is None else descriptor
        self.on_close: Callable[[], None] = _nothing

    @property
    def file(self) -> ticket.File:
        """What a ticket calls it."""
        return ticket.File(f"/proc/{os.getpid()}/fd/{self.descriptor}", self._name)

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def write(self, piece: bytes | memoryview) -> None:
        """Adds to its end."""
        view = memoryview(piece)
        while view:
            view = view[os.write(self.descriptor, view) :]

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return os.pread(self.descriptor, (self.size if stop is None else stop) - start, start)

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """Of PIECE bytes each but the last."""
        end = self.size if stop is None else stop
        for at in range(start, end, PIECE):
            yield self.read(at, min(at + PIECE, end))

    def mapped(self) -> mmap.mmap | bytes:
        """Its bytes, uncopied: gone when nobody refers to them any more."""
        return mmap.mmap(self.descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) if self.size else b""

    def seal(self) -> None:
        """From here on nobody can change it."""
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def duplicate(self) -> "MemoryFile":
        """The same bytes for another owner."""
        return MemoryFile(os.dup(self.descriptor), self._name)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
            self.on_close()

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Part(NamedTuple):
    """Bytes start to stop of a file; text as in contract.ticket.Part."""

    file: MemoryFile
    start: int
    stop: int
    text: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def named(self) -> ticket.Part:
        """What a ticket calls it."""
        return ticket.Part(self.file.file, *self[1:])

    def pieces(self) -> Iterator[bytes]:
        return self.file.pieces(self.start, self.stop)

    @property
    def text_size(self) -> int:
        """Of text_pieces, together."""
        return self.size if self.text else (self.size + 2) // 3 * 4

    def text_pieces(self) -> Iterator[bytes]:
        """As the inside of a JSON string: base64, unless it is text already."""
        return self.pieces() if self.text else map(pybase64.b64encode, self.pieces())


def whole(file: MemoryFile, text: bool = False) -> Part:
    return Part(file, 0, file.size, text)


def _nothing() -> None:
    pass
