"""A request's body -> its fields: the one reader of /v1 and of /predictions.

What a body is:
- multipart/form-data: its parts;
- anything else that begins with "{", whatever it calls itself (curl -d says it is a form, curl -T nothing): JSON;
- application/x-www-form-urlencoded: its fields;
- anything else: refused, 400 where it claims to be JSON or nothing, otherwise 415.

Large values stay in the body as slices; all else together is bounded (contract.jsontext, contract.multipart).
"""

import re
from collections.abc import Collection
from typing import Any

from contract.buffers import Buffer, Slice, decoded, text_of, unescaped_pieces, unquoted
from contract.errors import BodyError
from contract.jsontext import MAX_NAME, MAX_SHORT, encoding_of, read_object, read_value
from contract.multipart import MAX_PARTS, Header, Part, header, parts_of
from contract.pictures import is_picture

__all__ = [
    "BodyError",
    "Buffer",
    "PartText",
    "Repeated",
    "Slice",
    "check_encoding",
    "read_body",
    "read_value",
    "text_of",
    "unescaped_pieces",
]

MAX_RECODED_PART = 64 * 1024  # bytes of a part in another charset than UTF-8
MAX_URLENCODED = 4 * 2**20
_FORM = "application/x-www-form-urlencoded"
_CHARSETS = {
    "": "utf-8",
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "utf-8",
    "ascii": "utf-8",
    "iso-8859-1": "latin-1",
    "latin1": "latin-1",
    "windows-1252": "cp1252",
    "utf-16": "utf-16",
    "utf-16le": "utf-16-le",
    "utf-16be": "utf-16-be",
}
_INDEXED = re.compile(r"([^\[\]]+)((?:\[[0-9]{1,4}\]){0,2})(?:\[\])?")  # name[0][1], name[0][], name[]
_INDEX = re.compile("[0-9]+")
_JSON = re.compile(r"(application|text)/json|[\w.+-]+/[\w.+-]+\+json")


class PartText(str):
    """The text of a part or form field; where the field is none, what the text says: "7" is a number."""


class Repeated(list[Any]):
    """The values of several parts of one name, in their order; those of one index in a list of their own."""


def read_body(content_type: str, content_encoding: str, body: Buffer, lists: Collection[str] = ()) -> dict[str, Any]:
    """Fields by name: a JSON value, a text, or a Slice of the body.

    A part or form field is a PartText; where it calls itself JSON, the value that it says; a file, or a part that is
    long or no text, a Slice. lists: fields that several parts or form fields of one name, or of indices such as box[0]
    and points[1][0], make up, Repeated where there are more than one; any other that is sent twice is refused.

    Raises BodyError, which names the field: 400, 413 past a limit, 415 for a kind of body that is not served.
    """
    check_encoding(content_encoding)
    kind, view = header(content_type), memoryview(body)
    if kind.value == "multipart/form-data":
        return _multipart(view, kind, lists)
    claims_json = not kind.value or _JSON.fullmatch(kind.value) is not None
    if claims_json or _begins_as_object(view):
        return read_object(view)
    if kind.value == _FORM:
        return _urlencoded(view, lists)
    shown = kind.value[:60]
    raise BodyError(f"content-type must be application/json or multipart/form-data, not {shown!a}", status=415)


def check_encoding(content_encoding: str) -> None:
    """Raises BodyError where the body is compressed: what it would grow to is not known before it is unpacked."""
    if content_encoding.strip().lower() not in ("", "identity"):
        raise BodyError(f"Content-Encoding {content_encoding[:40]!a} is not served: send the body as it is", status=415)


def _begins_as_object(view: memoryview) -> bool:
    head = bytes(view[:1024])
    encoding, mark = encoding_of(head[:4])
    return head[mark:].decode(encoding, "ignore").lstrip(" \t\r\n").startswith("{")


def _multipart(view: memoryview, kind: Header, lists: Collection[str]) -> dict[str, Any]:
    charset = kind.parameters.get("charset", "")
    fields: dict[str, Any] = {}
    for part in parts_of(view, kind):
        name = _checked(part.name)
        if name == "_charset_":  # RFC 7578, part 4.6: of all texts from here on
            charset = bytes(view[part.start : min(part.stop, part.start + 40)]).decode("ascii", "replace").strip()
        else:
            _add(fields, name, _content(view, part, name.partition("[")[0], charset), lists)
    return fields


