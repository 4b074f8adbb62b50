"""What is noted of one request while it is served: for its line in the log, its metrics and its trace."""

import re
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import NamedTuple
from uuid import uuid4

Headers = Iterable[tuple[bytes, bytes]]

HEADER = "x-request-id"
STAGES = ("queue", "load", "engine", "decode", "embed", "recall", "mask", "model", "encode", "keep")
"""As contract.timings has them; what else a worker may call its stages is left out."""

# Nothing that a line, a shell or a page takes for more than text; and no key, which clients do put in wrong places.
_SAFE = re.compile(rb"(?!pk_)[A-Za-z0-9][A-Za-z0-9._:=@+/-]{0,127}")
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}", re.ASCII)
_METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}
_MOST_MODELS = 8  # of one request


class Asked(NamedTuple):
    """One model that a request asked. Times are time.perf_counter()'s.

    began, entered, ended: when it was asked, when it got the model (None: never), when it had the answer or gave up.
    came: when the load or waking that it waited for began and ended. worker: seconds by stage, as the worker says.
    """

    model: str
    began: float
    entered: float | None
    ended: float
    came: tuple[float, float] | None
    worker: Mapping[str, float]


class Record:
    """One request. route: the template, never the path. key: the key's name. code: of the error, as clients see it.

    received, sent: bytes of the bodies. outcome: ok, error, cancelled, client_left or cut_off. traceparent: what
    workers are told of the trace.
    """

    __slots__ = (
        "asked", "began", "code", "ended", "id", "key", "method", "outcome", "received", "route", "sent", "status",
        "timings", "traceparent",
    )  # fmt: skip

    def __init__(self, request_id: str, method: str) -> None:
        self.id, self.method = request_id, method if method in _METHODS else "OTHER"
        self.route = self.code = self.outcome = self.traceparent = ""
        self.key: str | None = None
        self.status = self.received = self.sent = 0
        self.asked: list[Asked] = []
        self.timings: dict[str, float] = {}
        self.began, self.ended = time.perf_counter(), 0.0

    def took(self, timings: Mapping[str, float]) -> None:
        """Seconds by stage; of several models together."""
        for name in STAGES:
            if name in timings:
                self.timings[name] = self.timings.get(name, 0.0) + timings[name]

    def has_asked(self, asked: Asked) -> None:
        if len(self.asked) < _MOST_MODELS:
            self.asked.append(asked)

    def fails(self, code: str) -> None:
        """The first error is the one that matters: what wraps it says less."""
        self.code = self.code or (code if _CODE.fullmatch(code) else "other")

    def fields(self) -> dict[str, str | int | float]:
        """What its line says, in that order."""
        models = dict.fromkeys(asked.model for asked in self.asked)
        told: dict[str, str | int | float | None] = {
            "request": self.id,
            "key": self.key,
            "method": self.method,
            "route": self.route or "(none)",
            "status": self.status,
            "outcome": self.outcome,
            "code": self.code or None,
            "model": "+".join(models) or None,
            "bytes_in": self.received,
            "bytes_out": self.sent,
            "ms": round(1000 * (self.ended - self.began), 2),
            **{f"{name}_ms": round(1000 * seconds, 2) for name, seconds in self.timings.items()},
            "trace": self.traceparent[3:35] or None,
        }
        return {name: value for name, value in told.items() if value is not None}


_current: ContextVar[Record | None] = ContextVar("request", default=None)


def current() -> Record | None:
    """The request that this task serves, also from a task that it has started; None elsewhere."""
    return _current.get()


def begin(record: Record) -> None:
    """The request is the present task's, to its end."""
    _current.set(record)


def fails(code: str) -> None:
    """The present request, if any, is answered with this error."""
    if record := _current.get():
        record.fails(code)


def request_id(headers: Headers) -> str:
    """The client's own id where it sent one that can stand in a line; else a new one. headers: names in lower case."""
    given = [value for name, value in headers if name == HEADER.encode()]
    if len(given) == 1 and _SAFE.fullmatch(given[0]):
        return given[0].decode()
    return uuid4().hex
