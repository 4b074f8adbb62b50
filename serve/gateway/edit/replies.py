"""What leaves: a picture, JSON or a stream of events, as Accept asks for; a handler's reply in the API's own names."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from itertools import chain
from typing import Any

from fastapi import Request, Response

from contract.accept import JSON, OWN, PICTURES, preferred
from contract.bodies import Slice, read_body
from contract.errors import read_error
from contract.progress import Preview
from contract.timings import HEADER, in_milliseconds, server_timing
from serve.engine.answer import Answer, json_length, json_pieces
from serve.errors import UNEXPECTED, PalimpsestError
from serve.gateway.edit.fields import renamed
from serve.gateway.edit.jobs import Cancelled, Job, JobProgress
from serve.gateway.transfer import Transfer, paced
from serve.logs import record
from serve.memory_file import MemoryFile, Part
from serve.residency.scheduler import Scheduler

logger = logging.getLogger(__name__)

EVENTS = "text/event-stream"
EVENT_HEADERS = {"content-type": f"{EVENTS}; charset=utf-8", "cache-control": "no-store"}
STILL_THERE = b": still there\n\n"
"""A comment, which no reader of events shows anybody."""
_ERROR_BYTES = 2**16  # of a handler's error, the most that is read
POLL = 0.1  # seconds between two looks at a job's progress
HEARTBEAT = 15.0  # seconds of silence that proxies put up with


class HandlerError(PalimpsestError):
    """A handler answered 4xx or 5xx."""

    def __init__(self, answer: Answer) -> None:
        text = answer.beginning(_ERROR_BYTES)
        try:
            code, message, field = read_error(text)
            super().__init__(renamed(message), field and renamed(field))
            self.code = code
        except (ValueError, TypeError, AttributeError):  # an archive of another make
            super().__init__(text[:500])
        self.status = answer.status


def accepted(header: str, default: str) -> str:
    """The kind of reply that an Accept header likes best: JSON, EVENTS, OWN, one of PICTURES, or the default."""
    return preferred(header, (JSON, EVENTS, OWN, *PICTURES), default)


async def reply(request: Request, scheduler: Scheduler, job: Job, kind: str, picture: str) -> Response:
    """Waits for the job, which ends when the client leaves. picture: what the JSON calls the handler's picture."""
    if kind == EVENTS:
        return Transfer(_events(scheduler, job, picture), job.close, EVENT_HEADERS)
    try:
        answer = await finished(request, job)
        timing = {HEADER: server_timing(job.timings)}
        if kind != JSON:
            headers = answer.headers | timing
            return Transfer(paced(answer.pieces()), job.close, headers, length=answer.length)
        return in_json(job, await fields_of(job, picture), timing)
    except BaseException:
        job.close()
        raise


def in_json(job: Job, fields: dict[str, Any], headers: Mapping[str, str]) -> Response:
    """The fields as answer.json_pieces has them."""
    own = {"content-type": JSON, **headers}
    return Transfer(paced(json_pieces(fields)), job.close, own, length=json_length(fields))


async def finished(request: Request, job: Job) -> Answer:
    """Waits for the job, which ends when the client leaves. Raises its error."""
    left = asyncio.create_task(_until_client_leaves(request))
    try:
        await asyncio.wait({job.task, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
        job.cancel()
    await asyncio.wait({job.task})
    if job.error is not None:
        raise job.error
    return job.task.result()


async def begun(request: Request, job: Job) -> None:
    """Waits until the job has done its first step, or the client has left. Raises the job's error where it failed."""
    left = asyncio.create_task(_until_client_leaves(request))
    try:
        while not (job.task.done() or left.done() or job.has_begun()):
            await asyncio.wait({job.task, left}, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
    finally:
        left.cancel()
    if job.task.done() and job.error is not None:
        raise job.error


async def fields_of(job: Job, picture: str) -> dict[str, Any]:
    """Collects the fields of the job's reply in JSON."""
    return await in_own_names(job.task.result(), picture) | job.also | {"timings": in_milliseconds(job.timings)}


async def in_own_names(answer: Answer, picture: str) -> dict[str, Any]:
    """A handler's JSON with its picture (and the variants of it) under the name `picture`."""
    fields = dict(await _read(answer.file) if answer.fields is None else answer.fields)
    fields[picture] = fields.pop("generated_image")
    if "variants" in fields:
        fields[f"{picture}s"] = fields.pop("variants")
    fields["warnings"] = [renamed(warning) for warning in fields.get("warnings", [])]
    return fields


async def _read(file: MemoryFile) -> dict[str, Any]:
    """The JSON of an archive of another make; what is large in it stays where it is."""
    fields = await file.examined(lambda content: read_body(JSON, "", content))
    return {
        name: Part(file, value.start, value.stop, text=True) if isinstance(value, Slice) else value
        for name, value in fields.items()
    }


async def _until_client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _events(scheduler: Scheduler, job: Job, picture: str) -> AsyncIterator[bytes]:
    """Server-sent events: `job` with its id, `progress` and `preview` at every change, then `done`, `error` or
    `cancelled`."""
    yield event("job", {"job": job.id})
    try:
        async for news in watched(scheduler, job):
            match news:
                case JobProgress():
                    yield event("progress", vars(news))
                case Preview():
                    yield event("preview", _described(news))
                case None:
                    yield STILL_THERE
        async for piece in paced(await _last_event(job, picture)):
            yield piece
    finally:
        job.cancel()


async def watched(scheduler: Scheduler, job: Job) -> AsyncIterator[JobProgress | Preview | None]:
    """How far the job is, and its previews, at every change until it ends; None after HEARTBEAT seconds of silence."""
    loop = asyncio.get_running_loop()
    last, shown, spoke = None, 0, loop.time()
    while not job.task.done():
        now = job.progress(scheduler.active())
        if now != last:
            last, spoke = now, loop.time()
            yield now
        elif loop.time() - spoke > HEARTBEAT:
            spoke = loop.time()
            yield None
        preview = job.preview()
        if preview and preview.number != shown:
            shown = preview.number
            yield preview
        await asyncio.wait({job.task}, timeout=POLL)
    if job.has_begun() and (now := job.progress(scheduler.active())) != last:  # the last step is often seen only now
        yield now


def _described(preview: Preview) -> dict[str, Any]:
    picture = base64.b64encode(preview.picture).decode()
    return {"variant": preview.variant, "box": preview.box, "picture": picture}


async def _last_event(job: Job, picture: str) -> Iterable[bytes]:
    error = failure(job)
    if error is None:
        fields = await fields_of(job, picture)
        return event_pieces("done", fields)
    return [event("cancelled" if error.code == Cancelled.code else "error", _told(error))]


def _told(error: PalimpsestError) -> dict[str, Any]:
    """The error with what the status line and Retry-After would say."""
    again = {} if error.retry_after is None else {"retry_after": error.retry_after}
    return error.body() | {"status": error.status} | again


def failure(job: Job) -> PalimpsestError | None:
    """The error of a job that has ended, as it may be told; what was not to be expected is in the log."""
    error = job.error
    if error is None:
        return None
    if not isinstance(error, PalimpsestError):
        logger.error("job failed", exc_info=error)
        error = PalimpsestError(UNEXPECTED)
    record.fails(error.code)
    return error


def event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def event_pieces(name: str, fields: dict[str, Any]) -> Iterable[bytes]:
    """An event whose data are as answer.json_pieces has them."""
    return chain([f"event: {name}\ndata: ".encode()], json_pieces(fields), [b"\n\n"])
