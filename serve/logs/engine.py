"""What TorchServe and its workers print, as lines of ours: of TorchServe what is wrong, of workers what they say.

A worker of ours marks what it logs during a request with the request's id (handlers/worker/marking.py).
"""

import re
import time
from collections.abc import Iterable, Iterator

from contract.marking import marked
from serve.logs.lines import LONGEST, Line

# Java's layout: time [LEVEL] thread logger - text. The thread of a worker's output: W-PORT-NAME_VERSION-stdout.
_LINE = re.compile(r"\d{4}-\S+ \[(\w+) *\] (.*?) ([\w.]+) - (.*)")
_WORKER = re.compile(r"W-\d+-p\.(.+?)(?:\.[0-9a-f]{12})?_[\w.]+-std(?:out|err)")
_WORTH = {"WARN": "warning", "ERROR": "error", "FATAL": "critical"}
# What TorchServe's own code says in every worker, and at every request.
_USUAL = re.compile(
    r"s_name_part0=|Listening on (?:port|addr)|Successfully loaded |\[PID\]|Torch worker started|Python runtime: "
    r"|Connection accepted: |model_name: \S+, batchSize: |Backend received inference at: |\[METRICS\]"
)
_LONGEST_LINE = 4 * LONGEST  # bytes without an end


class EngineLines:
    """Puts blocks together to lines; one that has no end is cut."""

    def __init__(self) -> None:
        self._rest = b""
        self._level = ""  # of the last line that was worth it: a stack trace follows it

    def lines(self, blocks: Iterable[bytes]) -> Iterator[Line]:
        for block in blocks:
            *whole, self._rest = (self._rest + block).split(b"\n")
            self._rest = self._rest[:_LONGEST_LINE]
            for each in whole:
                if line := self._line(each.decode(errors="replace").rstrip("\r")[:LONGEST]):
                    yield line

    def _line(self, printed: str) -> Line | None:
        match = _LINE.fullmatch(printed)
        if match is None:  # of a stack trace
            return Line(time.time(), self._level, "torchserve", printed, {}) if self._level and printed else None
        level, thread, logger, text = match.groups()
        self._level = ""
        worker = _WORKER.fullmatch(thread)
        if logger == "MODEL_LOG" and worker:
            if not text.strip() or _USUAL.match(text):
                return None
            request, said = marked(text)
            told = {"model": worker[1].replace("--", "/")} | ({"request": request} if request else {})
            return Line(time.time(), _WORTH.get(level, "info"), "worker", said, told)
        if level not in _WORTH:
            return None
        self._level = _WORTH[level]
        return Line(time.time(), self._level, "torchserve", f"{logger.rpartition('.')[2]}: {text}", {})
