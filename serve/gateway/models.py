"""What an operator sees and does: every model's place, size and counts; load, unload, warm, pin, unpin."""

import asyncio
import time
from bisect import bisect_right
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from serve.errors import BadRequest, ModelNotFound, OutOfMemory, StoreUnreachable
from serve.gateway.services import Injected, Services
from serve.residency.model import AWAY, IN_MEMORY, Model, State
from serve.store.catalog import Archive, Catalog

Place = Literal["gpu", "memory", "parked", "suspended", "disk"]


class Footprint(BaseModel):
    """What the model was measured to take."""

    load_bytes: int = Field(description="When it had just been loaded.")
    peak_bytes: int = Field(description="The most since.")


class ModelStatus(BaseModel):
    """One version of one archive. Counts are since this version was first asked for."""

    name: str
    version: str | None = Field(description="A hash of its content; null until a request names it.")
    place: Place = Field(
        description="Where its weights are. memory: that of a machine without a GPU; parked: main memory, worker alive;"
        " suspended: the same, and nothing of it is left on the GPU."
    )
    state: State
    pinned: bool = Field(description="Never evicted.")
    footprint: Footprint | None = Field(description="None before its first load.")
    reserved_bytes: int = Field(description="Memory of the device held for it now.")
    host_bytes: int = Field(description="Main memory held for it while it is parked or suspended.")
    leases: int = Field(description="Requests that run.")
    queue: int = Field(description="Requests that wait.")
    last_used: datetime | None
    idle_seconds: float | None = Field(description="Since it was last used.")
    requests: int
    hits: int = Field(description="Requests that found it loaded.")
    loads: int
    wakes: int = Field(description="Times that it came back from being parked or suspended.")
    failures: int = Field(description="Loads that failed.")
    last_error: str | None = Field(description="Of its last load, if that failed.")


class Warmed(BaseModel):
    """What was read into the page cache."""

    name: str
    bytes: int
    seconds: float


class MemoryStatus(BaseModel):
    device: str
    budget_bytes: int = Field(description="What models may take together.")
    reserved_bytes: int = Field(description="What is held for models.")
    standby_bytes: int = Field(description="What is held for a worker that waits for the next model to load.")
    free_bytes: int = Field(description="What the device reports as free.")
    host_budget_bytes: int = Field(description="What parked and suspended models may take of main memory together.")
    host_reserved_bytes: int = Field(description="What is held for them.")


class ModelList(BaseModel):
    """A page of every archive in the store and every model in memory, by name."""

    models: list[ModelStatus]
    memory: MemoryStatus
    next_page_token: str | None = Field(None, description="For the next page; null: this was the last one.")


class Problem(BaseModel):
    code: str
    message: str
    field: str | None = Field(None, description="What in the request is wrong; absent for other errors.")


class ErrorReply(BaseModel):
    """The one shape of every error."""

    error: Problem


async def _nothing_else(request: Request) -> None:
    """Refuses what these routes would ignore."""
    taken = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    for name in request.query_params.keys() - taken:
        raise BadRequest(f"there is no parameter {name[:80]!r} here", name[:80])
    async for chunk in request.stream():
        if chunk:
            raise BadRequest("this takes no body: the path says everything", "body")


def _errors(**descriptions: str) -> dict[int | str, dict[str, Any]]:
    return {int(name[1:]): {"model": ErrorReply, "description": text} for name, text in descriptions.items()}


_BAD = _errors(_400="A parameter or body that there is none of, or a name that cannot be one; `field` names it.")
_UNKNOWN = _BAD | _errors(_404="Neither the store nor the memory holds such a model.")
_UNPACKING = _UNKNOWN | _errors(_500="It cannot be unpacked or loaded.", _503="The engine is starting or stopping.")

router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(_nothing_else)])


