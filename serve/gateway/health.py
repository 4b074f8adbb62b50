"""How the server is: /ping, /v1/state, and /metrics for Prometheus."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator

from fastapi import APIRouter, Response
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.errors import EngineUnavailable, PalimpsestError
from serve.gateway.services import Injected, Services
from serve.gateway.state import State
from serve.logs.writer import lost_lines
from serve.residency.model import AWAY
from serve.residency.model import State as Residency

router = APIRouter(tags=["server"])

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_BYTES = 200_000  # of an answer; with more, fewer models have a series of their own
_LOADED = {Residency.READY, Residency.DRAINING, Residency.PARKING, Residency.SUSPENDING, *AWAY}


@router.get("/ping", summary="Whether requests can be served")
async def ping(services: Injected) -> dict[str, str]:
    if not await services.host.engine.alive():
        raise EngineUnavailable("TorchServe does not answer; logs are in the state folder")
    return {"status": "ready"}


@router.get("/v1/state", summary="Where models are, and how busy the server is", response_model=State)
async def state(services: Injected) -> Response:
    return Response(services.states.take().model_dump_json(), media_type="application/json")


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(services: Injected) -> Response:
    torchserve = await _torchserves_own(services)
    cached = await asyncio.to_thread(services.catalog.cached_bytes)
    state = list(_state(services, cached))
    # Some thousand lines with many models: other requests need not wait for them.
    body = await asyncio.to_thread(services.metrics.render, state, torchserve)
    while len(body) > MAX_BYTES and services.metrics.shrink():
        body = await asyncio.to_thread(services.metrics.render, list(_state(services, cached)), torchserve)
    return Response(body, media_type=CONTENT_TYPE)


async def _torchserves_own(services: Services) -> str:
    try:
        return await services.host.engine.metrics()
    except PalimpsestError:
        return ""  # it is being started again: ours matter all the more


def _state(services: Services, cached: int) -> Iterator[Metric]:
    """cached: bytes of unpacked archives."""
    cache_budget = services.settings.cache_mib << 20
    models, memory, warm = services.scheduler.active(), services.memory, services.host.warm
    label = services.metrics.label
    loaded = [m for m in models if m.state in _LOADED]
    yield _gauge("loaded_models", "Models that are loaded.", len(loaded))
    yield _gauge("memory_budget_bytes", "Memory that models may take together.", memory.budget)
    yield _gauge("memory_used_bytes", "Memory of the loaded models.", sum(m.reserved for m in loaded))
    yield _gauge("memory_reserved_bytes", "The same with those that load or unload.", sum(m.reserved for m in models))
    yield _gauge(
        "host_budget_bytes", "Main memory that parked and suspended models may take together.", memory.host_budget
    )
    yield _gauge(
        "host_reserved_bytes", "Main memory held for parked and suspended models.", sum(m.host for m in models)
    )
    yield _gauge("cache_budget_bytes", "Disk that unpacked archives may take together.", cache_budget)
    yield _gauge("cache_bytes", "Disk that unpacked archives take.", cached)
    mirror = services.catalog.mirror
    yield _gauge("store_reached", "Whether a store on a URL answers: 1 or 0.", mirror is None or mirror.reached)
    yield CounterMetricFamily(
        "palimpsest_store_fetched_bytes", "Bytes fetched from a store on a URL.", mirror.fetched_bytes if mirror else 0
    )
    yield _gauge("images_bytes", "Main memory of uploads and results that are kept.", services.images.size)
    yield _gauge("bodies_bytes", "Main memory of requests' bodies.", services.bodies.used)
    yield _gauge("unread_bytes", "Main memory of replies that clients have not read.", services.unread.used)
    yield _gauge("parked_models", "Models that are parked.", sum(m.state is Residency.PARKED for m in models))
    yield _gauge("suspended_models", "Models that are suspended.", sum(m.state is Residency.SUSPENDED for m in models))
    yield CounterMetricFamily("palimpsest_log_lines_lost", "Lines that the log had no room for.", lost_lines())
    yield CounterMetricFamily(
        "palimpsest_prefetched_bytes", "Bytes of archives read ahead.", services.prefetch.bytes_read
    )
    yield CounterMetricFamily(
        "palimpsest_worker_slow_starts", "Workers that had to start without the zygote.", warm.slow_starts
    )
    yield CounterMetricFamily(
        "palimpsest_zygote_restarts", "Times that the zygote had to be started again.", warm.zygote_restarts
    )
    yield _gauge(
        "standby_workers", "Workers that have CUDA set up and wait for a model: 1 or none.", warm.standby_is_ready
    )
    yield CounterMetricFamily(
        "palimpsest_standby_starts", "Workers that were a standby before, and so had CUDA set up.", warm.standby_starts
    )
    yield _gauge("device_free_bytes", "Memory that the device reports as free.", memory.free())
    yield _gauge_per_model(
        "model_memory_bytes", "Memory held for a model.", ((label(m), m.reserved) for m in models if m.reserved)
    )
    yield _gauge_per_model(
        "waiting_requests", "Requests that wait for a model.", ((label(m), len(m.waiters)) for m in models)
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"palimpsest_{name}", text, value)


def _gauge_per_model(name: str, text: str, values: Iterable[tuple[str, int]]) -> Metric:
    """values: by label, which versions of one archive share."""
    totals: Counter[str] = Counter()
    for label, value in values:
        totals[label] += value
    family = GaugeMetricFamily(f"palimpsest_{name}", text, labels=["model"])
    for model_name, total in sorted(totals.items()):
        family.add_metric([model_name], total)
    return family
