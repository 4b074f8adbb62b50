"""A request's body -> checked fields."""

import re
import reprlib
from typing import Any, TypeVar, get_args

from fastapi import Request
from pydantic import ValidationError

from contract.bodies import BodyError, Buffer, PartText, Repeated, Slice, read_body, read_value, text_of
from contract.pictures import PREFIX
from serve.errors import BadRequest, body_refused
from serve.gateway.edit.fields import PICTURES, Fields, as_points
from serve.memory_file import MemoryFile

Kind = TypeVar("Kind", bound=Fields)
_LISTED = re.compile(r"[^\[\]]+,[^\[\]]+|\[[^\[\]]+\](?:\s*,\s*\[[^\[\]]+\])+")  # 1,2 or [1,2],[3,4]
_MAX_ID = 100  # bytes
_MAX_TEXT = 1_000_000  # characters, of the longest text field


async def read_fields(request: Request, kind: type[Kind], body: MemoryFile) -> Kind:
    """The fields; their pictures may be slices of the body.

    Raises BadRequest, which names the field, its value and what is allowed.
    """
    headers = request.headers
    content_type, encoding = headers.get("content-type", ""), headers.get("content-encoding", "")
    return await body.examined(lambda content: parse(content_type, encoding, content, kind))


def parse(content_type: str, content_encoding: str, body: Buffer, kind: type[Kind]) -> Kind:
    """Reads and checks the fields; to be called beside the event loop. Raises BadRequest."""
    try:
        sent = read_body(content_type, content_encoding, body, kind.lists)
        values = {name: _value(name, value, body, kind) for name, value in sent.items()}
    except BodyError as error:
        raise body_refused(error) from None
    try:
        # null and absent are the same
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _value(name: str, value: Any, body: Buffer, kind: type[Fields]) -> Any:
    """What was sent, as the field's own type may be written: as JSON, and in parts in the ways that clients have."""
    field = kind.model_fields.get(name)
    if field is None:
        raise BadRequest(f"there is no field {name[:60]!r} here: {', '.join(kind.model_fields)}", name[:60])
    if name in PICTURES:
        value = _upload_id(value, body) or value
    elif isinstance(value, Slice):
        value = PartText(text_of(body, value, name, _MAX_TEXT))
    if isinstance(value, PartText) and not value.strip() and not field.is_required():
        return None  # a form's field that was left out
    if _takes_text(field.annotation):
        return value
    value = _said(name, value, kind.lists)
    return as_points(value) if name == "points" else value


def _upload_id(value: Any, body: Buffer) -> str | None:
    """The id of an upload that a client sent as a file, as those made from the OpenAPI document have to."""
    if not isinstance(value, Slice) or value.stop - value.start > _MAX_ID:
        return None
    content = bytes(body[value.start : value.stop])
    return content.decode("ascii").strip() if content.startswith(PREFIX.encode()) and content.isascii() else None


def _said(name: str, value: Any, lists: tuple[str, ...]) -> Any:
    """The value that a part's text, or those of several, say; any other value as it is."""
    if isinstance(value, Repeated):
        return [_said(name, item, lists) for item in value]
    if not isinstance(value, PartText):
        return value
    text: str = value.strip()
    if text in ("True", "False"):  # str() of Python's
        text = text.lower()
    if name in lists and _LISTED.fullmatch(text):
        text = f"[{text}]"
    data = text.encode()
    try:
        return read_value(data, 0, len(data), name, slices=False)
    except BodyError as error:
        raise BadRequest(f"{name} = {text[:60]!r}: {error.message}", name) from None


def _takes_text(annotation: Any) -> bool:
    """Whether the annotation is str, a Literal of texts, or a union that holds one."""
    return annotation is str or isinstance(annotation, str) or any(_takes_text(part) for part in get_args(annotation))


def _refusal(error: ValidationError, kind: type[Fields]) -> BadRequest:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    where = name + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    if first["type"] == "missing":
        return BadRequest(f"{where} is missing: {kind.model_fields[name].description}", name)
    return BadRequest(f"{where} = {_shown(first['input'])}: {first['msg'][:1].lower()}{first['msg'][1:]}", name)


def _shown(value: Any) -> str:
    """Shows a value's beginning without a look at the whole of it."""
    return f"{value.stop - value.start} bytes" if isinstance(value, Slice) else f"{reprlib.repr(value):.60}"
