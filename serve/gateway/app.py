"""The door: one FastAPI application in front of one TorchServe."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.errors import BadRequest, Busy, EngineUnavailable, PalimpsestError
from serve.gateway import container, metrics, models, predictions, sagemaker
from serve.gateway.metrics import Metrics
from serve.residency import workers
from serve.residency.catalog import Catalog
from serve.residency.memory import Memory
from serve.residency.model import IN_MEMORY
from serve.residency.scheduler import Limits, Scheduler
from serve.residency.workers import Workers
from serve.settings import Settings

logger = logging.getLogger(__name__)

DESCRIPTION = """Segment Anything (click → mask), LaMa (mask → erased) and Stable Diffusion inpainting
(mask + prompt → replaced) on one GPU. Models are loaded when a request names them."""


class EngineHost(workers.EngineHost, Protocol):
    """Starts and ends the engine: the supervisor, or a stand-in in tests."""

    async def start(self, on_lost: Callable[[], None], on_ready: Callable[[], None]) -> None: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True)
class Services:
    """What the routes work with; `app.state.services` while the application runs."""

    settings: Settings
    catalog: Catalog
    scheduler: Scheduler
    workers: Workers
    memory: Memory
    host: EngineHost
    metrics: Metrics


def create_app(settings: Settings, catalog: Catalog, host: EngineHost, memory: Memory) -> FastAPI:
    """The application; entering its lifespan starts the engine, leaving it stops the engine."""
    crew = Workers(host, memory)
    numbers = Metrics()
    scheduler = Scheduler(crew, memory, _limits(settings), numbers.on_event)
    crew.on_lost, crew.on_footprint = scheduler.on_worker_lost, scheduler.on_footprint
    catalog.in_use, catalog.on_unpacked = lambda: _paths_in_use(scheduler), numbers.on_unpacked

    def on_engine_lost() -> None:
        crew.forget()
        scheduler.on_engine_lost()

    def on_engine_ready() -> None:
        numbers.on_engine_restart()
        scheduler.on_engine_ready()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await host.start(on_engine_lost, on_engine_ready)
            app.state.services = Services(settings, catalog, scheduler, crew, memory, host, numbers)
            yield
        finally:
            catalog.close()
            await scheduler.close(settings.stop_timeout)
            crew.forget()  # from here on the death of a worker is no news
            await host.stop()

    app = FastAPI(
        title="Palimpsest",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=lifespan,
        exception_handlers={
            PalimpsestError: _on_palimpsest_error,
            HTTPException: _on_http_exception,
            RequestValidationError: _on_validation_error,
            Exception: _on_unexpected,
        },
    )
    for each in (container, predictions, sagemaker, models, metrics):
        app.include_router(each.router)
    app.get("/ping", summary="Whether requests can be served", tags=["server"])(_ping)
    return app


def _paths_in_use(scheduler: Scheduler) -> set[Path]:
    return {m.archive.path for m in scheduler.models() if m.state in IN_MEMORY or m.in_use}


def _limits(settings: Settings) -> Limits:
    return Limits(
        queue_per_model=settings.queue_per_model,
        queue_total=settings.queue_total,
        wait=settings.queue_timeout,
        concurrent_loads=settings.concurrent_loads,
        minimum_stay=settings.minimum_stay,
        keep_alive=settings.keep_alive,
    )


async def _ping(request: Request) -> dict[str, str]:
    services: Services = request.app.state.services
    if not await services.host.engine.alive():
        raise EngineUnavailable("TorchServe does not answer; logs are in the state folder")
    return {"status": "ready"}


async def _on_palimpsest_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, PalimpsestError)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Busy) else None
    return JSONResponse(error.body(), error.status, headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    message = f"{request.method} {request.url.path}: {error.detail}; /docs lists what there is"
    return JSONResponse({"error": {"code": code, "message": message}}, error.status_code, headers=error.headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return await _on_palimpsest_error(request, BadRequest(f"{field}: {first['msg']}", field))


async def _on_unexpected(request: Request, error: Exception) -> Response:
    # Starlette's server-error layer raises it again for uvicorn, which logs the traceback.
    return JSONResponse(PalimpsestError("an unexpected error; the server's log says where").body(), 500)
