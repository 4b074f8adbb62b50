"""What the image-edit call replies: pictures as base64 or as addresses, in one piece or as a stream of events."""

import base64
import time
from collections.abc import AsyncIterator, Iterable
from itertools import chain
from typing import Any, NamedTuple

from fastapi import Request, Response

from contract.progress import Preview
from contract.timings import HEADER, server_timing
from serve.gateway.edit.jobs import Job
from serve.gateway.edit.replies import (
    EVENT_HEADERS,
    STILL_THERE,
    begun,
    event,
    event_pieces,
    failure,
    fields_of,
    finished,
    in_json,
    watched,
)
from serve.gateway.openai import errors
from serve.gateway.openai.fields import ImageEditFields
from serve.gateway.transfer import Transfer, paced
from serve.residency.scheduler import Scheduler

PARTIAL, COMPLETED = "image_edit.partial_image", "image_edit.completed"

# No tokens are counted here; clients add these up.
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


class Asked(NamedTuple):
    """The request. warnings: what of it has no effect. images: the address at which this server has kept pictures."""

    fields: ImageEditFields
    warnings: list[str]
    images: str


class _Edited(NamedTuple):
    """pictures: of each what the reply says of it alone. size: "1499x1041", or auto where it was not told."""

    pictures: list[dict[str, Any]]
    output_format: str
    size: str
    warnings: list[str]


async def whole(request: Request, job: Job, asked: Asked) -> Response:
    """Waits for the job, which ends when the client leaves."""
    try:
        await finished(request, job)
        edited = await _edited(job, asked)
        said = {
            "created": int(time.time()),
            "data": edited.pictures,
            "output_format": edited.output_format,
            "size": edited.size,
            "usage": _USAGE,
            "warnings": edited.warnings,
        }
        return in_json(job, said, {HEADER: server_timing(job.timings)})
    except BaseException:
        job.close()
        raise


async def streamed(request: Request, scheduler: Scheduler, job: Job, asked: Asked) -> Response:
    """Begins with the first step: what goes wrong before is an error with a status, which clients can act on."""
    try:
        await begun(request, job)
    except BaseException:
        job.close()
        raise
    return Transfer(_events(scheduler, job, asked), job.close, EVENT_HEADERS)


async def _events(scheduler: Scheduler, job: Job, asked: Asked) -> AsyncIterator[bytes]:
    """Drafts, spread over the steps; then an event for each picture, or `error`."""
    shown = 0
    try:
        async for news in watched(scheduler, job):
            if not isinstance(news, Preview):
                yield STILL_THERE
            elif _is_due(job, shown, asked.fields.partial_images):
                yield event(PARTIAL, _partial(news, shown, asked.fields))
                shown += 1
        async for piece in paced(await _last_events(job, asked)):
            yield piece
    finally:
        job.cancel()


def _is_due(job: Job, shown: int, most: int) -> bool:
    """Whether so many steps are done that another draft may be shown, `most` of them at equal distances."""
    done = job.progress([])
    return shown < most and done.step > 0 and done.step * (most + 1) >= done.steps * (shown + 1)


def _partial(preview: Preview, index: int, fields: ImageEditFields) -> dict[str, Any]:
    own = {"partial_image_index": index, "variant": preview.variant, "box": preview.box}
    picture = base64.b64encode(preview.picture).decode()
    return _common(PARTIAL, fields, "png", "auto") | own | {"b64_json": picture}


async def _last_events(job: Job, asked: Asked) -> Iterable[bytes]:
    error = failure(job)
    if error is not None:
        return [event("error", errors.body(error))]
    edited = await _edited(job, asked)
    said = _common(COMPLETED, asked.fields, edited.output_format, edited.size)
    more = {"usage": _USAGE, "warnings": edited.warnings}
    return chain.from_iterable(event_pieces(COMPLETED, said | more | picture) for picture in edited.pictures)


def _common(kind: str, fields: ImageEditFields, output_format: str, size: str) -> dict[str, Any]:
    """What an event of either kind says."""
    return {
        "type": kind,
        "created_at": int(time.time()),
        "background": fields.background,
        "output_format": output_format,
        "quality": fields.quality,
        "size": size,
    }


async def _edited(job: Job, asked: Asked) -> _Edited:
    told = await fields_of(job, "picture")
    output_format = told["content_type"].removeprefix("image/")
    if asked.fields.as_url:
        ids = told.get("ids", [told["id"]])
        pictures = [{"url": f"{asked.images}/{each}?format={output_format}"} for each in ids]
    else:
        pictures = [{"b64_json": each} for each in told.get("pictures", [told["picture"]])]
    seeds = told.get("seeds", [told.get("seed")])
    pictures = [picture | {"seed": seed} for picture, seed in zip(pictures, seeds, strict=True)]
    size = "x".join(map(str, told["size"])) if "size" in told else "auto"
    return _Edited(pictures, output_format, size, asked.warnings + told["warnings"])
