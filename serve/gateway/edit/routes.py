"""/v1/images, /v1/segment, /v1/erase, /v1/replace, /v1/jobs."""

from contextlib import ExitStack
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from contract import commands
from contract.accept import JSON, OWN
from contract.bodies import BodyError, Slice, check_encoding
from contract.pictures import is_picture
from handlers.requests.fields import PATCH
from serve.engine.answer import Answer
from serve.engine.question import Form
from serve.errors import BadRequest, body_refused
from serve.gateway.access.fairuse import share_of
from serve.gateway.edit import openapi
from serve.gateway.edit.asking import PNG, Wish, answered, ask, check_ours, converter, paint, picture_of
from serve.gateway.edit.fields import EraseFields, Fields, Format, ReplaceFields, SegmentFields
from serve.gateway.edit.form import read_fields
from serve.gateway.edit.jobs import Job
from serve.gateway.edit.replies import EVENTS, accepted, reply
from serve.gateway.services import Injected, Services
from serve.memory_file import MemoryFile, Part, whole

router = APIRouter(prefix="/v1", tags=["editing"])

_IN_JSON = (JSON, EVENTS)  # the kinds of reply that carry pictures as base64


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
async def upload(request: Request, services: Injected) -> Upload:
    with await services.bodies.receive(request) as body:
        image = await _uploaded(request, body)
        if not is_picture(body.read(image.start, min(image.start + 8, image.stop))):
            raise BadRequest(
                "image is not a picture in a known format (PNG, JPEG, WebP, TIFF, HEIC, AVIF, GIF, BMP)", "image"
            )
        name = await services.images.put(image)
    return Upload(id=name, bytes=image.size, expires_in=services.images.seconds)


@router.get(
    "/images/{image}",
    summary="A kept picture as a file",
    responses=openapi.FILES,
    response_class=Response,
)
async def picture(
    image: str,
    request: Request,
    services: Injected,
    format: Annotated[Format, Query(description="input: that of the file which was uploaded or edited.")] = "input",
) -> Response:
    with ExitStack() as files:
        share = share_of(request)
        name, file = await services.images.get(image, "image")
        kept = whole(files.enter_context(file))._replace(content=name)
        share.take(kept)
        accept = OWN if format == "input" else f"image/{format}"

        async def work(job: Job) -> Answer:
            form = Form({"image": kept}, accept, command=commands.CONVERT)
            return await answered(services, share.client, job, await converter(services), form)

        job = services.jobs.start(work, files.pop_all())
    return await reply(request, services.scheduler, job, OWN, "picture")


@router.post(
    "/segment",
    summary="Points or a box -> the object's mask",
    openapi_extra=openapi.of(SegmentFields),
    responses=openapi.REPLIES | openapi.errors((409,)),
)
async def segment(request: Request, services: Injected) -> Response:
    with ExitStack() as files:
        body = files.enter_context(await services.bodies.receive(request))
        fields = await read_fields(request, SegmentFields, body)
        if not fields.selects:
            raise BadRequest(
                "say what to select: points = [[x, y], ...], or box = [left, top, right, bottom]", "points"
            )
        kind, share = accepted(request.headers.get("accept", ""), JSON), share_of(request)
        picture = await picture_of(services, share, files, body, fields.image, "image")

        async def work(job: Job) -> Answer:
            if fields.keep:
                await check_ours(services, fields.model, "keep = true", "keep")
            accept = JSON if kind in _IN_JSON else PNG
            asked, arguments = {"image": picture}, fields.segmentation()
            return await ask(services, share.client, job, fields.model, asked, arguments, accept, fields.keep)

        job = services.jobs.start(work, files.pop_all(), (share.client, fields.hover) if fields.hover else None)
    return await reply(request, services.scheduler, job, kind, "mask")


@router.post(
    "/erase",
    summary="Remove what a mask, points or a box mark",
    openapi_extra=openapi.of(EraseFields),
    responses=openapi.REPLIES,
)
async def erase(request: Request, services: Injected) -> Response:
    with ExitStack() as files:
        body = files.enter_context(await services.bodies.receive(request))
        return await _paint(request, services, files, body, await read_fields(request, EraseFields, body))


@router.post(
    "/replace", summary="Paint something else there", openapi_extra=openapi.of(ReplaceFields), responses=openapi.REPLIES
)
async def replace(request: Request, services: Injected) -> Response:
    with ExitStack() as files:
        body = files.enter_context(await services.bodies.receive(request))
        fields = await read_fields(request, ReplaceFields, body)
        if fields.variants > 1 and accepted(request.headers.get("accept", ""), OWN) not in _IN_JSON:
            raise BadRequest(
                f"variants = {fields.variants}: more than one need Accept: application/json or text/event-stream",
                "variants",
            )
        return await _paint(request, services, files, body, fields)


@router.delete("/jobs/{job}", status_code=202, summary="Stop a job within a step", responses=openapi.errors((404,)))
async def cancel(job: str, services: Injected) -> dict[str, str]:
    services.jobs.get(job).cancel()
    return {"job": job, "status": "stopping"}


async def _uploaded(request: Request, body: MemoryFile) -> Part:
    """The body itself where it is a picture or says so; otherwise its part `image`."""
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith(("image/", "application/octet-stream")) or is_picture(body.read(0, 8)):
        try:
            check_encoding(request.headers.get("content-encoding", ""))
        except BodyError as error:
            raise body_refused(error) from None
        return whole(body)
    image = (await read_fields(request, Fields, body)).image
    if not isinstance(image, Slice) or image.text:
        raise BadRequest("image must be a file: a part of a multipart body, or the body itself", "image")
    return Part(body, image.start, image.stop)


async def _paint(
    request: Request,
    services: Services,
    files: ExitStack,
    body: MemoryFile,
    fields: EraseFields | ReplaceFields,
) -> Response:
    patch = fields.result == PATCH
    kind = accepted(request.headers.get("accept", ""), PNG if patch else OWN)
    arguments = fields.painting()
    if kind in _IN_JSON:
        arguments["output_format"], accept = fields.format or ("png" if patch else "input"), JSON
    else:
        accept = {None: kind, "input": OWN}.get(fields.format, f"image/{fields.format}")
    own = ("keep = true", "keep") if fields.keep else ("result = patch", "result") if patch else None
    previews = kind == EVENTS and isinstance(fields, ReplaceFields) and fields.previews
    wish = Wish(arguments, accept, own, previews=previews)
    job = await paint(services, share_of(request), files, body, fields, wish)
    return await reply(request, services.scheduler, job, kind, "picture")
