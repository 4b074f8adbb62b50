"""Who is in memory: the one owner of every model's state.

Every decision is made in `_advance`, synchronously and without I/O; what takes time (loading, unloading) runs in
tasks that end in one of the `_on_...` methods, which change the state and call `_advance` again.

    ABSENT ──► LOADING ──► READY ──► DRAINING ──► UNLOADING ──► ABSENT
                  │          ▲ │                      ▲
                  ▼          │ └──── worker lost ─────┘
               FAILED ───────┘ (the next request after a pause loads again)
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from serve.errors import ModelNotReady, OutOfMemory, PalimpsestError, QueueFull
from serve.residency.catalog import Archive
from serve.residency.policy import Resident, choose_victims

logger = logging.getLogger(__name__)


class State(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    PARKED = "parked"  # worker alive, weights in host memory
    DRAINING = "draining"  # serves what runs, admits nothing new
    UNLOADING = "unloading"
    FAILED = "failed"


_TRANSITIONS = {
    State.ABSENT: {State.LOADING},
    State.LOADING: {State.READY, State.FAILED, State.ABSENT},
    State.READY: {State.PARKED, State.DRAINING, State.UNLOADING, State.ABSENT},
    State.PARKED: {State.LOADING, State.UNLOADING, State.ABSENT},
    State.DRAINING: {State.UNLOADING, State.ABSENT},
    State.UNLOADING: {State.ABSENT},
    State.FAILED: {State.LOADING, State.ABSENT},
}
_LEAVING = {State.DRAINING, State.UNLOADING}
_IN_MEMORY = {State.LOADING, State.READY, State.PARKED, State.DRAINING, State.UNLOADING}


class Engine(Protocol):
    """The effects that residency needs. Every error is a PalimpsestError."""

    async def load(self, archive: Archive) -> int:
        """Starts the model and returns the bytes that it takes; OutOfMemory or ModelLoadFailed leave nothing behind."""

    async def unload(self, archive: Archive) -> None:
        """Returns once the worker is gone and the device reports its memory back, or after a bound."""


class Memory(Protocol):
    """The device and what is known of each model's size, in bytes."""

    budget: int

    def free(self) -> int:
        """What the device reports as free."""

    def predict(self, archive: Archive) -> int:
        """What loading the archive will take."""


@dataclass(frozen=True)
class Limits:
    """queue_per_model, queue_total: waiting requests. wait: seconds that one waits at most. concurrent_loads: at a
    time. minimum_stay: seconds that a busy model keeps its place. keep_alive: seconds until an idle model goes even
    if nobody needs its place (None: never; 0: after each answer). failure_pause: seconds in which a model that failed
    to load is not tried again."""

    queue_per_model: int = 64
    queue_total: int = 256
    wait: float = 60.0
    concurrent_loads: int = 1
    minimum_stay: float = 2.0
    keep_alive: float | None = None
    failure_pause: float = 5.0


@dataclass(eq=False)
class Waiter:
    """One request that waits for its model. granted: it holds a lease."""

    future: asyncio.Future[None]
    since: float
    granted: bool = False


@dataclass(eq=False)
class Model:
    """One version of one archive. reserved: bytes held for it, from the start of its load until its unload is done."""

    archive: Archive
    state: State = State.ABSENT
    leases: int = 0
    waiters: deque[Waiter] = field(default_factory=deque)
    reserved: int = 0
    pinned: bool = False
    stale: bool = False
    ready_since: float = 0.0
    last_used: float = 0.0
    error: PalimpsestError | None = None
    failed_at: float = 0.0
    squeezed: bool = False  # the device had less room than the books said
    unwanted: bool = False  # to be unloaded as soon as it can be
    leaving: list[asyncio.Future[None]] = field(default_factory=list)
    loads: int = 0
    failures: int = 0
    hits: int = 0
    requests: int = 0

    def to(self, state: State) -> None:
        """Changes the state; RuntimeError for a transition that the diagram above does not have."""
        if state not in _TRANSITIONS[self.state]:
            raise RuntimeError(f"{self.archive.name}: {self.state.name} -> {state.name} is not a transition")
        self.state = state

    @property
    def in_use(self) -> bool:
        return self.leases > 0 or bool(self.waiters)


