"""What /docs says of the editing API."""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from contract.accept import JSON, PICTURES
from serve.gateway.edit.fields import Fields
from serve.gateway.edit.replies import EVENTS
from serve.gateway.models import ErrorReply
from serve.gateway.predictions import ACCEPT

_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

_ERRORS = {
    400: "Something in the request is wrong; `field` names it.",
    404: "There is no such model or job, or no such image any more.",
    408: "The body did not arrive in time.",
    413: "The request or its picture is too large.",
    415: "A kind or an encoding of bodies that is not served.",
    429: "Too many requests wait, or no place in time; see Retry-After.",
    499: "The job was cancelled.",
    500: "The model failed.",
    503: "The engine is starting or restarting: try again.",
    504: "The model did not answer in time.",
    507: "Not enough memory, or a disk is full.",
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
    """The request's body: the same fields as JSON or as multipart.

    As code that is made from this document needs it. A picture is a text in JSON and a file in multipart, where null
    can't be sent. Points are JSON there: generators flatten lists of lists, so that nobody knows where one ends.
    """
    in_json, in_parts = kind.model_json_schema(), kind.model_json_schema()
    in_parts["title"] += "Form"
    for name, schema in in_json["properties"].items():
        in_json["properties"][name] = _as_text(schema)
        in_parts["properties"][name] = _without_null(schema)
    if "points" in kind.model_fields:
        in_parts["properties"]["points"] = _written_as_json(in_parts["properties"]["points"])
    content = {JSON: {"schema": in_json}, "multipart/form-data": {"schema": in_parts}}
    return {"requestBody": {"required": True, "content": content}, "parameters": [ACCEPT]}


def _written_as_json(schema: dict[str, Any]) -> dict[str, Any]:
    """A text that holds the value as JSON."""
    rest = {key: schema[key] for key in ("title", "description")}
    text = {"type": "string", "contentMediaType": JSON, "contentSchema": schema}
    return rest | text | {"examples": [json.dumps(example) for example in schema["examples"]]}


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema in which a file is a text."""
    plain = {key: value for key, value in schema.items() if (key, value) != ("format", "binary")}
    return plain | ({"anyOf": [_as_text(part) for part in plain["anyOf"]]} if "anyOf" in plain else {})


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema in which it is its one type or absent."""
    kinds = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf" and (key, value) != ("default", None)}
    return rest | kinds[0] if kinds else rest


IMAGES = {"requestBody": of(Fields)["requestBody"]}
IMAGES["requestBody"]["content"].pop(JSON)
IMAGES["requestBody"]["content"] |= {"image/*": _BINARY}
