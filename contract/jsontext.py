"""JSON -> values, with a bound on everything: what is past one is refused before it is made.

A reader of our own, because json makes every key and value of a hostile body before anything can be counted, in one
call that nothing else runs beside; and because it would copy pictures, which stay in the body as slices.
"""

import math
import re
from typing import Any

from contract.buffers import WINDOW, Buffer, Slice, decoded, unescaped
from contract.errors import BodyError

MAX_VALUES = 5_000
MAX_DEPTH = 16
MAX_NAME = 200  # bytes of a key
MAX_NUMBER = 300  # characters, so that every whole number fits a float
MAX_SHORT = 16 * 1024  # bytes of a string that is made at once; a longer one stays in the body
MAX_TEXT = 2**20  # bytes of all such strings together
MAX_RECODED = 8 * 2**20  # bytes of a body that is not UTF-8, which has to be copied

_NAMED = 2  # names that make up a field's: gen_args.seed

_SPACE = re.compile(rb"[ \t\r\n]*+")
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_NUMBER = re.compile(rb"(-?(?:0|[1-9][0-9]*))((?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")
_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
_WORD = re.compile(rb"[a-zA-Z]{0,20}")
_WORDS = {b"true": True, b"false": False, b"null": None}
_AFTER_NUMBER = b" \t\r\n,]}"


def read_object(body: memoryview) -> dict[str, Any]:
    """A body -> its fields, of which long strings are slices of it. UTF-8; or UTF-16 or -32, whose strings are texts.

    Raises BodyError.
    """
    encoding, mark = encoding_of(bytes(body[:4]))
    if encoding == "utf-8":
        reader = _Reader(body, mark, len(body), None, slices=True)
    else:
        if len(body) > MAX_RECODED:
            raise BodyError(f"JSON in {encoding.upper()} may have {MAX_RECODED >> 20} MiB: send UTF-8", status=413)
        text = decoded(body[mark:], encoding, None).encode("utf-8", "surrogatepass")
        reader = _Reader(memoryview(text), 0, len(text), None, slices=False)
    values = reader.read()
    if not isinstance(values, dict):
        raise BodyError("the body must be a JSON object or multipart/form-data")
    return values


def read_value(body: Buffer, start: int, stop: int, field: str, slices: bool) -> Any:
    """The value that is written as JSON in the UTF-8 bytes start to stop, a field of its own.

    slices: whether long strings stay in the body; otherwise all are texts. Raises BodyError, which names the field.
    """
    view = memoryview(body)
    encoding, mark = encoding_of(bytes(view[start : start + 4]))
    if encoding != "utf-8":
        raise BodyError(f"{field} must be JSON in UTF-8", field)
    return _Reader(view, start + mark, stop, field, slices).read()


def encoding_of(head: bytes) -> tuple[str, int]:
    """What JSON begins with (4 bytes) -> its encoding and the length of its byte order mark (RFC 4627, part 3)."""
    marks = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe\0\0": "utf-32-le", b"\0\0\xfe\xff": "utf-32-be"}
    for mark, encoding in (marks | {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}).items():
        if head.startswith(mark):
            return encoding, len(mark)
    zeros = "".join("0" if byte == 0 else "x" for byte in head)
    patterns = {"x000": "utf-32-le", "000x": "utf-32-be", "x0x0": "utf-16-le", "0x0x": "utf-16-be"}
    return patterns.get(zeros, "utf-8"), 0


