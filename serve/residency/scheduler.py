"""Who is in memory: the one owner of every model's state.

Every decision is made in `_advance`, synchronously and without I/O: it takes all steps that the present state allows.
Whatever changes the state calls it: a request that comes or goes, a load or unload that ends, news of the engine, and
a timer where time alone allows a step. Four modules help: model (one model's state and queue), books (sums of bytes),
policy (who must go), effects (loads and unloads that run).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from serve.errors import ModelNotReady, OutOfMemory, PalimpsestError, QueueFull
from serve.residency.books import Books, Memory
from serve.residency.catalog import Archive
from serve.residency.effects import Effects, Engine
from serve.residency.model import IN_MEMORY, Model, State, Waiter
from serve.residency.policy import Resident, choose_victims

__all__ = ["Engine", "Limits", "Memory", "Model", "Scheduler", "State"]

# Memory that others hold comes back without anyone telling: look again after so many seconds.
_LOOK_AGAIN = 0.5


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

    on_event: told of everything worth counting, as (name of the event, model, seconds that it took); it must
    neither raise nor call the scheduler.
    """

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        limits: Limits = Limits(),
        on_event: Callable[[str, Model, float], None] = lambda event, model, seconds: None,
    ) -> None:
        self._memory, self._limits, self._on_event = memory, limits, on_event
        self._models: dict[str, Model] = {}
        self._books = Books(memory, self._models)
        self._effects = Effects(engine, self._on_loaded, self._on_unloaded, self._on_effect_end)
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
        elif model.state in (State.READY, State.PARKED, State.DRAINING):
            self._on_event("evicted: worker lost", model, 0.0)
            self._effects.unload(model)
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
        self._effects.cancel()
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
        await asyncio.gather(*self._effects.cancel(), return_exceptions=True)
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
        if model.state not in IN_MEMORY and (too_large := self._books.refusal(model.archive)):
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
        active = [m for m in self._models.values() if m.waiters or m.state in IN_MEMORY]
        for model in active:
            self._retire(model)
            self._grant(model)
        self._shrink_to_budget()
        self._start_loads(active)
        self._set_timer(active)

    def _retire(self, model: Model) -> None:
        if model.state is State.READY and (reason := self._reason_to_leave(model)):
            self._drain(model, reason)
        elif model.state is State.DRAINING and not model.leases:
            self._effects.unload(model)

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

    def _start_loads(self, active: list[Model]) -> None:
        """Strictly in line: a small model that overtook a large one could starve it."""
        slots = self._limits.concurrent_loads - sum(m.state is State.LOADING for m in active)
        for model in sorted((m for m in active if m.waits_for_place), key=lambda m: m.in_line_since):
            if slots <= 0 or not self._serve_first(model):
                return
            slots -= model.state is State.LOADING

    def _serve_first(self, model: Model) -> bool:
        """Loads the model or makes room for it; False where those behind it have to wait, too."""
        if too_large := self._books.refusal(model.archive):
            model.fail_waiters(too_large)
            return True
        need, coming = self._memory.predict(model.archive), self._books.coming()
        missing = self._books.missing(need)
        if missing <= 0 and not (model.squeezed and coming):
            model.reserved = need
            self._effects.load(model)
            return True
        evictable = self._books.evictable()
        self._evict(choose_victims(missing - coming, evictable, self._now(), self._limits.minimum_stay), "memory")
        # Where others hold the device's memory, nothing here can hurry it: let smaller ones pass meanwhile.
        return missing > self._books.obtainable()

    def _shrink_to_budget(self) -> None:
        """A model may turn out larger than predicted; idle ones then make up for it."""
        excess = self._books.excess()
        if excess > 0:
            idle = self._books.idle()
            self._evict(choose_victims(min(excess, sum(r.size for r in idle)), idle, self._now(), 0), "memory")

    def _evict(self, victims: list[Resident] | None, reason: str) -> None:
        for victim in victims or []:
            self._drain(self._models[victim.key], reason)

    def _drain(self, model: Model, reason: str) -> None:
        """Admits nothing new; what runs finishes first."""
        model.to(State.DRAINING)
        model.evicted_at = self._now()
        self._on_event(f"evicted: {reason}", model, 0.0)
        if not model.leases:
            self._effects.unload(model)

    def _set_timer(self, active: list[Model]) -> None:
        """For the steps that time alone allows: busy models become evictable, idle ones expire, the device frees."""
        now, due = self._now(), list[float]()
        ready = [m for m in active if m.state is State.READY and not m.pinned]
        slots = self._limits.concurrent_loads - sum(m.state is State.LOADING for m in active)
        if slots > 0 and any(m.waits_for_place for m in active):
            due += [now + _LOOK_AGAIN, *(m.ready_since + self._limits.minimum_stay for m in ready)]
        if self._limits.keep_alive is not None:
            due += [m.last_used + self._limits.keep_alive for m in ready if not m.in_use]
        if self._timer is not None:
            self._timer.cancel()
        when = min((time for time in due if time > now), default=None)
        self._timer = None if when is None else asyncio.get_running_loop().call_at(when, self._advance)

    # Ends of loads and unloads

    def _on_loaded(self, model: Model, outcome: int | PalimpsestError, seconds: float) -> None:
        if isinstance(outcome, OutOfMemory):
            self._on_load_out_of_memory(model)
        elif isinstance(outcome, PalimpsestError):
            self._on_load_failed(model, outcome)
        else:
            model.to(State.READY)
            model.reserved, model.error = outcome, None
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
        idle = self._books.idle()
        if not idle and not self._books.coming():
            self._on_load_failed(model, _nothing_left(model))
            return
        model.leave_memory()
        if model.waiters:
            model.squeezed = True
            self._evict(choose_victims(1, idle, self._now(), 0), "out of memory")

    def _on_unloaded(self, model: Model, seconds: float) -> None:
        model.leave_memory()
        self._on_event("unloaded", model, seconds)

    def _on_effect_end(self) -> None:
        self._forget_old_versions()
        self._advance()

    def _forget_old_versions(self) -> None:
        """An old version stays in the list while anything of it is in use."""
        for key, model in list(self._models.items()):
            if model.stale and model.state not in IN_MEMORY and not model.in_use and not model.effect:
                del self._models[key]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _afresh(error: PalimpsestError) -> PalimpsestError:
    """Several requests raise the same error: without this its traceback would grow with each, and keep them alive."""
    return error.with_traceback(None)


def _nothing_left(model: Model) -> OutOfMemory:
    return OutOfMemory(
        f"the device has no room for {model.archive.name!r}, and nothing idle is left to unload: try again later"
    )


def _shutting_down() -> ModelNotReady:
    return ModelNotReady("the server is shutting down", retry_after=5)
