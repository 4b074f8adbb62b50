"""The door: one FastAPI application in front of one TorchServe."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Mount
from starlette.types import ASGIApp

from contract.errors import error_object
from serve import __version__
from serve.budget import Unread
from serve.descriptions import descriptions
from serve.errors import UNEXPECTED, BadRequest, PalimpsestError
from serve.gateway import container, docs, door, health, inference, models, page, predictions, sagemaker, traces
from serve.gateway.access import fairuse, keys, login, openapi, scopes
from serve.gateway.access.fairuse import FairUse
from serve.gateway.access.guard import Guard
from serve.gateway.body import Bodies
from serve.gateway.door import Door, Hosts
from serve.gateway.edit import routes
from serve.gateway.edit.images import Images
from serve.gateway.edit.jobs import Jobs
from serve.gateway.given_names import GivenNames
from serve.gateway.metrics import Metrics
from serve.gateway.openai import routes as openai
from serve.gateway.origins import Origins, let_read, origins
from serve.gateway.peers import ALONE, Peers
from serve.gateway.services import EngineHost, Services
from serve.gateway.state import States
from serve.gateway.traces import Traces
from serve.gateway.watched import Watched, Watcher
from serve.logs import record
from serve.residency.events import Event, What
from serve.residency.memory import Memory
from serve.residency.scheduler import Scheduler, SchedulerLimits
from serve.residency.standby import Standby
from serve.residency.workers import Workers
from serve.settings import Settings
from serve.store.catalog import Catalog
from serve.store.prefetch import Prefetch, Usage

logger = logging.getLogger(__name__)

_MODELS = ", ".join(f"{model.title} ({model.summary})" for model in descriptions().values())
DESCRIPTION = f"{_MODELS} on one GPU. Models are loaded when a request names them."

# For jobs that nobody waits for any more to end: requests had PALIMPSEST_STOP_TIMEOUT before (serve/gateway/server.py).
LAST_STEP_SECONDS = 2.0

# In the order of the page /docs: what most people look for comes first.
TAGS = ("editing", "OpenAI", "predictions", "models", "server", "SageMaker runtime", "SageMaker container")


class Gateway(FastAPI):
    """hosts: the names that it answers to. origins: other sites whose pages may use it. guard: asks for keys where
    there are any. fair_use: what each may have."""

    def __init__(
        self, hosts: Hosts, origins: Origins, guard: Guard, fair_use: FairUse, watcher: Watcher, **fastapi: Any
    ) -> None:
        self._hosts, self._origins, self._guard, self._fair_use = hosts, origins, guard, fair_use
        super().__init__(**fastapi)
        self.state.watcher = watcher

    def build_middleware_stack(self) -> ASGIApp:
        """The door is around all that answers, an unexpected error's answer included; and around it who watches."""
        door = Door(super().build_middleware_stack(), self._hosts, self._origins, self._guard, self._fair_use)
        return Watched(let_read(door, self._origins), self.state.watcher)

    def methods(self, path: str) -> list[str]:
        """Lists the methods that exist for a path, HEAD and OPTIONS included; none where nothing does."""
        scope = {"type": "http", "path": path, "root_path": "", "headers": []}
        found = {
            method
            for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
            for route in self.router.routes
            if route.matches(scope | {"method": method})[0] is Match.FULL
            and (method == "GET" or not isinstance(route, Mount))  # of files
        }
        also = {"OPTIONS"} if found else set()
        return sorted(found | also | ({"HEAD"} if "GET" in found else set()))

    def openapi(self) -> dict[str, Any]:
        """FastAPI documents a 422 of its own wherever a parameter may be wrong; here that is a 400 as any other."""
        if self.openapi_schema is None:
            document = super().openapi()
            for operation in [each for item in document["paths"].values() for each in item.values()]:
                if operation["responses"].pop("422", None):
                    operation["responses"].setdefault("400", _WRONG_PARAMETER)
            openapi.describe(document, self._guard)
        assert self.openapi_schema is not None
        return self.openapi_schema


_WRONG_PARAMETER = {
    "description": "A parameter is wrong.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}},
}


def create_app(
    settings: Settings,
    catalog: Catalog,
    host: EngineHost,
    memory: Memory,
    peers: Peers = ALONE,
) -> FastAPI:
    """The application; entering its lifespan starts the engine, leaving it stops the engine."""
    services, collected = _services(settings, catalog, host, memory, peers), traces.of_environment()
    app = Gateway(
        Hosts(settings.hosts.split(",")),
        origins(settings.origins),
        services.guard,
        services.fair_use,
        Watcher(services.metrics, collected),
        title="Palimpsest",
        description=DESCRIPTION,
        version=__version__,
        openapi_tags=[{"name": tag} for tag in TAGS],
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the door takes a slash at the end for none: a redirect would have the body sent twice
        lifespan=lambda app: _lifespan(app, services, collected),
        exception_handlers={
            PalimpsestError: _on_palimpsest_error,
            ClientDisconnect: _on_client_disconnect,
            HTTPException: _on_http_exception,
            RequestValidationError: _on_validation_error,
            Exception: _on_unexpected,
        },
    )
    for each in (page, login, container, predictions, sagemaker, routes, openai, models, inference, health):
        app.include_router(each.router)
    docs.add(app)
    return app


