"""What the routes work with, made by the application and handed to each route that asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

from fastapi import Depends, Request

from serve.budget import Unread
from serve.gateway.access.fairuse import FairUse
from serve.gateway.access.guard import Guard
from serve.gateway.body import Bodies
from serve.gateway.edit.images import Images
from serve.gateway.edit.jobs import Jobs
from serve.gateway.given_names import GivenNames
from serve.gateway.metrics import Metrics
from serve.gateway.state import States
from serve.residency import standby, workers
from serve.residency.memory import Memory
from serve.residency.scheduler import Scheduler
from serve.settings import Settings
from serve.store.catalog import Catalog
from serve.store.prefetch import Prefetch


class EngineHost(workers.EngineHost, Protocol):
    """Starts and ends the engine: the supervisor, or a stand-in in tests."""

    @property
    def warm(self) -> "WarmStarts": ...

    async def start(self, on_lost: Callable[[], None], on_ready: Callable[[], None]) -> None: ...

    async def stop(self) -> None: ...


class WarmStarts(standby.WarmStarts, Protocol):
    """How often workers could not start from the zygote, how often it was started again, and how many a standby became.

    on_standby: called when the standby has gone, or there can be one now.
    """

    slow_starts: int
    zygote_restarts: int
    standby_starts: int
    standby_is_ready: bool
    on_standby: Callable[[], None]


@dataclass(frozen=True)
class Services:
    """All of them; `app.state.services` while the application runs."""

    settings: Settings
    catalog: Catalog
    scheduler: Scheduler
    workers: workers.Workers
    memory: Memory
    host: EngineHost
    metrics: Metrics
    prefetch: Prefetch
    images: Images
    jobs: Jobs
    bodies: Bodies
    guard: Guard
    fair_use: FairUse
    unread: Unread
    given_names: GivenNames
    states: States


# A coroutine: FastAPI would run a plain function in a thread.
async def _of_application(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Injected = Annotated[Services, Depends(_of_application)]
