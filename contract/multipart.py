"""multipart/form-data (RFC 7578) in a complete body -> its parts.

Not python_multipart, which hands out copies of pieces: here a part is a stretch of the body, wherever it lies, and
finding it costs a search for the boundary. What clients get wrong without being misunderstood is served: line feeds
alone, preambles, folded headers, names without quotes.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from contract.buffers import find
from contract.errors import BodyError

MAX_PARTS = 1_000
MAX_HEADERS = 16 * 1024  # bytes, of one part
_MAX_BOUNDARY = 70  # characters; RFC 2046, part 5.1.1
_MAX_PADDING = 100  # white space between a boundary and its line's end

_FOLD = re.compile(r"\r?\n[ \t]+")
_PARAMETER = re.compile(r';\s*([^\s=;"]+)\s*=\s*("(?:[^"\\]|\\.)*+"|[^;"]*+)')
_AFTER_BOUNDARY = re.compile(rb"(--)?[ \t]*+(?:\r?\n|$)")
_HEADERS_END = re.compile(rb"(?:\A|\r?\n)\r?\n")


class Header(NamedTuple):
    """A header's value and its parameters. value: lower case. parameters: by lower-case name, unquoted."""

    value: str
    parameters: dict[str, str]


class Part(NamedTuple):
    """start, stop: of its content. file: whether it has a file name; forms send "" where no file was chosen. kind: its
    Content-Type.
    """

    name: str
    start: int
    stop: int
    file: bool
    kind: Header


def header(text: str) -> Header:
    """A header such as Content-Type or Content-Disposition."""
    value, _, _ = text.partition(";")
    parameters = {name.lower(): _unquoted(raw.strip()) for name, raw in _PARAMETER.findall(text[len(value) :])}
    return Header(value.strip().lower(), parameters)


def parts_of(body: memoryview, content_type: Header) -> Iterator[Part]:
    """Raises BodyError where the body is cut off or not of the form, or a part has no name."""
    boundary = content_type.parameters.get("boundary", "")
    if not 0 < len(boundary) <= _MAX_BOUNDARY or not boundary.isascii():
        raise BodyError(f"content-type must name the multipart's boundary, 1 to {_MAX_BOUNDARY} ASCII characters")
    delimiter = b"--" + boundary.encode()
    at, last = _delimiter(body, delimiter)
    count = 0
    while not last:
        count += 1
        if count > MAX_PARTS:
            raise BodyError(f"the multipart body has more than {MAX_PARTS} parts", status=413)
        head = bytes(body[at : at + MAX_HEADERS])
        blank = _HEADERS_END.search(head)
        if blank is None:
            raise BodyError(f"the headers of part {count} do not end within {MAX_HEADERS >> 10} KiB")
        start = at + blank.end()
        # An empty part's line end may be the one that ends its headers.
        before, at, last = _next_delimiter(body, delimiter, start, returns=b"\r" in blank[0])
        yield _part(head[: blank.start()], start, before, count)


def _delimiter(body: memoryview, delimiter: bytes) -> tuple[int, bool]:
    """The end of the first boundary's line and whether it is the last one; what comes before it is a preamble."""
    if bytes(body[: len(delimiter)]) == delimiter:
        after = _AFTER_BOUNDARY.match(bytes(body[len(delimiter) : len(delimiter) + _MAX_PADDING]))
        if after:
            return len(delimiter) + after.end(), bool(after[1])
    _, end, last = _next_delimiter(body, delimiter, 0, returns=True)
    return end, last


def _next_delimiter(body: memoryview, delimiter: bytes, start: int, returns: bool) -> tuple[int, int, bool]:
    """Returns where the line end before the next boundary begins, where the boundary's line ends, if it is the last.

    returns: lines end with CR LF. To a client that sends LF alone, a CR before it is the content's.
    """
    wanted = b"\n" + delimiter
    at = max(start - 1, 0)
    for _ in range(MAX_PARTS):
        at = find(body, wanted, at, len(body))
        if at < 0:
            break
        end = at + len(wanted)
        after = _AFTER_BOUNDARY.match(bytes(body[end : end + _MAX_PADDING]))
        if after:
            before = at - 1 if returns and at > start and body[at - 1] == ord("\r") else at
            return max(before, start), end + after.end(), bool(after[1])
        at = end  # a longer word that begins like the boundary
    raise BodyError("the multipart body is cut off: its last boundary is missing")


def _part(head: bytes, start: int, stop: int, number: int) -> Part:
    try:
        lines = _FOLD.sub(" ", head.decode()).splitlines()
    except UnicodeDecodeError:
        raise BodyError(f"the headers of part {number} are not UTF-8") from None
    headers = {name.strip().lower(): value for name, _, value in (line.partition(":") for line in lines)}
    disposition = header(headers.get("content-disposition", ""))
    name = _parameter(disposition.parameters, "name")
    if not name:
        raise BodyError(f"part {number} has no name: Content-Disposition: form-data; name=... must say its field")
    encoding = headers.get("content-transfer-encoding", "").strip().lower()
    if encoding not in ("", "7bit", "8bit", "binary"):
        shown = name[:60]
        raise BodyError(f"{shown}: Content-Transfer-Encoding {encoding[:40]} is not served: send the bytes", shown)
    file = any(value for key, value in disposition.parameters.items() if key.partition("*")[0] == "filename")
    return Part(name, start, stop, file, header(headers.get("content-type", "")))


def _parameter(parameters: dict[str, str], name: str) -> str:
    """name="..."; name*=UTF-8''... (RFC 5987); or name*0="..."; name*1="..." (RFC 2231)."""
    if extended := parameters.get(f"{name}*"):
        charset, _, rest = extended.partition("'")
        if charset.lower() in ("utf-8", "us-ascii", "iso-8859-1"):
            return unquote_to_bytes(rest.partition("'")[2]).decode(charset, "replace")
    if name in parameters:
        return parameters[name]
    pieces: list[str] = []
    while (piece := parameters.get(f"{name}*{len(pieces)}")) is not None:
        pieces.append(piece)
    return "".join(pieces)


def _unquoted(value: str) -> str:
    """Removes quotes. A backslash escapes a quote or itself only: old browsers send C:\\path; new ones write %22."""
    if not value.startswith('"'):
        return value
    return re.sub(r'\\(["\\])', r"\1", value[1:-1]).replace("%22", '"')
