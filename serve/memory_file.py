"""Bytes in memory that another process can open: bodies and replies on their way between clients and workers."""

import asyncio
import fcntl
import mmap
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from secrets import token_hex
from types import TracebackType
from typing import NamedTuple, TypeVar

import pybase64

from contract import ticket

PIECE = 192 * 1024  # bytes read at once; a multiple of three, so that pieces of base64 fit together
_QUICK = 2**20  # bytes whose memory is given back in a quarter of a millisecond
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

T = TypeVar("T")

# Closing the last descriptor of 90 MiB takes the kernel 20 ms, which the event loop is not to wait for.
_closing = ThreadPoolExecutor(1, thread_name_prefix="closing")


class MemoryFile:
    """A file in no folder: it is gone with the last descriptor, whatever becomes of this process.

    Whoever makes one closes it, or hands it on to one who will. on_close: told once, when the memory is given back or
    about to be.
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
        """Reads it in pieces of PIECE bytes; the last may be shorter."""
        end = self.size if stop is None else stop
        for at in range(start, end, PIECE):
            yield self.read(at, min(at + PIECE, end))

    async def examined(self, work: Callable[[mmap.mmap | bytes], T]) -> T:
        """What work makes of its bytes, uncopied, in a thread beside the event loop. It is to keep none of them.

        Raises what work raises.
        """
        return await asyncio.to_thread(self._examined, work)

    def _examined(self, work: Callable[[mmap.mmap | bytes], T]) -> T:
        try:
            return work(mmap.mmap(self.descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) if self.size else b"")
        except Exception as error:
            # An error's frames would take the mapping to the event loop: giving 90 MiB of it back takes 10 ms.
            _forget_locals(error)
            raise

    def seal(self) -> None:
        """Keeps everybody from changing it from here on."""
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)

    def duplicate(self) -> "MemoryFile":
        """The same bytes for another owner."""
        return MemoryFile(os.dup(self.descriptor), self._name)

    def close(self) -> None:
        if self.descriptor < 0:
            return
        size, descriptor, self.descriptor = self.size, self.descriptor, -1
        if size > _QUICK:
            _closing.submit(os.close, descriptor)
        else:
            os.close(descriptor)
        self.on_close()

    def __enter__(self) -> "MemoryFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Part(NamedTuple):
    """Bytes start to stop of a file; text and content as in contract.ticket.Part."""

    file: MemoryFile
    start: int
    stop: int
    text: bool = False
    content: str = ""

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
        """The bytes of text_pieces, together."""
        return self.size if self.text else (self.size + 2) // 3 * 4

    def text_pieces(self) -> Iterator[bytes]:
        """Reads it as the inside of a JSON string: base64, unless it is text already."""
        return self.pieces() if self.text else map(pybase64.b64encode, self.pieces())


def whole(file: MemoryFile, text: bool = False) -> Part:
    return Part(file, 0, file.size, text)


def _forget_locals(error: BaseException | None) -> None:
    """Clears the frames of the functions that an error, and those that led to it, came through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _nothing() -> None:
    pass
