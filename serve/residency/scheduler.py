"""Who is in memory: the one owner of every model's state.

Every decision is made in `_advance`, synchronously and without I/O: it takes all steps that the present state allows.
Whatever changes the state calls it: a request that comes or goes, a load or unload that ends, news of the engine, and
a timer where time alone allows a step.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from serve.errors import ModelLoadFailed, ModelNotReady, OutOfMemory, PalimpsestError, QueueFull
from serve.residency.catalog import Archive
from serve.residency.model import IN_MEMORY, LEAVING, Model, State, Waiter
from serve.residency.policy import Resident, choose_victims

__all__ = ["Engine", "Limits", "Memory", "Model", "Scheduler", "State"]

logger = logging.getLogger(__name__)

# Memory that others hold comes back without anyone telling: look again after so many seconds.
_LOOK_AGAIN = 0.5


class Engine(Protocol):
    """The effects that residency needs. Errors are PalimpsestErrors; cancelling leaves nothing running."""

    async def load(self, archive: Archive) -> int:
        """Starts the model and returns the bytes that it takes; OutOfMemory or ModelLoadFailed leave nothing behind."""

    async def unload(self, archive: Archive) -> None:
        """Returns once the worker is gone and the device reports its memory back, or after a bound."""


class Memory(Protocol):
    """The device and what is known of each model's size, in bytes. Both calls must be quick and not raise."""

    budget: int

    def free(self) -> int:
        """What the device reports as free, at this moment."""

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
        self._timer: asyncio.TimerHandle | None = None
        self._released = asyncio.Event()
        self._paused = False
        self._closed = False

    # What the gateway calls

    @asynccontextmanager
    async def lease(self, archive: Archive, wait: float | None = None) -> AsyncIterator[Model]:
        """Inside this context the model is loaded and one request may use it: a worker serves one at a time.

        Raises QueueFull at once, OutOfMemory at once where it can never fit, ModelNotReady after `wait` seconds (the
        load goes on), or what the load raised.
        """
        model = self._register(archive)
        model.requests += 1
        model.hits += model.state is State.READY
        began = self._now()
        await self._wait_for_lease(model, self._limits.wait if wait is None else wait)
        try:
            self._on_event("queue_wait", model, self._now() - began)
            yield model
        finally:
            self._release(model)

    async def load(self, archive: Archive, wait: float | None = None) -> None:
        """Returns once the model is ready; raises as lease."""
        if self._register(archive).state is not State.READY:
            async with self.lease(archive, wait):
                pass

    async def unload(self, name: str) -> None:
        """Drains and unloads every version of the model; returns when its memory is back. KeyError: not in memory.

        Requests that wait for it have it loaded again.
        """
        if self._closed:
            raise _shutting_down()
        models = [m for m in self._models.values() if m.archive.name == name and m.state in IN_MEMORY]
        if not models:
            raise KeyError(name)
        gone = [asyncio.get_running_loop().create_future() for _ in models]
        for model, future in zip(models, gone, strict=True):
            model.pinned, model.unwanted = False, "asked for"
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
        if model is None or self._closed:
            return
        if model.state is State.LOADING:
            model.unwanted = "worker lost"  # it died between its last word and our hearing it
        elif model.state in {State.READY, State.PARKED, State.DRAINING}:
            self._on_event("evicted: worker lost", model, 0.0)
            self._unload(model)
            self._advance()

    def on_footprint(self, engine_name: str, size: int) -> None:
        """The model was measured while it worked: it has grown, or shrunk, since its load."""
        model = self._models.get(engine_name)
        if model is not None and model.state is State.READY:
            model.reserved = size
            self._advance()

    def on_engine_lost(self) -> None:
        """TorchServe itself is gone, and all workers with it: nothing is in memory, nothing can be loaded."""
        self._paused = True
        self._cancel_effects()
        for model in self._models.values():
            if model.state in IN_MEMORY:
                model.leave_memory()

    def on_engine_ready(self) -> None:
        """TorchServe is back: what waits is loaded again, and what failed under the old one may be tried at once."""
        self._paused = False
        for model in self._models.values():
            if model.state is State.FAILED:
                model.to(State.ABSENT)
        self._advance()

    async def close(self, timeout: float) -> None:
        """Lets running requests finish for up to `timeout` seconds; waiting ones get ModelNotReady."""
        self._closed = True
        for model in self._models.values():
            model.fail_waiters(_shutting_down())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while any(m.leases for m in self._models.values()):
                    self._released.clear()
                    await self._released.wait()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._cancel_effects(), return_exceptions=True)
        for future in [f for m in self._models.values() for f in m.leaving if not f.done()]:
            future.set_exception(_shutting_down())

    # Requests

    def _register(self, archive: Archive) -> Model:
        """The archive's model. The version of a name that was asked for last is the one that stays."""
        model = self._models.get(archive.engine_name)
        if model is None or model.stale:
            model = self._models.setdefault(archive.engine_name, Model(archive))
            model.stale = False
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
        try:
            self._advance()
            async with asyncio.timeout(wait):
                error = await waiter.outcome
        except TimeoutError:
            self._withdraw(model, waiter)
            raise ModelNotReady(
                f"{model.archive.name!r} is {model.state.value}: no place or turn for this request within {wait:g} s",
                retry_after=5,
            ) from None
        except BaseException:
            self._withdraw(model, waiter)
            raise
        if error is not None:
            raise _afresh(error)

    def _check_admission(self, model: Model) -> None:
        if self._closed:
            raise _shutting_down()
        if model.state is State.READY and not model.in_use:
            return
        if model.state is State.FAILED and model.error and self._now() < model.failed_at + self._limits.failure_pause:
            raise _afresh(model.error)
        if model.state in {State.ABSENT, State.FAILED} and (too_large := self._never_fits(model)):
            raise too_large
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
        self._shrink_to_budget()
        self._start_loads()
        self._set_timer()

    def _retire(self, model: Model) -> None:
        if model.state is State.READY and (reason := self._reason_to_leave(model)):
            self._evict(model, reason)
        elif model.state is State.DRAINING and not model.leases:
            self._unload(model)

    def _reason_to_leave(self, model: Model) -> str:
        if model.unwanted:
            return model.unwanted
        if model.in_use or model.pinned:
            return ""
        if model.stale:
            return "stale"
        keep_alive = self._limits.keep_alive
        return "keep-alive" if keep_alive is not None and self._now() >= model.last_used + keep_alive else ""

    def _grant(self, model: Model) -> None:
        while model.state is State.READY and model.waiters and not model.leases:
            waiter = model.waiters.popleft()
            if not waiter.outcome.done():
                model.leases += 1
                model.last_used = self._now()
                waiter.settle(None)

    def _start_loads(self) -> None:
        """Strictly in the order of arrival: a small model that overtook a large one could starve it."""
        wanted = [m for m in self._models.values() if m.waits_for_place]
        slots = self._limits.concurrent_loads - sum(m.state is State.LOADING for m in self._models.values())
        for model in sorted(wanted, key=lambda m: m.in_line_since):
            if slots <= 0 or not self._serve_first(model):
                return
            slots -= model.state is State.LOADING

    def _serve_first(self, model: Model) -> bool:
        """Loads the model or makes room for it; False where those behind it have to wait, too."""
        if too_large := self._never_fits(model):
            model.fail_waiters(too_large)
            return True
        need = self._memory.predict(model.archive)
        coming = self._reserved(m for m in self._models.values() if m.state in LEAVING)
        missing = self._missing(need)
        if missing <= 0 and not (model.squeezed and coming):
            self._load(model, need)
            return True
        self._evict_all(choose_victims(missing - coming, self._evictable(), self._now(), self._limits.minimum_stay))
        # Where others hold the device's memory, nothing here can hurry it: let smaller ones pass meanwhile.
        return missing > self._reserved(m for m in self._models.values() if not _stays(m))

    def _missing(self, need: int) -> int:
        """Bytes short of `need` in the books, or on the device where that has less; none short: 0 or less."""
        missing = need - (self._memory.budget - self._reserved(self._models.values()))
        if missing > 0:
            return missing
        loading = self._reserved(m for m in self._models.values() if m.state is State.LOADING)
        return need - (self._memory.free() - loading)

    def _never_fits(self, model: Model) -> OutOfMemory | None:
        """The refusal of a model for which all that may be unloaded would not make room."""
        need, budget = self._memory.predict(model.archive), self._memory.budget
        pinned = self._reserved(m for m in self._models.values() if _stays(m))
        return _too_large(model, need, budget, pinned) if need > budget - pinned else None

    def _shrink_to_budget(self) -> None:
        """A model may turn out larger than predicted; idle ones then make up for it."""
        excess = self._reserved(m for m in self._models.values() if m.state not in LEAVING) - self._memory.budget
        if excess > 0:
            idle = [r for r in self._evictable() if not r.in_use]
            self._evict_all(choose_victims(min(excess, sum(r.size for r in idle)), idle, self._now(), 0))

    def _evictable(self) -> list[Resident]:
        return [
            Resident(key, m.reserved, m.in_use, m.stale, m.ready_since, m.last_used)
            for key, m in self._models.items()
            if m.state is State.READY and not m.pinned
        ]

    def _evict_all(self, victims: list[Resident] | None, reason: str = "memory") -> None:
        for victim in victims or []:
            self._evict(self._models[victim.key], reason)

    def _reserved(self, models: Iterable[Model]) -> int:
        return sum(m.reserved for m in models)

    def _set_timer(self) -> None:
        """For the steps that time alone allows: busy models become evictable, idle ones expire, the device frees."""
        now, due = self._now(), list[float]()
        ready = [m for m in self._models.values() if m.state is State.READY and not m.pinned]
        if any(m.waits_for_place for m in self._models.values()):
            due += [m.ready_since + self._limits.minimum_stay for m in ready]
            if not any(m.effect for m in self._models.values()):
                due.append(now + _LOOK_AGAIN)
        if self._limits.keep_alive is not None:
            due += [m.last_used + self._limits.keep_alive for m in ready if not m.in_use]
        if self._timer is not None:
            self._timer.cancel()
        when = min((time for time in due if time > now), default=None)
        self._timer = None if when is None else asyncio.get_running_loop().call_at(when, self._advance)

    # Effects and their ends

    def _evict(self, model: Model, reason: str) -> None:
        """Admits nothing new; what runs finishes first."""
        model.to(State.DRAINING)
        model.evicted_at = self._now()
        self._on_event(f"evicted: {reason}", model, 0.0)
        if not model.leases:
            self._unload(model)

    def _load(self, model: Model, need: int) -> None:
        model.to(State.LOADING)
        model.reserved = need
        self._start(model, self._run_load(model))

    def _unload(self, model: Model) -> None:
        model.to(State.UNLOADING)
        self._start(model, self._run_unload(model))

    def _start(self, model: Model, effect: Coroutine[Any, Any, None]) -> None:
        model.effect = asyncio.create_task(effect)
        model.effect.add_done_callback(partial(self._on_effect_end, model))

    def _cancel_effects(self) -> list[asyncio.Task[None]]:
        effects = [m.effect for m in self._models.values() if m.effect is not None]
        for effect in effects:
            effect.cancel()
        return effects

    def _on_effect_end(self, model: Model, effect: asyncio.Task[None]) -> None:
        if model.effect is effect:  # an unload may have begun in the moment in which its load ended
            model.effect = None
        if not effect.cancelled() and (bug := effect.exception()):
            logger.error("%s: residency failed", model.archive.name, exc_info=bug)
        self._forget_old_versions()
        self._advance()

    async def _run_load(self, model: Model) -> None:
        began = self._now()
        size, error = 0, None
        try:
            size = await self._engine.load(model.archive)
        except PalimpsestError as expected:
            error = expected
        except Exception:
            logger.exception("%s could not be loaded", model.archive.name)
            error = ModelLoadFailed(f"{model.archive.name!r} cannot be loaded: an internal error, see the log")
        if model.state is not State.LOADING:
            return  # the engine was lost meanwhile
        if error is None:
            self._on_load_done(model, size, self._now() - began)
        elif isinstance(error, OutOfMemory):
            self._on_load_out_of_memory(model)
        else:
            self._on_load_failed(model, error)

    def _on_load_done(self, model: Model, size: int, seconds: float) -> None:
        model.to(State.READY)
        model.reserved, model.error = size, None
        model.loads += 1
        model.ready_since = model.last_used = self._now()
        self._on_event("loaded", model, seconds)

    def _on_load_failed(self, model: Model, error: PalimpsestError) -> None:
        model.leave_memory(State.FAILED)
        model.error, model.failed_at = error, self._now()
        model.failures += 1
        model.fail_waiters(error)
        self._on_event("load failed", model, 0.0)

    def _on_load_out_of_memory(self, model: Model) -> None:
        """The device had less room than the books said: one idle model goes before the next try, or nobody is left."""
        self._on_event("load out of memory", model, 0.0)
        idle = [r for r in self._evictable() if not r.in_use]
        if not idle and not any(m.state in LEAVING for m in self._models.values()):
            self._on_load_failed(model, _nothing_left(model))
            return
        model.leave_memory()
        if model.waiters:
            model.squeezed = True
            self._evict_all(choose_victims(1, idle, self._now(), 0), "out of memory")

    async def _run_unload(self, model: Model) -> None:
        began = self._now()
        try:
            await self._engine.unload(model.archive)
        except PalimpsestError as error:
            logger.error("%s could not be unloaded cleanly: %s", model.archive.name, error.message)
        except Exception:
            logger.exception("%s could not be unloaded cleanly", model.archive.name)
        if model.state is State.UNLOADING:
            model.leave_memory()
            self._on_event("unloaded", model, self._now() - began)

    def _forget_old_versions(self) -> None:
        gone = {State.ABSENT, State.FAILED}
        old = [k for k, m in self._models.items() if m.stale and m.state in gone and not m.in_use and not m.effect]
        for key in old:
            del self._models[key]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _stays(model: Model) -> bool:
    """Whether eviction cannot get the model's bytes back."""
    return model.pinned and model.state not in LEAVING


def _afresh(error: PalimpsestError) -> PalimpsestError:
    """Several requests raise the same error: without this its traceback would grow with each, and keep them alive."""
    return error.with_traceback(None)


def _too_large(model: Model, need: int, budget: int, pinned: int) -> OutOfMemory:
    held = f", of which pinned models hold {_mib(pinned)}" if pinned else ""
    return OutOfMemory(
        f"{model.archive.name!r} needs {_mib(need)} and the budget is {_mib(budget)}{held}:"
        " raise PALIMPSEST_MEMORY_BUDGET or use a smaller model"
    )


def _nothing_left(model: Model) -> OutOfMemory:
    return OutOfMemory(
        f"the device has no room for {model.archive.name!r}, and nothing idle is left to unload: try again later"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _shutting_down() -> ModelNotReady:
    return ModelNotReady("the server is shutting down", retry_after=5)
