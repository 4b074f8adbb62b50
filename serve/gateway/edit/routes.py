"""/v1/images, /v1/segment, /v1/erase, /v1/replace, /v1/jobs."""

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from contract.bodies import BodyError, Slice, check_encoding, text_of
from contract.pictures import is_picture
from serve.engine.torchserve import Answer
from serve.errors import BadRequest, body_refused
from serve.gateway.body import Body
from serve.gateway.edit import openapi
from serve.gateway.edit.fields import EraseFields, Fields, Painted, ReplaceFields, SegmentFields, Selection
from serve.gateway.edit.form import Form, parse, read_fields
from serve.gateway.edit.images import PREFIX
from serve.gateway.edit.jobs import Job
from serve.gateway.edit.replies import EVENTS, JSON, OWN, HandlerError, accepted, reply
from serve.gateway.predictions import address, invoke

if TYPE_CHECKING:
    from serve.gateway.app import Services

router = APIRouter(prefix="/v1", tags=["editing"])

_IN_JSON = (JSON, EVENTS)  # the kinds of reply that carry pictures as base64
_MASK = "image/png"  # a JPEG's edge would come back in 93 shades of grey


class Upload(BaseModel):
    """A picture that the server keeps for a while."""

    id: str = Field(description="What `image` and `mask` of the other calls take.", examples=["img_3f786850e387550f"])
    bytes: int = Field(description="Its size.", examples=[2417953])
    expires_in: float = Field(description="Seconds since its last use that it is kept.", examples=[3600])


@router.post(
    "/images",
    status_code=201,
    summary="Keep a picture for further calls",
    openapi_extra=openapi.IMAGES,
    responses=openapi.errors((400, 408, 413, 415)),
)
async def upload(request: Request) -> Upload:
    services: Services = request.app.state.services
    data = await _uploaded(request, services.settings.max_request_mib)
    if not is_picture(data[:8]):
        raise BadRequest(
            "image is not a picture in a known format (PNG, JPEG, WebP, TIFF, HEIC, AVIF, GIF, BMP)", "image"
        )
    name = services.images.put(data)
    return Upload(id=name, bytes=len(data), expires_in=services.images.seconds)


@router.post(
    "/segment",
    summary="Points or a box -> the object's mask",
    openapi_extra=openapi.of(SegmentFields),
    responses=openapi.REPLIES,
)
async def segment(request: Request) -> Response:
    services: Services = request.app.state.services
    fields, body = await read_fields(request, SegmentFields, services.settings.max_request_mib)
    if not fields.selects:
        raise BadRequest("say what to select: points = [[x, y], ...], or box = [left, top, right, bottom]", "points")
    kind = accepted(request.headers.get("accept", ""), JSON)
    picture = _picture(services, body, fields.image, "image")

    async def work(job: Job) -> Answer:
        accept = JSON if kind in _IN_JSON else _MASK
        return await _ask(
            services, address(request), job, fields.model, {"image": picture}, fields.segmentation(), accept
        )

    return await reply(request, services.scheduler, services.jobs.start(work), kind, "mask")


@router.post(
    "/erase",
    summary="Remove what a mask, points or a box mark",
    openapi_extra=openapi.of(EraseFields),
    responses=openapi.REPLIES,
)
async def erase(request: Request) -> Response:
    services: Services = request.app.state.services
    fields, body = await read_fields(request, EraseFields, services.settings.max_request_mib)
    return await _paint(request, services, fields, body)


@router.post(
    "/replace", summary="Paint something else there", openapi_extra=openapi.of(ReplaceFields), responses=openapi.REPLIES
)
async def replace(request: Request) -> Response:
    services: Services = request.app.state.services
    fields, body = await read_fields(request, ReplaceFields, services.settings.max_request_mib)
    if fields.variants > 1 and accepted(request.headers.get("accept", ""), OWN) not in _IN_JSON:
        raise BadRequest(
            f"variants = {fields.variants}: more than one need Accept: application/json or text/event-stream",
            "variants",
        )
    return await _paint(request, services, fields, body)


