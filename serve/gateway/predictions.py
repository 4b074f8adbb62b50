"""TorchServe's own prediction routes, which load the model first where need be."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import APIRouter, Request, Response

from contract.ticket import File
from serve.engine.answer import Answer
from serve.engine.question import Question, Sent
from serve.errors import NotReached
from serve.gateway.metrics import Invocation
from serve.gateway.transfer import Transfer
from serve.residency.catalog import Archive

if TYPE_CHECKING:
    from serve.gateway.app import Services

router = APIRouter(tags=["predictions"])

_FIELDS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "image": {"type": "string", "description": "The picture: base64 in JSON, a file in multipart."},
        "mask_image": {
            "type": "string",
            "description": "lama, sd: the mask, as large as the picture; 128 or more of 255 marks what to change.",
        },
        "prompt": {"type": "string", "description": "sd: what to paint."},
        "negative_prompt": {"type": "string", "description": "sd: what to avoid."},
        "gen_args": {
            "description": "A JSON object, or the text of one. sam: point_coords, point_labels, box, mask_input, "
            "multimask_output, masks (best|all), return_logits, dilate_kernel_size. sd: num_inference_steps, "
            "guidance_scale, strength, seed, scheduler.",
            "anyOf": [{"type": "object"}, {"type": "string"}],
        },
    },
    "required": ["image"],
}
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
_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": _FIELDS, "example": _CLICK},
            "multipart/form-data": {"schema": _FIELDS},
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
        "429": {"description": "Too many requests wait, or no place in time; see Retry-After.", **_ERROR},
        "500": {"description": "The model failed.", **_ERROR},
        "503": {"description": "The engine is starting or restarting: try again.", **_ERROR},
        "504": {"description": "The model did not answer in time.", **_ERROR},
        "507": {"description": "Not enough memory.", **_ERROR},
    },
}


@router.post("/predictions/{model:path}", summary="Ask a model", openapi_extra=_OPENAPI)
async def predict(model: str, request: Request) -> Response:
    services: Services = request.app.state.services
    archive = services.catalog.find(model)
    return Transfer.of(await invoke_as_sent(services, archive, dict(request.headers), request))


class Job(Protocol):
    """Who wants to know when the model is held. file: where the worker tells its progress."""

    @property
    def file(self) -> File: ...

    def begin(self) -> None: ...


async def invoke_as_sent(
    services: "Services", archive: Archive, headers: Mapping[str, str], request: Request
) -> Answer:
    """Asks the model what the client asks; as `invoke`. headers: those that the model may see."""
    with await services.bodies.receive(request) as body:
        return await invoke(services, archive, Sent(headers, body))


async def invoke(services: "Services", archive: Archive, question: Question, job: Job | None = None) -> Answer:
    """Asks the model, which is loaded first where need be; once more where the request never reached its worker.

    The answer is the caller's to close.
    """
    with services.metrics.invocation(archive, services.scheduler.models()) as invocation:
        try:
            answer = await _invoke_once(services, archive, question, job, invocation)
        except NotReached:
            answer = await _invoke_once(services, archive, question, job, invocation)
        invocation.status = answer.status
        return answer


async def _invoke_once(
    services: "Services", archive: Archive, question: Question, job: Job | None, invocation: Invocation
) -> Answer:
    archive = await services.catalog.prepare(archive)
    while True:
        await services.unread.room()
        async with services.scheduler.lease(archive):
            if services.unread.full:
                continue  # the last one answered has filled it: the model is another's until there is room
            if job:
                job.begin()
            with invocation.in_engine():
                answer = await services.workers.ask(archive, question, job.file if job else None)
        services.unread.count(answer.file)
        return answer
