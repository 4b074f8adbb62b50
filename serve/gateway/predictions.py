"""TorchServe's own prediction routes, which load the model first where need be."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from fastapi import APIRouter, Request, Response

from contract.description import Argument, Field
from contract.errors import read_error
from contract.ticket import File
from serve.descriptions import descriptions
from serve.engine.answer import Answer
from serve.engine.question import Question, Sent
from serve.errors import BadRequest, ModelNotFound, NotReached, StoreUnreachable
from serve.gateway.access.fairuse import share_of
from serve.gateway.invocation import Invocation
from serve.gateway.services import Injected, Services
from serve.gateway.transfer import Transfer
from serve.logs import record
from serve.memory_file import whole
from serve.store.catalog import Archive, Catalog

router = APIRouter(tags=["predictions"])

_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)

_BINARY = {"type": "string", "format": "binary"}
_ERROR_BYTES = 2**16  # of a handler's error, the most that is read


def _request(*, multipart: bool) -> dict[str, Any]:
    """JSON Schema of what any of the models takes, as they describe themselves."""
    models = descriptions()
    fields = _merged({name: model.fields for name, model in models.items()})
    if multipart:
        pictures = {field.name for model in models.values() for field in model.fields if field.kind == "picture"}
        fields = {name: schema | (_BINARY if name in pictures else {}) for name, schema in fields.items()}
    fields["gen_args"] = {
        "description": "A JSON object, or the text of one.",
        "examples": [{"point_coords": [750, 500], "point_labels": 1, "dilate_kernel_size": 15}],
        "anyOf": [
            {"type": "object", "properties": _merged({name: model.arguments for name, model in models.items()})},
            {"type": "string"},
        ],
    }
    required = [{field.name for field in model.fields if field.required} for model in models.values()]
    return {"type": "object", "properties": fields, "required": sorted(set.intersection(*required))}


def _merged(parts: Mapping[str, Sequence[Field | Argument]]) -> dict[str, Any]:
    """parts: by model. By their own names: whose they are, unless everybody's, and each form that one can have."""
    owners: dict[str, list[tuple[str, Field | Argument]]] = {}
    for model, own in parts.items():
        for part in own:
            owners.setdefault(part.name, []).append((model, part))
    merged = {}
    for name, users in owners.items():
        forms = [part.schema() for _, part in users]
        distinct = [form for index, form in enumerate(forms) if form not in forms[:index]]
        helps = {part.help: [model for model, other in users if other.help == part.help] for _, part in users}
        told = " ".join(text if len(of) == len(parts) else f"{', '.join(of)}: {text}" for text, of in helps.items())
        merged[name] = (distinct[0] if len(distinct) == 1 else {"anyOf": distinct}) | {"description": told}
    return merged


_CLICK = {
    "image": "<base64>",
    "gen_args": '{"point_coords": [750, 500], "point_labels": 1, "dilate_kernel_size": 15}',
}
_ERROR: dict[str, Any] = {
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {name: {"type": "string"} for name in ("code", "message", "field")},
                        "required": ["code", "message"],
                    }
                },
                "required": ["error"],
            }
        }
    }
}
_PICTURE = {"schema": _BINARY}
# Readers of the document are to ignore it; generated clients that don't can read JSON only, whatever else there is.
ACCEPT: dict[str, Any] = {
    "name": "Accept",
    "in": "header",
    "description": "What to reply with; erase and replace answer with the picture where nothing is asked for. "
    "In /docs the media type chosen among the responses decides.",
    "schema": {"type": "string", "default": "application/json"},
}
_OPENAPI: dict[str, Any] = {
    "parameters": [ACCEPT],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _request(multipart=False), "example": _CLICK},
            "multipart/form-data": {"schema": _request(multipart=True)},
        },
    },
    "responses": {
        "200": {
            "description": "JSON with the picture as base64 PNG, or the picture itself where Accept asks for one.",
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {"generated_image": {"type": "string"}},
                        "required": ["generated_image"],
                    }
                },
                "image/png": _PICTURE,
                "image/jpeg": _PICTURE,
                "image/webp": _PICTURE,
            },
        },
        "400": {"description": "Something in the request is wrong; `field` names it.", **_ERROR},
        "404": {"description": "The store holds no such model.", **_ERROR},
        "408": {"description": "The body did not arrive in time.", **_ERROR},
        "413": {"description": "The request or its picture is too large.", **_ERROR},
        "415": {"description": "A kind or an encoding of bodies that is not served.", **_ERROR},
        "429": {"description": "Too many requests wait, or no place in time; see Retry-After.", **_ERROR},
        "500": {"description": "The model failed.", **_ERROR},
        "503": {"description": "The engine is starting or restarting: try again.", **_ERROR},
        "504": {"description": "The model did not answer in time.", **_ERROR},
        "507": {"description": "Not enough memory, or a disk is full.", **_ERROR},
    },
}


