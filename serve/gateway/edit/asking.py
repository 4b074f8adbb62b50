"""Checked fields -> the jobs that ask the models, and what these are shown."""

import time
from contextlib import ExitStack, suppress
from dataclasses import replace as changed
from typing import Any, NamedTuple

from contract import commands
from contract.bodies import BodyError, Buffer, Slice, unescaped_pieces
from contract.pictures import PREFIX
from serve.engine.answer import Answer
from serve.engine.question import Form
from serve.errors import BadRequest, ModelNotFound, body_refused
from serve.gateway.access.fairuse import Share
from serve.gateway.edit.fields import EraseFields, Painted, ReplaceFields, Selection
from serve.gateway.edit.images import Images
from serve.gateway.edit.jobs import Job
from serve.gateway.edit.replies import HandlerError
from serve.gateway.predictions import invoke
from serve.gateway.services import Services
from serve.memory_file import MemoryFile, Part, whole
from serve.store.catalog import Archive

PNG = "image/png"  # of masks, too: a JPEG's edge would come back in 93 shades of grey


class Wish(NamedTuple):
    """How a painting is to be asked for. arguments: the handler's gen_args. accept: the kind of reply that is wanted.

    own: what of it only handlers of ours can do, in words, and the field that asks for it. needed: arguments without
    which the answer would be another. previews: whether anybody looks at them.
    """

    arguments: dict[str, Any]
    accept: str
    own: tuple[str, str] | None = None
    needed: tuple[str, ...] = ()
    previews: bool = False


async def paint(
    services: Services,
    share: Share,
    files: ExitStack,
    body: MemoryFile,
    fields: EraseFields | ReplaceFields,
    wish: Wish,
) -> Job:
    """Starts the job that paints over what the fields mark; it takes the files. share: the request's."""
    client = share.client
    picture = await picture_of(services, share, files, body, fields.image, "image")
    mask = None if fields.mask is None else await picture_of(services, share, files, body, fields.mask, "mask")
    _check_mask(fields)

    async def work(job: Job) -> Answer:
        if wish.own:
            await check_ours(services, fields.model, *wish.own)
        hole = mask
        if hole is None:
            selected = await ask(
                services, client, job, fields.segment_model, {"image": picture}, fields.segmentation(), PNG
            )
            if selected.headers.get(f"{commands.PREFIX}area") == "0":
                raise BadRequest("nothing was found there: move the points or the box, or send a mask", "points")
            job.files.enter_context(selected.file)
            job.also["mask"] = hole = whole(selected.file)
        asked = {"image": picture, "mask_image": hole, **fields.texts()}
        answer = await ask(services, client, job, fields.model, asked, wish.arguments, wish.accept, fields.keep)
        _check_understood(answer, fields.model, wish.needed)
        return answer

    return services.jobs.start(work, files.pop_all(), previews=wish.previews)


async def ask(
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
    answer = await answered(services, client, job, await services.catalog.look_up(model), form)
    if keep:
        began = time.perf_counter()
        answer = await _kept(services.images, answer)
        job.took({"keep": time.perf_counter() - began})
    return answer


async def answered(services: Services, client: str, job: Job, archive: Archive, form: Form) -> Answer:
    """Raises HandlerError where the model refuses or fails."""
    job.ask(archive.name)
    answer = await invoke(services, archive, form, client, job)
    if answer.status >= 400:
        with answer.file:
            raise HandlerError(answer)
    job.took(answer.timings)
    return answer


def _check_understood(answer: Answer, model: str, needed: tuple[str, ...]) -> None:
    """Raises BadRequest, and closes it, where an archive was built before an argument was there: handlers ignore what
    they do not know, with a warning.
    """
    warnings = (answer.fields or {}).get("warnings", [])
    ignored = [name for name in needed if f"gen_args.{name!r} is unknown and was ignored" in warnings]
    if ignored:
        answer.close()
        raise BadRequest(f"{model!r} was built by an earlier version, without {ignored[0]}: build it anew", "model")


async def check_ours(services: Services, model: str, wish: str, field: str) -> None:
    """Raises BadRequest, which names the field, for a wish that archives of another make do not know."""
    if await _own(services, model) is None:
        raise BadRequest(
            f"{wish}: {model!r} is an archive of another make, which knows whole pictures and plain masks only", field
        )


async def converter(services: Services) -> Archive:
    """An archive whose worker writes files, the smallest first. Raises ModelNotFound where there is none."""
    for name in ("lama", "sam", "sd"):
        with suppress(ModelNotFound):
            if archive := await _own(services, name):
                return archive
    raise ModelNotFound("files are written by the workers of lama, sam or sd, and the store has none of these", "image")


async def _own(services: Services, model: str) -> Archive | None:
    """The archive, where it is one of ours. Raises ModelNotFound."""
    archive = await services.catalog.prepare(await services.catalog.look_up(model))
    return archive if services.memory.takes_commands(archive) else None


async def picture_of(
    services: Services, share: Share, files: ExitStack, body: MemoryFile, value: Slice | str, field: str
) -> Part | str:
    """What the client sent; of an id, what it stands for. files: takes what is made for it. Counted in the share."""
    picture = await _found(services, files, body, value, field)
    share.take(picture)
    return picture


async def _found(services: Services, files: ExitStack, body: MemoryFile, value: Slice | str, field: str) -> Part | str:
    if isinstance(value, str) and value.startswith(PREFIX):
        name, file = await services.images.get(value, field)
        return whole(files.enter_context(file))._replace(content=name)
    if isinstance(value, Slice) and value.escaped:
        file = files.enter_context(MemoryFile())
        await body.examined(lambda content: _unescape(content, value, field, file))
        return whole(file, text=True)
    if isinstance(value, Slice) and value.start < value.stop:
        return Part(body, value.start, value.stop, value.text)
    if isinstance(value, Slice) or not value:
        raise BadRequest(f"{field} is empty: send a file, base64, a data URI, or the id of an upload", field)
    return value


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
