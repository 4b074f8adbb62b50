"""/v1/images/edits: what /v1/replace does, as the clients of the OpenAI API ask for it."""

from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request, Response

from contract.accept import JSON
from handlers.sd.description import MASK_BY, PROMPT
from serve.descriptions import descriptions
from serve.errors import BadRequest
from serve.gateway.access.fairuse import share_of
from serve.gateway.edit import openapi
from serve.gateway.edit.asking import Wish, paint
from serve.gateway.edit.form import read_fields
from serve.gateway.edit.replies import EVENTS
from serve.gateway.openai import errors, replies
from serve.gateway.openai.fields import ImageEditFields
from serve.gateway.services import Injected
from serve.store.catalog import Catalog

router = APIRouter(tags=["OpenAI"])

DEFAULT_MODEL = ImageEditFields.model_fields["model"].default

_REPLY: dict[str, Any] = {
    "description": "`data`: of each picture `b64_json` or `url`, and `seed`; `created`, `output_format`, `size`,"
    " `usage` (zeros) and `warnings`. With stream=true events: `image_edit.partial_image` with `b64_json` (a small PNG,"
    " transparent where nothing changes) and its `box`, `image_edit.completed` for each picture, or `error`.",
    "content": {JSON: {"schema": {"type": "object"}}, EVENTS: {"schema": {"type": "string"}}},
}
_REPLIES: dict[int | str, dict[str, Any]] = {
    status: {"model": errors.ErrorReply, "description": text} for status, text in openapi.ERRORS.items()
}
_REPLIES[200] = _REPLY


@router.post(
    errors.PATH,
    summary="Replace what is transparent in a mask, as the OpenAI API has it",
    openapi_extra={"requestBody": openapi.of(ImageEditFields)["requestBody"]},
    responses=_REPLIES,
)
async def edit(request: Request, services: Injected) -> Response:
    with ExitStack() as files:
        body = files.enter_context(await services.bodies.receive(request))
        fields = await read_fields(request, ImageEditFields, body)
        if fields.stream and fields.as_url:
            raise BadRequest("response_format = 'url': a stream holds the pictures themselves", "response_format")
        model = _model(services.catalog, fields.model)
        replacing = fields.replacing(model)
        asked = replies.Asked(fields, fields.warnings(model), f"{request.base_url}v1/images")
        wish = Wish(
            replacing.painting() | fields.arguments(),
            JSON,
            own=("a mask by its transparency", "model"),
            needed=(MASK_BY.name,),
            previews=fields.stream and fields.partial_images > 0,
        )
        job = await paint(services, share_of(request), files, body, replacing, wish)
    if fields.stream:
        return await replies.streamed(request, services.scheduler, job, asked)
    return await replies.whole(request, job, asked)


def _model(catalog: Catalog, name: str) -> str:
    """The archive that is meant. Raises BadRequest for one that takes no prompt."""
    try:
        archive = catalog.find(name)
    except BadRequest:  # of another service, as gpt-image-1
        return str(DEFAULT_MODEL)
    known = descriptions().get(archive.name.rpartition("/")[2])
    if known is not None and PROMPT not in known.fields:
        raise BadRequest(f"model = {name!r}: {known.title} takes no prompt; {DEFAULT_MODEL!r} does", "model")
    return name
