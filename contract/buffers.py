"""Reading a large body piece by piece.

The gateway reads bodies in a thread beside its event loop, and Python lets the loop run between two calls only: no call
here touches more than WINDOW bytes, whatever the body's size.
"""

import codecs
import json
import mmap
import re
from collections.abc import Iterator
from typing import NamedTuple

from contract.errors import BodyError

Buffer = bytes | bytearray | memoryview | mmap.mmap

WINDOW = 32 * 1024

_FIRST_WINDOW = 512
_LONGEST_ESCAPE = 6  # "\\u0000"
# Whole escapes only, so that a string may be cut where it ends; of a pair of surrogates either half may be the last.
_UNESCAPABLE = re.compile(r'(?:[^\\]++|\\u[0-9a-fA-F]{4}|\\["\\/bfnrt])*+')
_PERCENT = re.compile(rb"%([0-9a-fA-F]{2})")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Slice(NamedTuple):
    """A field's value, uncopied: the bytes start to stop of the body.

    text: it is text, most often base64; otherwise a file's own bytes, or the bytes of a part that may be either.
    escaped: it is the inside of a JSON string that has escapes in it (PHP writes base64's "/" as "\\/").
    """

    start: int
    stop: int
    text: bool
    escaped: bool = False


def find(view: memoryview, wanted: bytes, start: int, stop: int) -> int:
    """Returns where `wanted` begins in view[start:stop], or -1."""
    size = _FIRST_WINDOW  # most are near
    while start < stop:
        at = bytes(view[start : min(start + size + len(wanted) - 1, stop)]).find(wanted)
        if at >= 0:
            return start + at
        start += size
        size = min(size * 4, WINDOW)
    return -1


def decoded(data: Buffer, encoding: str, field: str | None) -> str:
    """Raises BodyError, which names the field, where the bytes are not of that encoding."""
    view, decoder = memoryview(data), codecs.getincrementaldecoder(encoding)()
    try:
        pieces = [decoder.decode(view[at : at + WINDOW]) for at in range(0, len(view), WINDOW)]
        return "".join(pieces) + decoder.decode(b"", final=True)
    except UnicodeError:
        raise BodyError(f"{field or 'the body'} is not valid {encoding.upper()} text", field) from None


def unescaped(text: str, field: str | None) -> str:
    """The inside of a JSON string as what it stands for; BodyError where an escape is none or half a character."""
    pieces: list[str] = []
    at = 0
    while at < len(text):
        match = _UNESCAPABLE.match(text, at, at + WINDOW)
        if match is None or match.end() == at:
            raise BodyError(f"{field or 'the body'} is not valid JSON: a backslash with nothing to escape", field)
        pieces.append(json.loads(f'"{match[0]}"', strict=False))
        at = match.end()
    made = "".join(pieces)
    return whole(made, field) if any(_SURROGATE.search(piece) for piece in pieces) else made


def whole(text: str, field: str | None) -> str:
    """Text with its surrogates paired; BodyError where one is alone, for it is no character and could not be shown."""
    if not _SURROGATE.search(text):
        return text
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise BodyError(f"{field or 'the body'} holds half of a character (a lone surrogate)", field) from None


def unquoted(text: bytes) -> bytes:
    """Percent-encoded text as what it stands for."""
    pieces: list[bytes] = []
    at = 0
    while at < len(text):
        end = min(at + WINDOW, len(text))
        if end < len(text):
            escape = text.rfind(b"%", end - 2, end)
            end = escape if escape >= 0 else end
        pieces.append(_PERCENT.sub(lambda escape: bytes((int(escape[1], 16),)), text[at:end]))
        at = end
    return b"".join(pieces)


def unescaped_pieces(body: Buffer, value: Slice, field: str) -> Iterator[str]:
    """What an escaped slice of the body stands for, for what is too large to be a text: a picture as base64.

    Raises BodyError where it is no UTF-8, an escape is none, or half a character is alone in its piece.
    """
    view, decoder, rest = memoryview(body)[value.start : value.stop], codecs.getincrementaldecoder("utf-8")(), ""
    for at in range(0, len(view), WINDOW):
        try:
            text = rest + decoder.decode(view[at : at + WINDOW], final=at + WINDOW >= len(view))
        except UnicodeError:
            raise BodyError(f"{field} is not valid UTF-8 text", field) from None
        match = _UNESCAPABLE.match(text)
        end = match.end() if match else 0
        rest = text[end:]
        if len(rest) >= _LONGEST_ESCAPE:
            break
        yield whole(json.loads(f'"{text[:end]}"', strict=False), field)
    if rest:
        raise BodyError(f"{field} is not valid JSON: a backslash with nothing to escape", field)


def text_of(body: Buffer, value: Slice, field: str, max_characters: int) -> str:
    """The text in a slice of the body, UTF-8 with or without a byte order mark.

    Raises BodyError where it is longer, or no text.
    """
    if value.stop - value.start > 12 * max_characters:  # an escaped pair of surrogates, the longest there is
        raise BodyError(f"{field} is longer than {max_characters} characters", field)
    text = decoded(memoryview(body)[value.start : value.stop], "utf-8", field)
    text = unescaped(text, field) if value.escaped else text
    if len(text) > max_characters:
        raise BodyError(f"{field} has {len(text)} characters; the limit is {max_characters}", field)
    return text if value.text else text.removeprefix("\ufeff")
