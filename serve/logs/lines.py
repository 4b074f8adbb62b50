"""How a line looks, for people and as JSON: whatever is in it, it is one line, and its fields are what they seem."""

import json
import logging
import re
import time
import traceback
from types import TracebackType
from typing import NamedTuple

from serve.logs.record import Record, current

LONGEST = 8 * 1024  # characters of a text; what comes after is left out
CUT = " (cut)"
# What ends a line, moves a terminal's cursor or turns the direction of writing around.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_BARE = re.compile(r"[^\s\"=\\]+")


class Line(NamedTuple):
    """when: time.time(). fields: further ones. frames: where an exception was raised, a line each."""

    when: float
    level: str
    source: str
    text: str
    fields: dict[str, str | int | float]
    frames: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: logging.LogRecord) -> "Line":
        """To be called where the record was made: it asks for the present request."""
        request: Record | None = getattr(record, "request", None)
        if request is not None:
            return cls(record.created, "info", "request", "", request.fields())
        text = record.getMessage()
        if record.name == "asyncio":
            text = text.partition("\n")[0]  # after which it shows an exception's text, or what a call was given
        serves = current()
        error = record.exc_info[1] if record.exc_info else None
        return cls(
            record.created,
            record.levelname.lower(),
            record.name,
            _cut(text),
            {"request": serves.id} if serves else {},
            () if error is None else tuple(_frames(error)),
        )

    def as_json(self) -> str:
        told = {"time": _utc(self.when), "level": self.level, "source": self.source}
        told |= {"text": self.text} if self.text else {}
        frames = {"frames": list(self.frames)} if self.frames else {}
        return json.dumps(told | self.fields | frames)

    def for_people(self) -> str:
        text = f" {one_line(self.text)}" if self.text else ""
        fields = "".join(f" {name}={_bare(value)}" for name, value in self.fields.items())
        head = f"{_utc(self.when)} {self.level:<7} {self.source}{text}{fields}"
        return "\n    ".join([head, *map(one_line, self.frames)])


def one_line(text: str) -> str:
    """The text with whatever might pass for more than text written out."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _bare(value: str | int | float) -> str:
    text = one_line(str(value))
    return text if _BARE.fullmatch(text) else json.dumps(text)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + CUT


def _frames(error: BaseException) -> list[str]:
    """Types and frames of an exception and its causes, the first one first, without any text of theirs."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and len(chain) < 5 and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    lines = []
    for each in reversed(chain):
        lines += [*_places(each.__traceback__), type(each).__name__]
    return [_cut(line) for line in lines[-60:]]


def _places(trace: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)[-20:]]


def _utc(when: float) -> str:
    seconds, milliseconds = divmod(int(when * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{milliseconds:03}Z"