# PUT is what `curl -T` sends, of which TorchServe's own examples are made.
@router.put("/predictions/{model:path}", include_in_schema=False)
@router.post("/predictions/{model:path}", summary="Ask a model", openapi_extra=_OPENAPI)
async def predict(model: str, request: Request, services: Injected) -> Response:
    archive = await _archive(services.catalog, model)
    return Transfer.of(await invoke_as_sent(services, archive, headers_of(request), request))


def headers_of(request: Request) -> dict[str, str]:
    """Returns headers by name in lower case, the first of each. dict(request.headers) would take quadratic time."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(request.headers.raw)}


async def _archive(catalog: Catalog, model: str) -> Archive:
    """Finds it by its name, or as TorchServe does by name and version: sam/1.0. Raises ModelNotFound."""
    try:
        return await catalog.look_up(model)
    except (BadRequest, StoreUnreachable) as error:
        name, _, version = model.rpartition("/")
        if not _VERSION.fullmatch(version):
            raise
        try:
            archive = await catalog.prepare(await catalog.look_up(name))
        except BadRequest:
            raise error from None
        own = await asyncio.to_thread(archive.model_version)
        if version != own:
            raise ModelNotFound(f"{name!r} has the version {own}, and no {version}", "model") from None
        return archive


class Job(Protocol):
    """Who wants to know when the model is held. file: where the worker tells its progress."""

    @property
    def file(self) -> File: ...

    def begin(self) -> None: ...


async def invoke_as_sent(services: Services, archive: Archive, headers: Mapping[str, str], request: Request) -> Answer:
    """Asks the model what the client asks; as `invoke`. headers: those that the model may see."""
    share = share_of(request)
    with await services.bodies.receive(request) as body:
        share.take(whole(body))
        return await invoke(services, archive, Sent(headers, body), share.client)


async def invoke(
    services: Services, archive: Archive, question: Question, client: str, job: Job | None = None
) -> Answer:
    """Asks the model, which is loaded first where need be; once more where the request never reached its worker.

    client: whose request it is. The answer is the caller's to close.
    """
    with services.metrics.invocation(archive, services.scheduler.is_ready(archive)) as invocation:
        try:
            answer = await _invoke_once(services, archive, question, client, job, invocation)
        except NotReached:
            answer = await _invoke_once(services, archive, question, client, job, invocation)
        invocation.status, invocation.worker = answer.status, answer.timings
        if answer.status >= 400:
            record.fails(_code_of(answer))
        return replace(answer, timings=invocation.timings)


def _code_of(answer: Answer) -> str:
    """Of an error that a handler answered, as it calls it itself."""
    try:
        return read_error(answer.beginning(_ERROR_BYTES))[0]
    except ValueError:
        return "handler"


async def _invoke_once(
    services: Services, archive: Archive, question: Question, client: str, job: Job | None, invocation: Invocation
) -> Answer:
    while True:
        await services.unread.room()
        archive = await services.catalog.prepare(archive)
        async with services.scheduler.lease(archive, client=client) as model:
            if services.unread.full:
                continue  # the last one answered has filled it: the model is another's until there is room
            if job:
                job.begin()
            invocation.gets(model)
            with invocation.in_engine():
                answer = await services.workers.ask(archive, question, job.file if job else None)
        services.unread.count(answer.file)
        return answer
