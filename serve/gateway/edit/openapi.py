"""What /docs says of the editing API."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from serve.gateway.edit.fields import Fields
from serve.gateway.edit.replies import EVENTS, JSON, PICTURES
from serve.gateway.models import ErrorReply

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_EXAMPLE_UPLOAD = "img_3f786850e387550fdab836ed7e6dc881de23001b"

_ERRORS = {
    400: "Something in the request is wrong; `field` names it.",
    404: "There is no such model or job, or no such image any more.",
    408: "The body did not arrive in time.",
    413: "The request or its picture is too large.",
    429: "Too many requests wait, or no place in time; see Retry-After.",
    499: "The job was cancelled.",
    500: "The model failed.",
    503: "The engine is starting or restarting: try again.",
    504: "The model did not answer in time.",
    507: "Not enough memory.",
}


def errors(codes: Iterable[int] = _ERRORS) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorReply, "description": _ERRORS[code]} for code in codes}


REPLIES: dict[int | str, dict[str, Any]] = errors() | {
    200: {
        "description": "The picture or mask itself with what else there is to say in X-Palimpsest-* headers; JSON with "
        "it as base64; or server-sent events: `job`, `progress`, then `done`, `error` or `cancelled`.",
        "content": {JSON: {"schema": {"type": "object"}}, EVENTS: {"schema": {"type": "string"}}}
        | dict.fromkeys(PICTURES, _BINARY),
    }
}


def of(kind: type[BaseModel]) -> dict[str, Any]:
    """The request's body: the same fields as JSON or as multipart, where all that is no text or file is JSON."""
    schema = kind.model_json_schema()
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": schema}, "multipart/form-data": {"schema": schema}},
        }
    }


IMAGES = of(Fields)
IMAGES["requestBody"]["content"].pop(JSON)
IMAGES["requestBody"]["content"] |= {"image/*": _BINARY, "application/octet-stream": _BINARY}