def _content(view: memoryview, part: Part, name: str, charset: str) -> Any:
    if _JSON.fullmatch(part.kind.value):
        return read_value(view, part.start, part.stop, name, slices=True)
    if part.kind.value.startswith("multipart/"):
        raise BodyError(f"{name}: a multipart within a multipart is not served", name)
    head = bytes(view[part.start : min(part.stop, part.start + 8)])
    content = Slice(part.start, part.stop, text=False)
    if part.file or is_picture(head):
        return content
    named = part.kind.parameters.get("charset", charset).lower()
    if named not in _CHARSETS:
        raise BodyError(f"{name}: texts in charset {named[:40]!a} are not served: send UTF-8", name)
    encoding = _CHARSETS[named]
    if part.stop - part.start > MAX_SHORT and encoding == "utf-8":
        return content
    if part.stop - part.start > MAX_RECODED_PART:
        raise BodyError(
            f"{name} may have {MAX_RECODED_PART >> 10} KiB in charset {named}: send UTF-8", name, status=413
        )
    try:
        return PartText(decoded(view[part.start : part.stop], encoding, name).removeprefix("\ufeff"))
    except BodyError:
        if part.kind.value.startswith("text/"):
            raise
        return content  # its field decides what it is


def _urlencoded(view: memoryview, lists: Collection[str]) -> dict[str, Any]:
    if len(view) > MAX_URLENCODED:
        limit = MAX_URLENCODED >> 20
        raise BodyError(f"a urlencoded body may have {limit} MiB: send multipart/form-data", status=413)
    pairs = bytes(view).split(b"&", MAX_PARTS)
    if len(pairs) > MAX_PARTS:
        raise BodyError(f"the urlencoded body has more than {MAX_PARTS - 1} fields", status=413)
    fields: dict[str, Any] = {}
    for raw, _, value in (pair.partition(b"=") for pair in pairs if pair):
        name = _checked(_form_text(raw[: 4 * MAX_NAME], None))
        _add(fields, name, PartText(_form_text(value, name.partition("[")[0])), lists)
    return fields


def _form_text(text: bytes, field: str | None) -> str:
    return decoded(unquoted(text.replace(b"+", b" ")), "utf-8", field)


def _checked(name: str) -> str:
    if len(name) > MAX_NAME:
        raise BodyError(f"a field's name has more than {MAX_NAME} characters")
    return name


def _add(fields: dict[str, Any], full_name: str, value: Any, lists: Collection[str]) -> None:
    """full_name: `points[]` is how PHP, jQuery and axios write one of several, `points[1][]` one of a list in a list,
    and axios `points{}` what it wrote as JSON.
    """
    full_name = full_name.removesuffix("{}")
    parsed = _INDEXED.fullmatch(full_name)
    name, indices = (parsed[1], [int(index) for index in _INDEX.findall(parsed[2])]) if parsed else (full_name, [])
    if name not in lists:
        name, indices = full_name.removesuffix("[]"), []
    if name not in fields and not indices:
        fields[name] = value
        return
    if name not in lists:
        raise BodyError(f"{name} was sent twice", name)
    values = fields.setdefault(name, Repeated())
    if not isinstance(values, Repeated):
        values = fields[name] = Repeated([values])
    if not _put(values, value, indices):
        raise BodyError(f"{full_name} is not the next one of {name}: send them in their order, from 0", name)


def _put(values: Repeated, value: Any, indices: list[int]) -> bool:
    """Appends the value to the list that its indices name; returns whether that is its next place."""
    if not indices or indices == [len(values)]:
        values.append(value)
        return True
    if indices[0] == len(values):
        values.append(Repeated())
    if indices[0] != len(values) - 1:
        return False
    if not isinstance(values[-1], Repeated):
        values[-1] = Repeated([values[-1]])
    return _put(values[-1], value, indices[1:])