class Scheduler:
    """Grants leases. A leased model is never unloaded unless its worker is already gone.

    on_event: told of everything worth counting, as (name of the event, model, seconds that it took).
    """

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        limits: Limits = Limits(),
        on_event: Callable[[str, Model, float], None] = lambda event, model, seconds: None,
    ) -> None:
        self._engine, self._memory, self._limits, self._on_event = engine, memory, limits, on_event
        self._models: dict[str, Model] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._released = asyncio.Event()
        self._paused = False
        self._closed = False

    # What the gateway calls

    @asynccontextmanager
    async def lease(self, archive: Archive, wait: float | None = None) -> AsyncIterator[Model]:
        """Inside this context the model is loaded and one request may use it: a worker serves one at a time.

        Raises QueueFull at once, ModelNotReady after `wait` seconds (the load goes on), or what the load raised.
        """
        model = self._register(archive)
        model.requests += 1
        model.hits += model.state is State.READY
        await self._wait_for_lease(model, self._limits.wait if wait is None else wait)
        try:
            yield model
        finally:
            self._release(model)

    async def load(self, archive: Archive, wait: float | None = None) -> None:
        """Returns once the model is ready; raises as lease."""
        async with self.lease(archive, wait):
            pass

    async def unload(self, name: str) -> None:
        """Drains and unloads every version of the model; returns when its memory is back. KeyError: not in memory."""
        models = [m for m in self._models.values() if m.archive.name == name and m.state in _IN_MEMORY]
        if not models:
            raise KeyError(name)
        gone = [asyncio.get_running_loop().create_future() for _ in models]
        for model, future in zip(models, gone, strict=True):
            model.pinned, model.unwanted = False, True
            model.leaving.append(future)
        self._advance()
        await asyncio.gather(*gone)

    def pin(self, archive: Archive, pinned: bool) -> None:
        """A pinned model is never evicted."""
        self._register(archive).pinned = pinned
        self._advance()

    def models(self) -> list[Model]:
        """Every model that was asked for since the start, for status pages and metrics; read only."""
        return list(self._models.values())

    def resident(self, name: str) -> bool:
        """Whether a version of the model is ready to serve."""
        return any(m.archive.name == name and m.state is State.READY for m in self._models.values())

    # What the supervisor calls

    def on_worker_lost(self, engine_name: str) -> None:
        """The model's worker died: its leases end with the error that their holders see, the queue stays."""
        model = self._models.get(engine_name)
        if model is not None and model.state in {State.READY, State.PARKED}:
            self._on_event("evicted: worker lost", model, 0.0)
            self._unload(model)
            self._advance()

    def on_footprint(self, engine_name: str, size: int) -> None:
        """The model was measured while it worked: it has grown, or shrunk, since its load."""
        model = self._models.get(engine_name)
        if model is not None and model.state is State.READY:
            model.reserved = size
            self._shrink_to_budget()

    def on_engine_lost(self) -> None:
        """TorchServe itself is gone, and all workers with it: nothing is in memory, nothing can be loaded."""
        self._paused = True
        for task in list(self._tasks):
            task.cancel()
        for model in self._models.values():
            if model.state in _IN_MEMORY:
                self._gone(model)

    def on_engine_ready(self) -> None:
        """TorchServe is back: what waits is loaded again."""
        self._paused = False
        self._advance()

    async def close(self, timeout: float) -> None:
        """Lets running requests finish for up to `timeout` seconds; waiting ones get ModelNotReady."""
        self._closed = True
        for model in self._models.values():
            self._fail_waiters(model, _shutting_down())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while any(m.leases for m in self._models.values()):
                    self._released.clear()
                    await self._released.wait()
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Requests

    def _register(self, archive: Archive) -> Model:
        model = self._models.get(archive.engine_name)
        if model is None:
            model = self._models[archive.engine_name] = Model(archive)
            for other in self._models.values():
                if other is not model and other.archive.name == archive.name:
                    other.stale, model.pinned = True, model.pinned or other.pinned
                    other.pinned = False
            self._forget_old_versions()
        return model

    async def _wait_for_lease(self, model: Model, wait: float) -> None:
        self._check_admission(model)
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop.create_future(), loop.time())
        model.waiters.append(waiter)
        self._advance()
        try:
            async with asyncio.timeout(wait):
                await waiter.future
        except TimeoutError:
            self._withdraw(model, waiter)
            raise ModelNotReady(
                f"{model.archive.name!r} is {model.state.value}: no place or turn for this request within {wait:g} s",
                retry_after=5,
            ) from None
        except BaseException:
            self._withdraw(model, waiter)
            raise
        self._on_event("queue_wait", model, loop.time() - waiter.since)

    def _check_admission(self, model: Model) -> None:
        if self._closed:
            raise _shutting_down()
        if model.state is State.FAILED and model.error and self._now() - model.failed_at < self._limits.failure_pause:
            raise model.error
        total = sum(len(m.waiters) for m in self._models.values())
        if len(model.waiters) >= self._limits.queue_per_model or total >= self._limits.queue_total:
            raise QueueFull(f"too many requests wait for {model.archive.name!r}: try again later", retry_after=2)

    def _withdraw(self, model: Model, waiter: Waiter) -> None:
        if waiter.granted:
            self._release(model)  # granted in the very moment in which it gave up
        elif waiter in model.waiters:
            model.waiters.remove(waiter)
            self._advance()

    def _release(self, model: Model) -> None:
        model.leases -= 1
        model.last_used = self._now()
        self._released.set()
        self._advance()

    # Decisions

    def _advance(self) -> None:
        """Takes every step that the present state allows, and sets the timer for the next one that time allows."""
        if self._closed or self._paused:
            return
        for model in self._models.values():
            self._retire(model)
            self._grant(model)
            if model.state is State.DRAINING and not model.leases:
                self._unload(model)
        self._start_loads()
        self._set_timer()

    def _grant(self, model: Model) -> None:
        while model.state is State.READY and model.waiters and not model.leases:
            waiter = model.waiters.popleft()
            if not waiter.future.done():
                model.leases += 1
                model.last_used = self._now()
                waiter.granted = True
                waiter.future.set_result(None)

    def _retire(self, model: Model) -> None:
        """Evicts a model that was asked to go, and an idle one that was replaced or whose keep-alive has passed."""
        if model.state is not State.READY or model.pinned:
            return
        expired = self._limits.keep_alive is not None and self._now() - model.last_used >= self._limits.keep_alive
        if model.unwanted:
            self._evict(model, "asked for")
        elif model.stale and not model.in_use:
            self._evict(model, "stale")
        elif expired and not model.in_use:
            self._evict(model, "keep-alive")

    def _start_loads(self) -> None:
        wanted = [m for m in self._models.values() if m.waiters and m.state in {State.ABSENT, State.FAILED}]
        for model in sorted(wanted, key=lambda m: m.waiters[0].since):
            if sum(m.state is State.LOADING for m in self._models.values()) >= self._limits.concurrent_loads:
                return
            # Strictly in the order of arrival: a small model that overtook a large one could starve it.
            if not self._make_room(model):
                return

    def _make_room(self, model: Model) -> bool:
        """Starts the load, or starts what it must wait for; False where later models have to wait behind it."""
        need = self._memory.predict(model.archive)
        if need > self._memory.budget:
            self._fail_waiters(model, self._too_large(model, need))
            return True
        coming = sum(m.reserved for m in self._models.values() if m.state in _LEAVING)
        if model.squeezed and coming:
            return False
        missing = need - self._free()
        if missing <= 0:
            self._load(model, need)
            return True
        if missing > coming:
            victims = choose_victims(missing - coming, self._evictable(), self._now(), self._limits.minimum_stay)
            for victim in victims or []:
                self._evict(self._models[victim.key], "memory")
        return False

    def _free(self) -> int:
        """Bytes for another model: the books', or the device's where that reports less."""
        reserved = sum(m.reserved for m in self._models.values())
        loading = sum(m.reserved for m in self._models.values() if m.state is State.LOADING)
        return min(self._memory.budget - reserved, self._memory.free() - loading)

    def _evictable(self) -> list[Resident]:
        return [
            Resident(key, m.reserved, m.in_use, m.stale, m.ready_since, m.last_used)
            for key, m in self._models.items()
            if m.state is State.READY and not m.pinned
        ]

    def _set_timer(self) -> None:
        """Busy models become evictable, and idle ones expire, by the passing of time alone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._now()
        ready = [m for m in self._models.values() if m.state is State.READY]
        due = [m.ready_since + self._limits.minimum_stay for m in ready]
        if self._limits.keep_alive is not None:
            due += [m.last_used + self._limits.keep_alive for m in ready if not m.in_use]
        later = [time for time in due if time > now]
        if later:
            self._timer = asyncio.get_running_loop().call_at(min(later), self._advance)

    # Effects and their ends

    def _evict(self, model: Model, reason: str) -> None:
        """Admits nothing new; what runs finishes first."""
        model.to(State.DRAINING)
        self._on_event(f"evicted: {reason}", model, 0.0)
        if not model.leases:
            self._unload(model)

    def _load(self, model: Model, need: int) -> None:
        model.to(State.LOADING)
        model.reserved, model.squeezed = need, False
        self._spawn(self._run_load(model))

    def _unload(self, model: Model) -> None:
        model.to(State.UNLOADING)
        self._spawn(self._run_unload(model))

    def _gone(self, model: Model) -> None:
        model.to(State.ABSENT)
        model.reserved, model.unwanted = 0, False
        for future in model.leaving:
            if not future.done():
                future.set_result(None)
        model.leaving.clear()

    def _spawn(self, effect: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(effect)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_load(self, model: Model) -> None:
        began = self._now()
        try:
            size = await self._engine.load(model.archive)
        except OutOfMemory:
            self._on_load_out_of_memory(model)
        except PalimpsestError as error:
            self._on_load_failed(model, error)
        else:
            self._on_load_done(model, size, self._now() - began)

    def _on_load_done(self, model: Model, size: int, seconds: float) -> None:
        model.to(State.READY)
        model.reserved, model.error = size, None
        model.loads += 1
        model.ready_since = model.last_used = self._now()
        self._on_event("loaded", model, seconds)
        self._shrink_to_budget()
        self._advance()

    def _on_load_failed(self, model: Model, error: PalimpsestError) -> None:
        self._gone(model)
        model.state = State.FAILED
        model.error, model.failed_at = error, self._now()
        model.failures += 1
        self._on_event("load failed", model, 0.0)
        self._fail_waiters(model, error)
        self._advance()

    def _on_load_out_of_memory(self, model: Model) -> None:
        """The device had less room than the books said: one idle model goes before the next try, or nobody is left."""
        self._gone(model)
        model.squeezed = True
        self._on_event("load out of memory", model, 0.0)
        idle = sorted((r for r in self._evictable() if not r.in_use), key=lambda r: r.last_used)
        if idle:
            self._evict(self._models[idle[0].key], "out of memory")
        elif not any(m.state in _LEAVING for m in self._models.values()):
            model.squeezed = False
            model.failures += 1
            self._fail_waiters(model, self._nothing_left(model))
        self._advance()

    def _shrink_to_budget(self) -> None:
        """A model may turn out larger than predicted; idle ones then make up for it."""
        excess = sum(m.reserved for m in self._models.values() if m.state not in _LEAVING) - self._memory.budget
        idle = [r for r in self._evictable() if not r.in_use]
        if excess > 0:
            for victim in choose_victims(min(excess, sum(r.size for r in idle)), idle, self._now(), 0) or []:
                self._evict(self._models[victim.key], "memory")

    async def _run_unload(self, model: Model) -> None:
        began = self._now()
        try:
            await self._engine.unload(model.archive)
        except PalimpsestError as error:
            logger.error("%s could not be unloaded cleanly: %s", model.archive.name, error.message)
        self._gone(model)
        self._on_event("unloaded", model, self._now() - began)
        self._forget_old_versions()
        self._advance()

    def _too_large(self, model: Model, need: int) -> OutOfMemory:
        return OutOfMemory(
            f"{model.archive.name!r} needs {need / 2**20:,.0f} MiB and the budget is"
            f" {self._memory.budget / 2**20:,.0f} MiB: raise PALIMPSEST_MEMORY_BUDGET or use a smaller model"
        )

    def _nothing_left(self, model: Model) -> OutOfMemory:
        return OutOfMemory(
            f"the device has no room for {model.archive.name!r}, and nothing idle is left to unload: try again later"
        )

    def _fail_waiters(self, model: Model, error: PalimpsestError) -> None:
        while model.waiters:
            waiter = model.waiters.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(error)

    def _forget_old_versions(self) -> None:
        gone = {State.ABSENT, State.FAILED}
        for key in [k for k, m in self._models.items() if m.stale and m.state in gone and not m.in_use]:
            del self._models[key]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _shutting_down() -> ModelNotReady:
    return ModelNotReady("the server is shutting down", retry_after=5)