@router.delete("/jobs/{job}", status_code=202, summary="Stop a job within a step", responses=openapi.errors((404,)))
async def cancel(job: str, request: Request) -> dict[str, str]:
    services: Services = request.app.state.services
    services.jobs.get(job).cancel()
    return {"job": job, "status": "stopping"}


async def _uploaded(request: Request, max_mib: int) -> bytes:
    """The body itself where it is a picture or says so; otherwise its part `image`."""
    body = await Body(request, max_mib).read()
    headers = request.headers
    kind, encoding = headers.get("content-type", ""), headers.get("content-encoding", "")
    if kind.lower().startswith(("image/", "application/octet-stream")) or is_picture(body[:8]):
        try:
            check_encoding(encoding)
        except BodyError as error:
            raise body_refused(error) from None
        return body
    image = (await asyncio.to_thread(parse, kind, encoding, body, Fields)).image
    if not isinstance(image, Slice) or image.text:
        raise BadRequest("image must be a file: a part of a multipart body, or the body itself", "image")
    return body[image.start : image.stop]


async def _paint(request: Request, services: "Services", fields: EraseFields | ReplaceFields, body: bytes) -> Response:
    kind = accepted(request.headers.get("accept", ""), OWN)
    picture = _picture(services, body, fields.image, "image")
    mask = None if fields.mask is None else _picture(services, body, fields.mask, "mask")
    _check_mask(fields)
    arguments = fields.painting()
    if kind in _IN_JSON:
        arguments["output_format"], accept = fields.format or "input", JSON
    else:
        accept = {None: kind, "input": OWN}.get(fields.format, f"image/{fields.format}")

    async def work(job: Job) -> Answer:
        hole = mask
        if hole is None:
            selected = await _ask(
                services, address(request), job, fields.segment_model, {"image": picture}, fields.segmentation(), _MASK
            )
            if selected.headers.get("x-palimpsest-area") == "0":
                raise BadRequest("nothing was found there: move the points or the box, or send a mask", "points")
            hole = selected.body
            job.also["mask"] = base64.b64encode(hole).decode()
        asked = {"image": picture, "mask_image": hole, **fields.texts()}
        return await _ask(services, address(request), job, fields.model, asked, arguments, accept)

    return await reply(request, services.scheduler, services.jobs.start(work), kind, "picture")


async def _ask(
    services: "Services",
    client: str,
    job: Job,
    model: str,
    fields: dict[str, bytes | str],
    arguments: dict[str, Any],
    accept: str,
) -> Answer:
    """Raises HandlerError where the model refuses or fails."""
    archive = services.catalog.find(model)
    job.ask(archive.name)
    form = Form(fields | {"gen_args": json.dumps(arguments)})
    answer = await invoke(services, archive, {"content-type": form.content_type, "accept": accept}, form, job, client)
    if answer.status >= 400:
        raise HandlerError(answer)
    return answer


def _picture(services: "Services", body: bytes, value: Slice | str, field: str) -> bytes | str:
    """What the client sent; of an id, what it stands for."""
    if isinstance(value, str) and value.startswith(PREFIX):
        return services.images.get(value, field)
    sent: bytes | str = value if isinstance(value, str) else body[value.start : value.stop]
    if isinstance(value, Slice) and value.escaped:
        try:
            sent = text_of(body, value, field, len(body))
        except BodyError as error:
            raise body_refused(error) from None
    if not sent:
        raise BadRequest(f"{field} is empty: send a file, base64, a data URI, or the id of an upload", field)
    return sent


def _check_mask(fields: Painted) -> None:
    """A mask, or what makes one; nothing that would have no effect."""
    if fields.mask is None:
        if not fields.selects:
            raise BadRequest("say what to change: mask, points = [[x, y], ...] or box", "mask")
        return
    for name in sorted(set(Selection.model_fields) - {"image"}):
        if getattr(fields, name) == Selection.model_fields[name].default:
            continue  # generated clients send every default
        raise BadRequest(f"{name} says how to make a mask, and there is one: send either", name)
