"""/v1/images, /v1/segment, /v1/erase, /v1/replace, /v1/jobs."""

import time
from contextlib import ExitStack, suppress
from dataclasses import replace as changed
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from contract import commands
from contract.accept import JSON, OWN
from contract.bodies import BodyError, Buffer, Slice, check_encoding, unescaped_pieces
from contract.pictures import PREFIX, is_picture
from handlers.requests.fields import PATCH
from serve.engine.answer import Answer
from serve.engine.question import Form
from serve.errors import BadRequest, ModelNotFound, body_refused
from serve.gateway.edit import openapi
from serve.gateway.edit.fields import EraseFields, Fields, Format, Painted, ReplaceFields, SegmentFields, Selection
from serve.gateway.edit.form import read_fields
from serve.gateway.edit.images import Images
from serve.gateway.edit.jobs import Job
from serve.gateway.edit.replies import EVENTS, HandlerError, accepted, reply
from serve.gateway.predictions import address, invoke
from serve.gateway.services import Injected, Services
from serve.memory_file import MemoryFile, Part, whole
from serve.store.catalog import Archive

router = APIRouter(prefix="/v1", tags=["editing"])

_IN_JSON = (JSON, EVENTS)  # the kinds of reply that carry pictures as base64
_PNG = "image/png"  # of masks, too: a JPEG's edge would come back in 93 shades of grey


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
        kept = whole(files.enter_context(services.images.get(image, "image")))._replace(content=image)
        accept = OWN if format == "input" else f"image/{format}"

        async def work(job: Job) -> Answer:
            form = Form({"image": kept}, accept, command=commands.CONVERT)
            return await _answer(services, address(request), job, await _converter(services), form)

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
        kind, client = accepted(request.headers.get("accept", ""), JSON), address(request)
        picture = await _picture(services, files, body, fields.image, "image")

        async def work(job: Job) -> Answer:
            await _check_able(services, fields.model, keep=fields.keep)
            accept = JSON if kind in _IN_JSON else _PNG
            asked, arguments = {"image": picture}, fields.segmentation()
            return await _ask(services, client, job, fields.model, asked, arguments, accept, fields.keep)

        job = services.jobs.start(work, files.pop_all(), (client, fields.hover) if fields.hover else None)
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
    patch, client = fields.result == PATCH, address(request)
    kind = accepted(request.headers.get("accept", ""), _PNG if patch else OWN)
    picture = await _picture(services, files, body, fields.image, "image")
    mask = None if fields.mask is None else await _picture(services, files, body, fields.mask, "mask")
    _check_mask(fields)
    arguments = fields.painting()
    if kind in _IN_JSON:
        arguments["output_format"], accept = fields.format or ("png" if patch else "input"), JSON
    else:
        accept = {None: kind, "input": OWN}.get(fields.format, f"image/{fields.format}")

    async def work(job: Job) -> Answer:
        await _check_able(services, fields.model, keep=fields.keep, patch=patch)
        hole = mask
        if hole is None:
            selected = await _ask(
                services, client, job, fields.segment_model, {"image": picture}, fields.segmentation(), _PNG
            )
            if selected.headers.get(f"{commands.PREFIX}area") == "0":
                raise BadRequest("nothing was found there: move the points or the box, or send a mask", "points")
            job.files.enter_context(selected.file)
            job.also["mask"] = hole = whole(selected.file)
        asked = {"image": picture, "mask_image": hole, **fields.texts()}
        return await _ask(services, client, job, fields.model, asked, arguments, accept, fields.keep)

    job = services.jobs.start(work, files.pop_all(), previews=kind == EVENTS)
    return await reply(request, services.scheduler, job, kind, "picture")


async def _check_able(services: Services, model: str, *, keep: bool, patch: bool = False) -> None:
    """Raises BadRequest for what archives of another make do not do."""
    if not (keep or patch):
        return
    if await _own(services, model) is None:
        raise BadRequest(
            f"{'keep = true' if keep else 'result = patch'}: {model!r} is an archive of another make, which only gives"
            " whole pictures: leave it out",
            "keep" if keep else "result",
        )


async def _own(services: Services, model: str) -> Archive | None:
    """The archive, where it is one of ours. Raises ModelNotFound."""
    archive = await services.catalog.prepare(services.catalog.find(model))
    return archive if services.memory.takes_commands(archive) else None


async def _converter(services: Services) -> Archive:
    """An archive whose worker writes files, the smallest first. Raises ModelNotFound where there is none."""
    for name in ("lama", "sam", "sd"):
        with suppress(ModelNotFound):
            if archive := await _own(services, name):
                return archive
    raise ModelNotFound("files are written by the workers of lama, sam or sd, and the store has none of these", "image")


async def _ask(
    services: Services,
    client: str,
    job: Job,
    model: str,
    fields: dict[str, Part | str],
    arguments: dict[str, Any],
    accept: str,
    keep: bool = False,
) -> Answer:
    """Raises HandlerError where the model refuses or fails, and RequestTooLarge where its result can't be kept."""
    form = Form({**fields, "gen_args": arguments}, accept, keep)
    answer = await _answer(services, client, job, services.catalog.find(model), form)
    if keep:
        began = time.perf_counter()
        answer = await _kept(services.images, answer)
        job.took({"keep": time.perf_counter() - began})
    return answer


async def _answer(services: Services, client: str, job: Job, archive: Archive, form: Form) -> Answer:
    """Raises HandlerError where the model refuses or fails."""
    job.ask(archive.name)
    answer = await invoke(services, archive, form, client, job)
    if answer.status >= 400:
        with answer.file:
            raise HandlerError(answer)
    job.took(answer.timings)
    return answer


async def _kept(images: Images, answer: Answer) -> Answer:
    """The answer with the ids of what it has to keep. Raises RequestTooLarge, and closes it."""
    parts = {part for each in answer.kept.values() for part in (each if isinstance(each, list) else [each])}
    try:
        images.check(sum(part.size for part in parts), "keep")
        ids = {part: await images.put(part, "keep") for part in parts}
    except BaseException:
        answer.close()
        raise
    told = {
        name: [ids[part] for part in each] if isinstance(each, list) else ids[each]
        for name, each in answer.kept.items()
    }
    if answer.fields is None:
        return changed(answer, headers=answer.headers | {f"{commands.PREFIX}id": str(told["id"])})
    return changed(answer, fields=answer.fields | told)


async def _picture(
    services: Services, files: ExitStack, body: MemoryFile, value: Slice | str, field: str
) -> Part | str:
    """What the client sent; of an id, what it stands for. files: takes what is made for it."""
    if isinstance(value, str) and value.startswith(PREFIX):
        return whole(files.enter_context(services.images.get(value, field)))._replace(content=value)
    if isinstance(value, Slice) and value.escaped:
        file = files.enter_context(MemoryFile())
        await body.examined(lambda content: _unescape(content, value, field, file))
        return whole(file, text=True)
    if isinstance(value, Slice) and value.start < value.stop:
        return Part(body, value.start, value.stop, value.text)
    if isinstance(value, Slice) or not value:
        raise BadRequest(f"{field} is empty: send a file, base64, a data URI, or the id of an upload", field)
    return value


def _unescape(content: Buffer, value: Slice, field: str, file: MemoryFile) -> None:
    try:
        for piece in unescaped_pieces(content, value, field):
            file.write(piece.encode())
    except BodyError as error:
        raise body_refused(error) from None


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
