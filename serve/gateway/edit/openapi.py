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

ERRORS = {
    400: "Something in the request is wrong; `field` names it.",
    404: "There is no such model or job, or no such image any more.",
    409: "A newer request of the same pointer is here.",
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


def errors(codes: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": ErrorReply, "description": ERRORS[code]} for code in codes}


REPLIES: dict[int | str, dict[str, Any]] = errors(sorted(ERRORS.keys() - {409})) | {
    200: {
        "description": "The picture or mask itself with what else there is to say in X-Palimpsest-* headers (of a "
        "patch its place, X-Palimpsest-Box: [left, top, right, bottom]; of what is kept X-Palimpsest-Id); JSON with it "
        "as base64, `box` and `id`; or server-sent events: `job`, `progress`, of replace also `preview`, then `done`, "
        "`error` or `cancelled`, which also hold the `status` and, where it may be tried again, `retry_after` in "
        "seconds. A `preview` is a draft of what is being painted: `picture`, a small PNG as base64, "
        "transparent where nothing changes, to be drawn over `box` ([left, top, right, bottom] in pixels of the "
        "picture), and `variant`, from 0. Server-Timing, and `timings` in JSON, say what each stage took.",
        "content": {JSON: {"schema": {"type": "object"}}, EVENTS: {"schema": {"type": "string"}}}
        | dict.fromkeys(PICTURES, _BINARY),
    }
}

FILES: dict[int | str, dict[str, Any]] = errors(sorted(ERRORS.keys() - {408, 409, 415})) | {
    200: {"description": "The picture.", "content": dict.fromkeys(PICTURES, _BINARY)}
}


def of(kind: type[BaseModel]) -> dict[str, Any]:
    """The request's body: the same fields as JSON or as multipart, as what is made from this document needs it.

    JSON comes first: openapi-generator takes the first, and prefers JSON when it sends. Pages fill their forms in with
    every example there is, and send all of it: a form has examples only of what must be sent.
    """
    in_json, in_parts = kind.model_json_schema(), kind.model_json_schema()
    in_parts["title"] += "Form"
    shown = [*in_json["required"], *({"points"} & set(kind.model_fields))]
    example = {name: in_json["properties"][name]["examples"][0] for name in shown}
    for name, schema in in_json["properties"].items():
        in_json["properties"][name] = _as_text(schema)
        in_parts["properties"][name] = _as_part(schema, name in in_json["required"])
    content = {JSON: {"schema": in_json, "example": example}, "multipart/form-data": {"schema": in_parts}}
    return {"requestBody": {"required": True, "content": content}, "parameters": [ACCEPT]}


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema in JSON, where a file is a text."""
    plain = {key: value for key, value in schema.items() if (key, value) != ("format", "binary")}
    return plain | ({"anyOf": [_as_text(part) for part in plain["anyOf"]]} if "anyOf" in plain else {})


def _as_part(schema: dict[str, Any], required: bool) -> dict[str, Any]:
    """A field's schema in a form, where null can't be sent: it is of its one type, or empty.

    Lists of lists are a text that holds JSON: generators flatten them, so that nobody knows where one ends. That has no
    contentMediaType, which Swagger UI takes for a file's.
    """
    kinds = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf" and (key, value) != ("default", None)}
    part = rest | kinds[0] if kinds else rest
    if part.get("items", {}).get("type") == "array":
        description = f"JSON, such as {json.dumps(schema['examples'][0])}: {schema['description']}"
        part = {"title": part["title"], "type": "string", "description": description}
    if not required:
        part.pop("examples", None)
    if kinds and "format" not in part:  # else pages make up a value
        part["examples"] = [[] if part["type"] == "array" else ""]
    return part


IMAGES = {"requestBody": of(Fields)["requestBody"]}
IMAGES["requestBody"]["content"].pop(JSON)
IMAGES["requestBody"]["content"] |= {"image/*": _BINARY}