class _Reader:
    """field: what the value belongs to; None for a body, whose own keys then are the fields."""

    def __init__(self, view: memoryview, start: int, stop: int, field: str | None, slices: bool) -> None:
        self._view, self._at, self._stop = view, start, stop
        self._start, self._whole, self._slices = start, field, slices
        self._path = [field] if field else []
        self._values = self._text = 0

    def read(self) -> Any:
        value = self._value(0)
        if self._next():
            raise self._invalid()
        return value

    def _value(self, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self._error(f"holds more than {MAX_VALUES} values", status=413)
        first = self._next()
        if first == b'"':
            return self._string()
        if first in (b"{", b"["):
            if depth == MAX_DEPTH:
                raise self._error(f"is nested more than {MAX_DEPTH} deep")
            self._at += 1
            return self._object(depth + 1) if first == b"{" else self._array(depth + 1)
        if _NOT_FINITE.match(self._view, self._at, self._stop):
            raise self._error("must be finite, and JSON")
        if first == b"-" or first.isdigit():
            return self._number()
        word = _WORD.match(self._view, self._at, self._stop)
        if word is None or word[0] not in _WORDS:
            raise self._invalid()
        self._at = word.end()
        return _WORDS[word[0]]

    def _object(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self._take(b"}"):
            return values
        while True:
            name = self._name()
            self._path.append(name)
            if name in values:
                raise self._error("was sent twice")
            if not self._take(b":"):
                raise self._invalid()
            values[name] = self._value(depth)
            self._path.pop()
            if self._take(b"}"):
                return values
            if not self._take(b","):
                raise self._invalid()

    def _array(self, depth: int) -> list[Any]:
        values: list[Any] = []
        if self._take(b"]"):
            return values
        while True:
            values.append(self._value(depth))
            if self._take(b"]"):
                return values
            if not self._take(b","):
                raise self._invalid()

    def _name(self) -> str:
        if self._next() != b'"':
            raise self._invalid()
        start, stop, escaped = self._bounds()
        if stop - start > MAX_NAME:
            raise self._error(f"has a name of more than {MAX_NAME} bytes")
        return self._made(start, stop, escaped)

    def _string(self) -> str | Slice:
        start, stop, escaped = self._bounds()
        if self._slices and stop - start > MAX_SHORT:
            return Slice(start, stop, text=True, escaped=escaped)
        return self._made(start, stop, escaped)

    def _made(self, start: int, stop: int, escaped: bool) -> str:
        self._text += stop - start
        if self._slices and self._text > MAX_TEXT:
            raise self._error(f"holds more than {MAX_TEXT >> 20} MiB of short texts", status=413)
        text = decoded(self._view[start:stop], "utf-8", self._field)
        return unescaped(text, self._field) if escaped else text

    def _bounds(self) -> tuple[int, int, bool]:
        """Returns start and end of the string's inside, and whether it has escapes; the place behind it is next."""
        start = at = self._at + 1
        escaped, size = False, 512
        while at < self._stop:
            window = bytes(self._view[at : min(at + size, self._stop)])  # never begins behind a backslash
            quote = window.find(b'"')
            before = window if quote < 0 else window[:quote]
            if b"\\" in before:
                escaped = True
                if (len(before) - len(before.rstrip(b"\\"))) % 2:  # what follows is escaped, or in the next window
                    inside = _INSIDE.match(window)
                    end = inside.end() if inside else 0
                    quote = end if window[end : end + 1] == b'"' else -1
                    window = window[:end]
                    if not window:
                        break
            if quote >= 0:
                self._at = at + quote + 1
                return start, at + quote, escaped
            at += len(window)
            size = min(size * 4, WINDOW)
        self._at = self._stop
        raise self._invalid()

    def _number(self) -> int | float:
        match = _NUMBER.match(self._view, self._at, min(self._at + MAX_NUMBER, self._stop))
        if match is None:
            raise self._invalid()
        end = match.end()
        if end < self._stop and self._view[end] not in _AFTER_NUMBER:
            raise self._error(f"has a number of more than {MAX_NUMBER} characters, or what is none")
        self._at = end
        if not match[2]:
            return int(match[1])
        number = float(match[0])
        if not math.isfinite(number):
            raise self._error("must be finite")
        return number

    def _next(self) -> bytes:
        """The next byte that is no white space, which is not taken; nothing at the end."""
        while self._at < self._stop:
            space = _SPACE.match(self._view, self._at, min(self._at + WINDOW, self._stop))
            end = space.end() if space else self._at
            if end < min(self._at + WINDOW, self._stop):
                self._at = end
                return bytes(self._view[end : end + 1])
            self._at = end
        return b""

    def _take(self, wanted: bytes) -> bool:
        if self._next() != wanted:
            return False
        self._at += 1
        return True

    def _invalid(self) -> BodyError:
        """Said of all that is read: what is broken may be anything."""
        return BodyError(f"{self._whole or 'the body'} is not valid JSON at byte {self._at - self._start}", self._whole)

    @property
    def _field(self) -> str | None:
        return ".".join(self._path[:_NAMED]) or None

    def _error(self, what: str, status: int = 400) -> BodyError:
        return BodyError(f"{self._field or 'the body'} {what}", self._field, status)