def _services(settings: Settings, catalog: Catalog, host: EngineHost, memory: Memory, peers: Peers) -> Services:
    """All of them, each told whom to tell what."""
    workers = Workers(host, memory, settings.predict_timeout)
    numbers = Metrics()

    def on_event(event: Event) -> None:
        numbers.on_event(event)
        if event.what is What.QUEUE_WAIT:
            prefetch.on_use(event.model.archive)

    device = memory.device
    standby = Standby(host.warm, device.standby_worker) if device.gpu is not None else Standby()
    scheduler = Scheduler(workers, memory, _limits(settings), on_event, standby)
    host.warm.on_standby = scheduler.on_standby
    prefetch = Prefetch(
        catalog,
        Usage(settings.state / "usage.json"),
        room=lambda: memory.host_budget - sum(m.host for m in scheduler.active()),
        idle=lambda: not any(m.in_use for m in scheduler.active()),
    )
    workers.on_lost, workers.on_footprint = scheduler.on_worker_lost, scheduler.on_footprint
    workers.on_phases = numbers.on_phases
    catalog.in_use, catalog.on_unpacked = lambda: _paths_in_use(scheduler), numbers.on_unpacked
    catalog.patience = settings.queue_timeout
    transit, wait = settings.transit_mib << 20, settings.queue_timeout
    bodies = Bodies(transit, settings.max_request_mib, wait)
    metrics_need = scopes.OPERATE if settings.metrics == "operate" else scopes.OPEN
    return Services(
        settings, catalog, scheduler, workers, memory, host, numbers, prefetch,
        images=Images(settings.images_mib << 20, settings.images_seconds, peers),
        jobs=Jobs(peers.box, catalog.fetched),
        bodies=bodies,
        guard=Guard(keys.of_settings(settings), bodies, metrics_need),
        fair_use=FairUse(_shares(settings)),
        unread=Unread(transit, wait),
        given_names=GivenNames(),
        states=States(scheduler, memory),
    )  # fmt: skip


@asynccontextmanager
async def _lifespan(app: FastAPI, services: Services, collected: Traces | None) -> AsyncIterator[None]:
    workers, scheduler = services.workers, services.scheduler

    def on_engine_lost() -> None:
        workers.forget()
        scheduler.on_engine_lost()

    def on_engine_ready() -> None:
        services.metrics.on_engine_restart()
        scheduler.on_engine_ready()

    try:
        await services.host.start(on_engine_lost, on_engine_ready)
        await asyncio.to_thread(services.catalog.open)
        app.state.services = services
        async with _running(services.prefetch.run()), _running(services.catalog.follow()):
            yield
    finally:
        services.catalog.close()
        services.prefetch.close()
        services.images.close()
        await scheduler.close(LAST_STEP_SECONDS)
        workers.forget()  # from here on the death of a worker is no news
        await services.host.stop()
        services.catalog.release()
        if collected is not None:
            await asyncio.to_thread(collected.close)


@asynccontextmanager
async def _running(background: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(background)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _paths_in_use(scheduler: Scheduler) -> set[Path]:
    return {m.archive.path for m in scheduler.active()}


def _shares(settings: Settings) -> fairuse.Limits:
    return fairuse.Limits(
        settings.key_requests, settings.key_megapixels * 1e6, settings.key_rate / 60, burst=max(1, settings.key_rate)
    )


def _limits(settings: Settings) -> SchedulerLimits:
    return SchedulerLimits(
        queue_per_model=settings.queue_per_model,
        queue_total=settings.queue_total,
        wait=settings.queue_timeout,
        concurrent_loads=settings.concurrent_loads,
        minimum_stay=settings.minimum_stay,
        keep_alive=settings.keep_alive,
        eviction=settings.eviction,
    )


async def _on_palimpsest_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PalimpsestError)
    return door.reply(request.scope["path"], error)


async def _on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # to nobody: what the access logs of other servers call it


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    message = f"{request.method} {request.url.path[:200]}: {error.detail}; /docs lists what there is"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        allowed = ", ".join(request.app.methods(request.scope["path"]))
        if request.method == "OPTIONS" and allowed:
            return Response(status_code=204, headers={"Allow": allowed})
        headers["Allow"] = allowed
    record.fails(code)
    if request.url.path.startswith("/endpoints/"):
        return sagemaker.unknown_operation(message, error.status_code, headers)
    return JSONResponse(error_object(code, message), error.status_code, headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return await _on_palimpsest_error(request, BadRequest(f"{field}: {first['msg']}", field))


async def _on_unexpected(request: Request, error: Exception) -> Response:
    # Starlette's server-error layer raises it again for uvicorn, which logs the traceback.
    return door.reply(request.scope["path"], PalimpsestError(UNEXPECTED))
