"""Where lines go: a file that is rotated, and a stream that nobody may be reading. Neither can hold anybody up."""

import contextlib
import os
import select
from collections.abc import Iterable, Iterator
from pathlib import Path

FILE_BYTES = 10 * 2**20
FILES = 5  # the present one and those before it
PATIENCE = 1.0  # seconds for whoever reads the stream
_PIECE = 64 * 1024  # bytes of one write
_PIPE = select.PIPE_BUF  # bytes that a pipe which has room takes without waiting


class RotatedFile:
    """path, and path.1 to path.4 before it. A disk that is full costs the lines, and nothing else."""

    def __init__(self, path: Path, size: int = FILE_BYTES, count: int = FILES) -> None:
        self._path, self._size, self._count = path, size, count
        self._descriptor = -1
        self._amid_line = False  # the disk was full

    def write(self, lines: list[bytes]) -> int:
        """Returns how many are lost."""
        done = 0
        for text, count in _pieces(lines, min(_PIECE, self._size)):
            try:
                self._open(len(text))
                self._append(text)
                done += count
            except OSError:
                self.close()
        return len(lines) - done

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, text: bytes) -> None:
        view = memoryview(b"\n" + text if self._amid_line else text)
        while view:
            written = os.write(self._descriptor, view)
            self._amid_line = written < len(view)
            view = view[written:]

    def _open(self, coming: int) -> None:
        """Somebody else may have moved it away, or write into it, too."""
        size = self._of_path()
        if size is None:
            size = self._open_anew()
        if size and size + coming > self._size:
            self._rotate()
            self._open_anew()

    def _open_anew(self) -> int:
        self.close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return os.fstat(self._descriptor).st_size

    def _of_path(self) -> int | None:
        """Bytes of the file, where the descriptor is still the path's."""
        if self._descriptor < 0:
            return None
        with contextlib.suppress(FileNotFoundError):
            there, here = os.stat(self._path), os.fstat(self._descriptor)
            if os.path.samestat(there, here):
                return here.st_size
        return None

    def _rotate(self) -> None:
        self.close()
        for number in range(self._count - 1, 0, -1):
            before = self._path if number == 1 else Path(f"{self._path}.{number - 1}")
            with contextlib.suppress(FileNotFoundError):
                before.replace(f"{self._path}.{number}")


class Stream:
    """A descriptor of this process, which stays open. What its reader does not take in PATIENCE seconds is lost."""

    def __init__(self, descriptor: int, patience: float = PATIENCE) -> None:
        self._descriptor, self._patience = descriptor, patience
        self._stuck = False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write(self, lines: list[bytes]) -> int:
        """Returns how many are lost."""
        done = 0
        for text, count in _pieces(lines, _PIPE):
            try:
                if not self._sent(text):
                    break
            except OSError:  # it is closed at the other end
                break
            done += count
        return len(lines) - done

    def close(self) -> None:
        """Nothing: it is not ours."""

    def _sent(self, text: bytes) -> bool:
        view = memoryview(text)
        while view:
            if not self._poll.poll(0 if self._stuck else 1000 * self._patience):
                self._stuck = True
                return False
            self._stuck = False
            view = view[os.write(self._descriptor, view[:_PIPE]) :]
        return True


def _pieces(lines: Iterable[bytes], size: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines joined, about so many bytes at once, and how many there are."""
    joined: list[bytes] = []
    length = 0
    for line in lines:
        if joined and length + len(line) > size:
            yield b"".join(joined), len(joined)
            joined, length = [], 0
        joined.append(line)
        length += len(line)
    if joined:
        yield b"".join(joined), len(joined)
