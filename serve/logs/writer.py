"""Writes lines in a thread of its own: whoever has something to say puts it into a bounded queue and goes on."""

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from serve.logs.engine import EngineLines
from serve.logs.lines import Line
from serve.logs.record import Record
from serve.logs.sinks import RotatedFile, Stream
from serve.settings import LogFormat, Settings

NAME = "palimpsest.log"
MOST = 5000  # lines that wait
MOST_BLOCKS = 64  # of what TorchServe says, 64 KiB each
GATHER = 0.05  # seconds between two writes, so that a busy server does not wake the thread for each line
END_SECONDS = 3.0  # for the last lines

Item = TypeVar("Item")
requests = logging.getLogger("serve.requests")
"""Takes a line for each request, by `write_request`. Where no log was begun nothing is written."""


class Sink(Protocol):
    def write(self, lines: list[bytes]) -> int: ...

    def close(self) -> None: ...


def write_request(record: Record) -> None:
    """The line of a request that is over."""
    if requests.isEnabledFor(logging.INFO):
        requests.info("", extra={"request": record})


class Writer(logging.Handler):
    """lost: lines that found no room, in the queue or where they were to go; said once there is some."""

    def __init__(self, sinks: Sequence[Sink], form: LogFormat) -> None:
        super().__init__()
        self._sinks, self._text = sinks, Line.as_json if form == "json" else Line.for_people
        self._lines: deque[Line] = deque()
        self._blocks: deque[bytes] = deque()
        self._engine = EngineLines()
        self._wake, self._ending = threading.Event(), threading.Event()
        self.lost = self._told = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = Line.of(record)
        except Exception:  # what is to be logged cannot be said: a fault, but none of who asked
            line = Line(record.created, "error", record.name, "a line that cannot be written", {})
        self._put(self._lines, line, MOST)

    def engine_said(self, block: bytes) -> None:
        """What TorchServe has printed: any part of any line."""
        self._put(self._blocks, block, MOST_BLOCKS)

    def end(self) -> None:
        """Writes what is left, within a bound."""
        self._ending.set()
        self._wake.set()
        self._thread.join(END_SECONDS)

    def _put(self, queue: deque[Item], item: Item, most: int) -> None:
        if len(queue) >= most:
            self.lost += 1
            return
        queue.append(item)
        if not self._wake.is_set():
            self._wake.set()

    def _run(self) -> None:
        while not self._ending.is_set():
            self._wake.wait()
            self._ending.wait(GATHER)
            self._wake.clear()
            self._write_all()
        self._write_all()
        for sink in self._sinks:
            sink.close()

    def _write_all(self) -> None:
        lines = [*_taken(self._lines), *self._engine.lines(_taken(self._blocks))]
        if self.lost > self._told:
            text = f"{self.lost - self._told} lines were lost: more came than could be written"
            lines.append(Line(time.time(), "warning", __name__, text, {}))
            self._told = self.lost
        encoded = [f"{self._text(line)}\n".encode() for line in lines]
        if encoded:
            self.lost += max(_written(sink, encoded) for sink in self._sinks)


def _written(sink: Sink, lines: list[bytes]) -> int:
    """Returns how many are lost: all where the sink itself is at fault, which must not end the thread."""
    try:
        return sink.write(lines)
    except Exception:
        return len(lines)


def _taken(queue: deque[Item]) -> Iterator[Item]:
    for _ in range(len(queue)):
        yield queue.popleft()


def lost_lines() -> int:
    """By the log that is begun, if any."""
    return sum(handler.lost for handler in logging.getLogger().handlers if isinstance(handler, Writer))


@contextmanager
def logging_begun(settings: Settings) -> Iterator[Writer]:
    """Until its end all that is logged goes to STATE/logs/palimpsest.log and to stderr."""
    sinks: list[Sink] = [RotatedFile(settings.state / "logs" / NAME)]
    with suppress(OSError, ValueError):  # there may be none
        sinks.append(Stream(sys.stderr.fileno()))
    writer = Writer(sinks, settings.log_format)
    root, own = logging.getLogger(), logging.getLogger("serve")
    before = own.level
    root.addHandler(writer)
    own.setLevel(logging.INFO)
    try:
        yield writer
    finally:
        root.removeHandler(writer)
        own.setLevel(before)
        writer.end()
