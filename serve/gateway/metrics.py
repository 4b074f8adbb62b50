"""What Prometheus scrapes: a multi-model endpoint's metrics per model, the queue, the memory, TorchServe's own.

A model's name becomes a label only once the store was seen to hold its archive: what clients ask for in vain leaves no
trace here. Where there are too many, the busiest have theirs and the rest is counted as one.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import assert_never

from prometheus_client import CollectorRegistry, Gauge, disable_created_metrics, generate_latest
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.errors import PalimpsestError
from serve.gateway.busiest import OTHER, Busiest
from serve.gateway.histogram import Histogram
from serve.gateway.invocation import Invocation
from serve.gateway.torchserve_metrics import relabel
from serve.logs.record import Record, current
from serve.residency.events import Event, What
from serve.residency.model import Model, Reason
from serve.store.catalog import Archive

# Bounds in seconds: of what a request goes through, and of what a model does.
_REQUEST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 1, 2.5, 5, 10, 30, 120)
_RESIDENCY = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120)

# Of handlers/worker/base.py; from others nothing becomes a label.
_PHASES = {"fork", "import", "build", "read", "copy", "warm_up"}

# Of contract.timings; what SAM says more of is the model's part.
_STAGES = {
    "queue": "queue", "load": "load", "decode": "decode", "encode": "encode",
    "model": "model", "embed": "model", "recall": "model", "mask": "model",
}  # fmt: skip
_STAGE = (0.005, 0.025, 0.1, 0.25, 1, 2.5, 10, 30, 120)
MOST_LABELS = 100  # values of a label that others than the code decide: keys' names, codes of errors

_MOST_VERSIONS = 2000  # whose counters TorchServe's are told apart by


class Metrics:
    """The counters and histograms of one application."""

    def __init__(self) -> None:
        # Nobody asks when a series was created, and each would have a second line for it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._histograms: list[Histogram] = []
        self._counters: list[PrometheusCounter] = []
        # TorchServe's names of models -> the label that they had when they were loaded.
        self._names: dict[str, str] = {}
        self._busiest = Busiest(self._remove)

        def seconds(name: str, text: str, bounds: tuple[float, ...], *labels: str) -> Histogram:
            self._histograms.append(Histogram(f"palimpsest_{name}_seconds", text, labels, bounds))
            return self._histograms[-1]

        def counter(name: str, text: str, *labels: str) -> PrometheusCounter:
            return PrometheusCounter(f"palimpsest_{name}", text, labels, registry=self._registry)

        def count(name: str, text: str, *labels: str) -> PrometheusCounter:
            """By model, where there are labels."""
            made = counter(name, text, *labels)
            self._counters += [made] if labels else []
            return made

        self._invocations = count("invocations", "Requests to a model.", "model")
        self._errors = {
            4: count("invocation_4xx_errors", "Requests that the model or the queue answered 4xx.", "model"),
            5: count("invocation_5xx_errors", "Requests that the model or the engine answered 5xx.", "model"),
        }
        self._lookups = count("model_cache_lookups", "Requests, by whether their model was loaded: all.", "model")
        self._hits = count("model_cache_hits", "Requests that found their model loaded.", "model")
        self._stages = seconds(
            "stage", "Time of a request by stage: queue or load, decode, model, encode.", _STAGE, "model", "stage"
        )
        self._latency = seconds("model_latency", "Time that a request spent in TorchServe.", _REQUEST, "model")
        self._overhead = seconds(
            "overhead_latency", "Time of a request outside of TorchServe: waiting, loading, gateway.", _REQUEST, "model"
        )
        self._queue_wait = seconds("queue_wait", "Time until a request got its turn at its model.", _REQUEST)
        self._loading_wait = seconds(
            "model_loading_wait", "Time that a request waited because its model was not loaded.", _RESIDENCY, "model"
        )
        self._downloading = seconds("model_downloading", "Time to unpack an archive.", _RESIDENCY, "model")
        self._loading = seconds("model_loading", "Time to load a model.", _RESIDENCY, "model", "phase")
        self._unloading = seconds(
            "model_unloading", "Time to unload a model and get its memory back.", _RESIDENCY, "model"
        )
        self._parking = seconds("model_parking", "Time to move a model to host memory.", _RESIDENCY, "model")
        self._suspending = seconds(
            "model_suspending", "Time to take a parked model off the GPU altogether.", _RESIDENCY, "model"
        )
        self._waking = seconds("model_waking", "Time to bring a parked or suspended model back.", _RESIDENCY, "model")
        self._load_failures = count("model_load_failures", "Loads that failed.", "model", "reason")
        self._load_retries = count("model_load_out_of_memory", "Loads for which the device had no room.", "model")
        self._evictions = count("evictions", "Models that had to leave memory.", "model", "reason")
        self._worker_deaths = count("worker_deaths", "Workers that ended by themselves.", "model")
        self._restarts = count("torchserve_restarts", "Times that TorchServe had to be started again.")
        self._few = {"code": _Few(), "key": _Few()}
        self._requests = counter("requests", "Requests by route and status.", "route", "status")
        self._codes = counter("errors", "Requests that ended in an error, by its code.", "code")
        self._keys = counter("key_requests", "Requests by the key that they showed.", "key", "status")
        self.running = Gauge(
            "palimpsest_requests_running", "Requests that are being answered.", registry=self._registry
        )

    def on_event(self, event: Event) -> None:
        """The scheduler's news."""
        if event.what is What.QUEUE_WAIT:
            self._queue_wait.observe(event.seconds)
            return
        model = event.model
        name = self._busiest.label(model.archive.name)
        match event.what:
            case What.LOADED:
                # TorchServe, too, remembers every version that it ever had.
                if len(self._names) < _MOST_VERSIONS:
                    self._names[model.archive.engine_name] = name
                self._loading.observe(event.seconds, name, "total")
            case What.PARKED:
                self._parking.observe(event.seconds, name)
            case What.SUSPENDED:
                self._suspending.observe(event.seconds, name)
            case What.WOKEN:
                self._waking.observe(event.seconds, name)
            case What.LOAD_FAILED:
                self._load_failures.labels(name, model.error.code if model.error else "unknown").inc()
            case What.LOAD_OUT_OF_MEMORY:
                self._load_retries.labels(name).inc()
            case What.EVICTED if event.reason is Reason.WORKER_LOST:
                self._worker_deaths.labels(name).inc()
            case What.EVICTED:
                assert event.reason is not None
                self._evictions.labels(name, event.reason.value).inc()
            case What.UNLOADED:
                self._unloading.observe(event.seconds, name)
            case _:
                assert_never(event.what)

    def on_request(self, request: Record) -> None:
        """A request that is over, whatever it was."""
        status = str(request.status or 499)
        self._requests.labels(request.route or "(none)", status).inc()
        if request.code or request.status >= 400:
            self._codes.labels(self._few["code"].label(request.code or "other")).inc()
        if request.key is not None:
            self._keys.labels(self._few["key"].label(request.key), f"{status[0]}xx").inc()

    def on_unpacked(self, archive: Archive, seconds: float) -> None:
        self._downloading.observe(seconds, self._busiest.label(archive.name))

    def on_phases(self, archive: Archive, phases: Mapping[str, float]) -> None:
        """Notes how long each phase of a load took, as the worker timed it itself."""
        name = self._busiest.label(archive.name)
        for phase in _PHASES & phases.keys():
            self._loading.observe(phases[phase], name, phase)

    def on_engine_restart(self) -> None:
        self._restarts.inc()
        self._names.clear()

    @contextmanager
    def invocation(self, archive: Archive, hit: bool) -> Iterator[Invocation]:
        """One request to a model, retries included. hit: whether it finds the model loaded.

        One that is given up before its answer is an invocation without a status.
        """
        name, began = self._busiest.use(archive.name), time.perf_counter()
        self._invocations.labels(name).inc()
        self._lookups.labels(name).inc()
        if hit:
            self._hits.labels(name).inc()
        invocation = Invocation(archive.name, "queue" if hit else "load", began)
        try:
            yield invocation
        except Exception as error:
            invocation.status = error.status if isinstance(error, PalimpsestError) else 500
            raise
        finally:
            name = self._busiest.label(archive.name)  # which may have changed meanwhile
            self._observe_stages(name, invocation.timings)
            if request := current():
                request.has_asked(invocation.asked)
                request.took(invocation.timings)
            if invocation.status:
                self._count_answer(name, invocation.status)
                self._overhead.observe(time.perf_counter() - began - invocation.engine_seconds, name)
            if invocation.entered:
                self._latency.observe(invocation.engine_seconds, name)
                if not hit:
                    self._loading_wait.observe(invocation.entered - began, name)

    def render(self, state: Iterable[Metric], torchserve: str) -> bytes:
        """All of it in Prometheus' text format. torchserve: what TorchServe's own metrics port said."""
        families = [*self._registry.collect(), *state, *relabel(torchserve, self._names)]
        histograms = "".join(histogram.text() for histogram in self._histograms)
        return generate_latest(_Families(families)) + histograms.encode()

    def label(self, model: Model) -> str:
        """What stands for the model in a series."""
        return self._busiest.label(model.archive.name)

    def shrink(self) -> bool:
        """Leaves fewer models a series of their own; False where that is no more possible."""
        return self._busiest.shrink()

    def _observe_stages(self, name: str, timings: Mapping[str, float]) -> None:
        stages: dict[str, float] = {}
        for own, stage in _STAGES.items():
            if own in timings:
                stages[stage] = stages.get(stage, 0.0) + timings[own]
        for stage, taken in stages.items():
            self._stages.observe(taken, name, stage)

    def _remove(self, name: str) -> None:
        """What a model has in TorchServe's own counters is left out from now on: nothing takes it for an increase."""
        for histogram in self._histograms:
            histogram.remove(name)
        for counter in self._counters:
            counter.remove_by_labels({"model": name})
        self._names = {key: label for key, label in self._names.items() if label != name}

    def _count_answer(self, name: str, status: int) -> None:
        if status // 100 in self._errors:
            self._errors[status // 100].labels(name).inc()


class _Few:
    """The first MOST_LABELS values of a label; the others are one."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def label(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= MOST_LABELS:
            return OTHER
        self._seen.add(value)
        return value


class _Families(Collector):
    """What was collected already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
