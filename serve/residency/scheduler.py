"""Who is in memory and whose turn it is: the one owner of every model's state.

Every decision is made in `_advance`, synchronously and without I/O: it takes all steps that the present state allows.
Whatever changes the state calls it: a request that comes or goes, a load or unload that ends, news of the engine, and
a timer where time alone allows a step.

scheduler (requests, leases) ─┬─► versions (what is remembered)
                              └─► places (loads, evictions) ──► accounting, policy, effects;  all know: model
"""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve.errors import EngineUnavailable, ModelNotReady, PalimpsestError, QueueFull
from serve.residency.accounting import Memory
from serve.residency.effects import Engine
from serve.residency.events import Event, What
from serve.residency.limits import SchedulerLimits
from serve.residency.model import IN_MEMORY, Model, Reason, State, Waiter, send_to_the_end
from serve.residency.places import Places
from serve.residency.policy import heat_after
from serve.residency.standby import Standby
from serve.residency.versions import Versions
from serve.store.catalog import Archive

__all__ = ["Engine", "Memory", "Model", "Scheduler", "SchedulerLimits", "State"]


class Scheduler:
    """Grants leases. A leased model is never unloaded unless its worker is already gone.

    on_event: told of everything worth counting; it must neither raise nor call the scheduler. standby: read only.
    """

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        limits: SchedulerLimits = SchedulerLimits(),  # noqa: B008 - frozen
        on_event: Callable[[Event], None] = lambda event: None,
        standby: Standby = Standby(),  # noqa: B008 - there is none
    ) -> None:
        self._limits, self._on_event, self.standby = limits, on_event, standby
        self._versions = Versions()
        self._models, self._active = self._versions.all, self._versions.active
        self._places = Places(engine, memory, limits, self._active, standby, on_event, self._advance)
        self._turns, self._requests = itertools.count(), itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._released = asyncio.Event()
        self._paused = False
        self._closed = False

    # What the gateway calls

    @asynccontextmanager
    async def lease(self, archive: Archive, wait: float | None = None, client: str = "") -> AsyncIterator[Model]:
        """Inside this context the model is loaded and one request may use it: a worker serves one at a time.

        client: whose request it is: clients are served in turn, however many requests each has; empty: nobody's. Raises
        QueueFull, mostly at once; OutOfMemory at once where it can never fit, ModelNotReady after `wait` seconds (the
        load goes on), or what the load raised.
        """
        model = self._register(archive)
        model.requests += 1
        if self._limits.eviction == "lrfu":
            model.heat = heat_after(model.heat, next(self._requests))
        model.hits += model.state is State.READY
        began = _now()
        await self._wait_for_lease(model, self._limits.wait if wait is None else wait, client)
        granted = _now()
        try:
            self._on_event(Event(What.QUEUE_WAIT, model, granted - began))
            yield model
        finally:
            model.took(_now() - granted)
            self._release(model, client)

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
        models = [m for m in self._active.values() if m.archive.name == name and m.state in IN_MEMORY]
        if not models:
            raise KeyError(name)
        gone = [asyncio.get_running_loop().create_future() for _ in models]
        for model, future in zip(models, gone, strict=True):
            model.pinned, model.unwanted = False, Reason.ASKED_FOR
            model.leaving.append(future)
        self._advance()
        await asyncio.gather(*gone)

    def pin(self, archive: Archive, pinned: bool) -> None:
        """A pinned model is never evicted."""
        self._register(archive).pinned = pinned
        self._advance()

    def models(self) -> list[Model]:
        """Every model that is remembered; read only."""
        return list(self._models.values())

    def active(self) -> list[Model]:
        """The models in memory or in use; read only."""
        return [m for m in self._active.values() if m.active]

    def get(self, archive: Archive) -> Model | None:
        """The archive's model, if it is remembered; read only."""
        return self._models.get(archive.engine_name)

    def is_ready(self, archive: Archive) -> bool:
        """Whether a request finds this version loaded."""
        model = self._models.get(archive.engine_name)
        return model is not None and model.state is State.READY

    # What the supervisor calls

    def on_worker_lost(self, engine_name: str) -> None:
        """The model's worker died: its leases end with the error that their holders see, the queue stays."""
        model = self._models.get(engine_name)
        if model is not None and not self._closed:
            self._places.lose_worker(model)
            self._advance()

    def on_footprint(self, engine_name: str, size: int) -> None:
        """The model was measured while it worked: it has grown, or shrunk, since its load."""
        model = self._models.get(engine_name)
        if model is not None:
            self._places.take_measure(model, size)
            self._advance()

    def on_standby(self) -> None:
        """The standby worker has gone, or there can be one now."""
        if not self._closed:
            self._advance()

    def on_engine_lost(self) -> None:
        """TorchServe itself is gone, and all workers with it: nothing is in memory, nothing can be loaded."""
        self._paused = True
        self._places.lose_all()

    def on_engine_ready(self) -> None:
        """TorchServe is back: what waits is loaded again, and what failed under the old one may be tried at once."""
        self._paused = False
        for model in self._models.values():
            model.rests_until = 0.0
            if model.state is State.FAILED:
                model.to(State.ABSENT)
        self._advance()

    async def close(self, timeout: float) -> None:
        """Lets running requests finish for up to `timeout` seconds; waiting ones get ModelNotReady."""
        self._closed = True
        for model in self._active.values():
            model.fail_waiters(_shutting_down())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while any(m.leases for m in self._active.values()):
                    self._released.clear()
                    await self._released.wait()
        if self._timer is not None:
            self._timer.cancel()
        await self._places.close()
        for future in [f for m in self._active.values() for f in m.leaving if not f.done()]:
            future.set_exception(_shutting_down())

    # Turns

    def _register(self, archive: Archive) -> Model:
        """The archive's model. The version of a name that was asked for last is the one that stays."""
        model, is_new = self._versions.register(archive)
        if is_new:
            self._advance()
            self._active[archive.engine_name] = model  # which nothing asks for yet
            self._versions.forget_oldest()
        return model

    async def _wait_for_lease(self, model: Model, wait: float, client: str) -> None:
        self._check_admission(model, client)
        if model.state is State.READY and not model.in_use and self._places.works_within(model):
            self._begin(model)  # nobody else can have a claim, so nothing need be looked at
            return
        waiter = Waiter(asyncio.get_running_loop().create_future(), _now(), next(self._turns), client)
        model.waiters.append(waiter)
        try:
            self._advance()
            async with asyncio.timeout(wait):
                error = await waiter.outcome
        except TimeoutError:
            self._withdraw(model, waiter)
            if self._paused or isinstance(model.error, EngineUnavailable):
                raise EngineUnavailable("TorchServe is being started again: try again in a few seconds") from None
            raise ModelNotReady(
                f"{model.archive.name!r} is {model.state.value}: no place or turn for this request within {wait:g} s",
                retry_after=5,
            ) from None
        except BaseException:
            self._withdraw(model, waiter)
            raise
        if error is not None:
            raise _afresh(error)

    def _check_admission(self, model: Model, client: str) -> None:
        if self._closed:
            raise _shutting_down()
        if model.state is State.READY and not model.in_use:
            return
        if model.state is State.FAILED and model.error and _now() < model.failed_at + self._limits.failure_pause:
            raise _afresh(model.error)
        if too_large := self._places.refusal(model):
            raise too_large
        everywhere = [m for m in self._active.values() if m.waiters]
        if len(model.waiters) >= self._limits.queue_per_model:
            self._make_room([model], client)
        if sum(len(m.waiters) for m in everywhere) >= self._limits.queue_total:
            self._make_room(everywhere, client)

    def _make_room(self, models: list[Model], client: str) -> None:
        """Refuses the newest request of whoever has most in these full queues; if the client has as many, its own."""
        counts = Counter(waiter.client for m in models for waiter in m.waiters)
        crowd, most = counts.most_common(1)[0]
        if counts[client] >= most:
            raise _queue_full()
        theirs = [(waiter.since, m, waiter) for m in models for waiter in m.waiters if waiter.client == crowd]
        _, model, waiter = max(reversed(theirs), key=lambda each: each[0])
        model.waiters.remove(waiter)
        if not waiter.outcome.done():
            waiter.settle(_queue_full())

    def _grant_turns(self, active: list[Model]) -> None:
        """Grants leases, to clients in turn; a request that needs more memory does not overtake another such."""
        behind = False
        for model in sorted((m for m in active if m.waits_for_turn), key=lambda m: m.in_line_since):
            if self._places.works_within(model) or not (behind or (behind := not self._places.may_work(model))):
                self._grant(model)

    def _grant(self, model: Model) -> None:
        while model.waits_for_turn:
            waiter = model.take_next()
            if not waiter.outcome.done():
                self._begin(model)
                waiter.settle(None)

    def _begin(self, model: Model) -> None:
        model.leases += 1
        self._places.begin_work(model)
        model.last_used = _now()

    def _withdraw(self, model: Model, waiter: Waiter) -> None:
        if waiter.granted:
            self._release(model, waiter.client)  # granted in the very moment in which it gave up
            return
        with contextlib.suppress(ValueError):
            model.waiters.remove(waiter)
        self._advance()

    def _release(self, model: Model, client: str) -> None:
        model.leases -= 1
        model.serve_others_first(client, next(self._turns))
        if model.reserved > model.resting:
            send_to_the_end({client}, self._active.values(), _now())
        self._places.end_work(model)
        model.last_used = _now()
        self._released.set()
        self._advance()

    # Steps

    def _advance(self) -> None:
        """Takes every step that the present state allows, and sets the timer for the next one that time allows."""
        self._versions.drop_inactive()
        if self._closed or self._paused:
            return
        active = [m for m in self._active.values() if m.waiters or m.state in IN_MEMORY]
        self._places.clear(active)
        self._grant_turns(active)
        self._places.fill(active)
        self._places.stand_by(active)
        self._set_timer(self._places.next_step(active))

    def _set_timer(self, when: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when is None else asyncio.get_running_loop().call_at(when, self._advance)


def _queue_full() -> QueueFull:
    return QueueFull(
        "too many requests wait, and of nobody more than of you: send fewer at a time, or this one again later",
        retry_after=2,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()


def _afresh(error: PalimpsestError) -> PalimpsestError:
    """Several requests raise the same error: without this its traceback would grow with each, and keep them alive."""
    return error.with_traceback(None)


def _shutting_down() -> ModelNotReady:
    return ModelNotReady("the server is shutting down", retry_after=5)