@router.get("", summary="All models", responses=_BAD, response_model=ModelList)
async def models(
    services: Injected,
    next_page_token: Annotated[str, Query(description="The token of the page before.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000, description="Names on a page.")] = 100,
) -> Response:
    active = services.scheduler.active()
    left = {m.archive.name for m in active}
    # The token is the last name shown: archives that come and go between two pages shift nothing.
    archives, token = await asyncio.to_thread(_page, services.catalog, left, next_page_token, limit)
    shown = {archive.engine_name: services.scheduler.get(archive) or Model(archive) for archive in archives}
    on_page = (m for m in active if m.archive.name > next_page_token and (token is None or m.archive.name <= token))
    shown |= {m.archive.engine_name: m for m in on_page}
    statuses = [_status(services, model) for model in shown.values()]
    page = ModelList(
        models=sorted(statuses, key=lambda status: (status.name, status.version or "")),
        memory=_memory_status(services, active),
        next_page_token=token,
    )
    # Made here, FastAPI would validate it once more: half of the time that the loop spends on it.
    return Response(page.model_dump_json(), media_type="application/json")


@router.get("/{name:path}", summary="One model", responses=_UNKNOWN)
async def model(name: str, services: Injected) -> ModelStatus:
    return _status_of(services, await _archive(services, name))


@router.post(
    "/{name:path}/load",
    summary="Load a model now",
    description="Answers once the model is ready.",
    responses=_UNPACKING
    | _errors(
        _429="Still loading after PALIMPSEST_LOAD_TIMEOUT, or too many requests wait; see Retry-After.",
        _504="The engine did not answer in time.",
        _507="Not enough memory, or a disk is full.",
    ),
)
async def load(name: str, services: Injected) -> ModelStatus:
    archive = await _prepared(services, name)
    await services.scheduler.load(archive, services.settings.load_timeout)
    return _status_of(services, archive)


@router.post(
    "/{name:path}/unload",
    summary="Unload a model",
    description="Requests that run end first; answers once the memory is back. A pin goes, too. Does nothing for a "
    "model that is not in memory.",
    responses=_UNKNOWN | _errors(_429="The server is stopping."),
)
async def unload(name: str, services: Injected) -> ModelStatus:
    archive = await _archive(services, name)
    with suppress(KeyError):
        await services.scheduler.unload(archive.name)
    return _status_of(services, archive)


@router.post(
    "/{name:path}/pin",
    summary="Pin a model",
    description="From its next load on, or from now if it is loaded, it stays until unpin, unload or the server's end.",
    responses=_UNPACKING,
)
async def pin(name: str, services: Injected) -> ModelStatus:
    return await _set_pin(services, name, pinned=True)


@router.post(
    "/{name:path}/warm",
    summary="Read a model's archive into main memory",
    description="Its next load then does not wait for the disk. Answers once it is read.",
    responses=_UNPACKING | _errors(_507="It is larger than what is left of PALIMPSEST_HOST_BUDGET."),
)
async def warm(name: str, services: Injected) -> Warmed:
    archive = await _prepared(services, name)
    size, room = await asyncio.to_thread(archive.size), services.prefetch.room()
    if size > room:
        raise OutOfMemory(
            f"{archive.name!r} has {size / 2**20:,.0f} MiB, and PALIMPSEST_HOST_BUDGET has {room / 2**20:,.0f} MiB left"
        )
    began = time.monotonic()
    read = await services.prefetch.warm(archive)
    return Warmed(name=archive.name, bytes=read, seconds=round(time.monotonic() - began, 3))


@router.post("/{name:path}/unpin", summary="Unpin a model", responses=_UNPACKING)
async def unpin(name: str, services: Injected) -> ModelStatus:
    return await _set_pin(services, name, pinned=False)


async def _set_pin(services: Services, name: str, pinned: bool) -> ModelStatus:
    archive = await _prepared(services, name)
    services.scheduler.pin(archive, pinned)
    return _status_of(services, archive)


def _page(catalog: Catalog, also: set[str], after: str, limit: int) -> tuple[list[Archive], str | None]:
    """Returns the next names after `after`, of what requests can name and of `also`; and the last of them, unless none
    follows. Asks the disk, so not in the event loop.
    """
    stored = catalog.names()
    start = bisect_right(stored, after)
    names = sorted({*stored[start : start + limit + 1], *(name for name in also if name > after)})
    found = []
    for name in names[:limit]:
        with suppress(ModelNotFound):  # it is in memory only, or went in this moment
            archive = catalog.find(name)
            if archive.name == name:  # else the demo archive of that name is listed as what it is
                found.append(archive)
    return found, names[limit - 1] if len(names) > limit else None


async def _archive(services: Services, name: str) -> Archive:
    """The archive that a request of that name would get; else one that is in memory but left the store."""
    try:
        return await services.catalog.look_up(name)
    except (ModelNotFound, StoreUnreachable):
        left = [m.archive for m in services.scheduler.active() if m.archive.name == name and m.state in IN_MEMORY]
        if not left:
            raise
        return left[0]


async def _prepared(services: Services, name: str) -> Archive:
    return await services.catalog.prepare(await _archive(services, name))


def _status_of(services: Services, archive: Archive) -> ModelStatus:
    return _status(services, services.scheduler.get(archive) or Model(archive))


def _status(services: Services, model: Model) -> ModelStatus:
    footprint = services.memory.footprint(model.archive)
    idle = asyncio.get_running_loop().time() - model.last_used if model.last_used else None
    return ModelStatus(
        name=model.archive.name,
        version=model.archive.version or None,
        place=_place(services, model),
        state=model.state,
        pinned=model.pinned,
        footprint=footprint and Footprint(load_bytes=footprint.load, peak_bytes=footprint.peak),
        reserved_bytes=model.reserved,
        host_bytes=model.host,
        leases=model.leases,
        queue=len(model.waiters),
        last_used=None if idle is None else datetime.now(UTC) - timedelta(seconds=idle),
        idle_seconds=None if idle is None else round(idle, 1),
        requests=model.requests,
        hits=model.hits,
        loads=model.loads,
        wakes=model.wakes,
        failures=model.failures,
        last_error=model.error and model.error.message,
    )


def _place(services: Services, model: Model) -> Place:
    if model.state in (State.SUSPENDING, State.WAKING, *AWAY):
        return "suspended" if model.state is not State.SUSPENDING and model.away and model.away.suspended else "parked"
    if model.state in {State.READY, State.DRAINING, State.PARKING, State.UNLOADING}:
        return "memory" if services.memory.device.gpu is None else "gpu"
    return "disk"


def _memory_status(services: Services, models: Collection[Model]) -> MemoryStatus:
    return MemoryStatus(
        device=services.memory.device.name,
        budget_bytes=services.memory.budget,
        reserved_bytes=sum(m.reserved for m in models),
        standby_bytes=services.scheduler.standby.held,
        free_bytes=services.memory.free(),
        host_budget_bytes=services.memory.host_budget,
        host_reserved_bytes=sum(m.host for m in models),
    )
