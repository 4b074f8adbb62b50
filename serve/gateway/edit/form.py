"""A request's body -> checked fields; fields -> the body that a handler takes."""

from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeVar, get_args
from uuid import uuid4

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from serve.errors import BadRequest
from serve.gateway.body import Body

Fields = TypeVar("Fields", bound=BaseModel)
_MAX_PARTS = 40


async def read_fields(request: Request, kind: type[Fields], max_mib: int) -> Fields:
    """Raises BadRequest, which names the field, its value and what is allowed."""
    values = await _values(request, kind, max_mib)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, kind) from None


async def _values(request: Request, kind: type[BaseModel], max_mib: int) -> dict[str, Any]:
    body = Body(request, max_mib)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _multipart(request, body, kind, max_mib)
    if content_type not in ("application/json", ""):
        raise BadRequest(f"content-type must be application/json or multipart/form-data, not {content_type[:60]!r}")
    try:
        values = _parsed(await body.read())
    except ValueError:
        raise BadRequest("the body must be a JSON object or multipart/form-data; it is not valid JSON") from None
    if not isinstance(values, dict):
        raise BadRequest("the body must be a JSON object or multipart/form-data")
    return values


async def _multipart(request: Request, body: Body, kind: type[BaseModel], max_mib: int) -> dict[str, Any]:
    """Files as bytes; texts of fields that are no text are JSON, as in points=[[750, 500]]."""
    parser = MultiPartParser(
        request.headers,
        aiter(body),  # type: ignore[arg-type]
        max_files=_MAX_PARTS,
        max_fields=_MAX_PARTS,
        max_part_size=max_mib * 2**20,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise BadRequest(f"the multipart body is broken: {getattr(error, 'message', error)!s:.200}") from None
    values: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if name in values:
                raise BadRequest(f"{name[:60]} was sent twice", name[:60])
            values[name] = await value.read() if isinstance(value, UploadFile) else _decoded(name, value, kind)
    finally:
        await form.close()
    return values


def _decoded(name: str, text: str, kind: type[BaseModel]) -> Any:
    field = kind.model_fields.get(name)
    if field is None or _takes_text(field.annotation):
        return text
    try:
        return _parsed(text)
    except ValueError:
        raise BadRequest(f"{name} = {text[:60]!r} is not valid JSON", name) from None


def _parsed(text: bytes | str) -> Any:
    """Stricter than json: half a surrogate pair is no text, and could not leave in an error message; NaN no number."""
    return from_json(text, allow_inf_nan=False)


def _takes_text(annotation: Any) -> bool:
    """Whether the annotation is str, a Literal of texts, or a union that holds one."""
    return annotation is str or isinstance(annotation, str) or any(_takes_text(part) for part in get_args(annotation))


def _refusal(error: ValidationError, kind: type[BaseModel]) -> BadRequest:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    where = name + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    if first["type"] == "missing":
        return BadRequest(f"{where} is missing: {kind.model_fields[name].description}", name)
    if first["type"] == "extra_forbidden":
        return BadRequest(f"there is no field {name[:60]!r} here: {', '.join(kind.model_fields)}", name[:60])
    value = first["input"]
    shown = f"{len(value)} bytes" if isinstance(value, bytes) else f"{value!r:.60}"
    return BadRequest(f"{where} = {shown}: {first['msg'][:1].lower()}{first['msg'][1:]}", name)


class Form:
    """Fields as multipart/form-data; iterating gives its pieces."""

    def __init__(self, fields: Mapping[str, bytes | str]) -> None:
        boundary = uuid4().hex
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self._pieces: list[bytes] = []
        for name, value in fields.items():
            file = "" if isinstance(value, str) else '; filename="file"'
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n'
            kind = "" if isinstance(value, str) else "Content-Type: application/octet-stream\r\n"
            self._pieces += [
                (head + kind + "\r\n").encode(),
                value.encode() if isinstance(value, str) else value,
                b"\r\n",
            ]
        self._pieces.append(f"--{boundary}--\r\n".encode())
        self.length: int | None = sum(map(len, self._pieces))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
