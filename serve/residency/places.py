"""Who gets a place in memory and who gives one up: starts loads, wakings, parkings, suspensions and unloads, and takes
note of how they end.

Three modules help: accounting (sums of bytes), policy (who must go), effects (what runs).
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from serve.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    ModelLoadFailed,
    OutOfMemory,
    PalimpsestError,
    WorkerDied,
)
from serve.residency.accounting import Accounting, Memory
from serve.residency.effects import Effects, Engine
from serve.residency.events import Event, What
from serve.residency.limits import SchedulerLimits
from serve.residency.model import (
    AWAY,
    IN_MEMORY,
    LEAVING,
    STARTING,
    Arrived,
    Model,
    Reason,
    State,
    Taken,
    send_to_the_end,
)
from serve.residency.policy import Resident, choose_victims
from serve.residency.standby import Standby

logger = logging.getLogger(__name__)

# While a model waits for a place, look again after so many seconds: the minimum stay of others passes, and memory that
# strangers hold comes back, without anyone telling.
_LOOK_AGAIN = 0.5
# How long a model that was measured and found larger than the whole budget is refused without another look: what was
# measured may have been a bad moment.
_REFUSAL_STANDS = 600.0


class Places:
    """models: those in memory or in use, as they change. on_change: called when an effect has ended."""

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        limits: SchedulerLimits,
        models: Mapping[str, Model],
        standby: Standby,
        on_event: Callable[[Event], None],
        on_change: Callable[[], None],
    ) -> None:
        self._memory, self._limits, self._models, self._on_event = memory, limits, models, on_event
        self._standby, self._standby_is_due = standby, True
        self._accounting = Accounting(memory, models, standby)
        self._effects = Effects(engine, self, on_change)

    def clear(self, active: Sequence[Model]) -> None:
        """Models leave that have a reason of their own to."""
        for model in active:
            if model.state in (State.READY, *AWAY) and (reason := self._reason_to_leave(model)):
                self._drain(model, reason, None)
            elif model.state in (State.DRAINING, State.SUSPENDING):
                self._leave(model)
        self._shrink_to_budget()

    def fill(self, active: Sequence[Model]) -> None:
        """Models that requests wait for are loaded, or others leave so that they can be.

        Strictly in line: a small model that overtook a large one could starve it.
        """
        slots, now = self._free_slots(active), _now()
        line = [m for m in active if m.waits_for_place and m.rests_until <= now]
        for model in sorted(line, key=lambda m: m.in_line_since):
            if slots <= 0 or not self._serve_first(model):
                break
            slots -= model.state in STARTING
        # Only now: a pinned model that has just begun to load leaves less for the others.
        for model in active:
            if model.waits_for_place and (error := self.refusal(model)):
                model.fail_waiters(error)

    def stand_by(self, active: Sequence[Model]) -> None:
        """Makes a worker ready for the next load once loads and unloads are over, where there is room for it."""
        busy = self._standby.held or any(m.effect or m.waits_for_place for m in active)
        if self._standby_is_due and not busy and self._accounting.room() >= self._standby.size > 0:
            self._standby_is_due = False
            self._standby.prepare()

    def refusal(self, model: Model) -> OutOfMemory | None:
        """Why the model cannot be loaded, whatever leaves; None: it can, or need not, or that is yet to be seen."""
        if model.state in IN_MEMORY:
            return None
        need = 1 if self._is_open(model) else self._memory.predict(model.archive)
        return self._accounting.refusal(model) if need > self._accounting.largest(model) else None

    def works_within(self, model: Model) -> bool:
        """Whether the model's next request is expected to take no more memory than is held for the model anyway."""
        return self._memory.predict_peak(model.archive) <= model.reserved

    def may_work(self, model: Model) -> bool:
        """Whether a request that takes more than that may begin.

        Idle models leave for it, and what others will soon give back is waited for. A request that needs more than can
        be had runs all the same, with as little beside it as may be: what it really takes, it will show.
        """
        missing = self._memory.predict_peak(model.archive) - model.reserved - self._accounting.room()
        if missing <= 0:
            return True
        self._evict_idle(missing - self._accounting.coming())
        return not self._accounting.coming() and not self._accounting.at_work()

    def begin_work(self, model: Model) -> None:
        model.reserved = max(model.reserved, self._memory.predict_peak(model.archive))

    def end_work(self, model: Model) -> None:
        if not model.leases and model.state in (State.READY, State.DRAINING):
            model.reserved = model.resting

    def take_measure(self, model: Model, size: int) -> None:
        """The model was seen to take so much between two requests; the next may have begun."""
        if model.state in (State.READY, State.DRAINING):
            model.hold(size)
            if model.leases:
                self.begin_work(model)

    def next_step(self, active: Sequence[Model]) -> float | None:
        """When time alone may allow a step."""
        due = list[float]()
        if self._free_slots(active) > 0 and any(m.waits_for_place for m in active):
            due.append(_now() + _LOOK_AGAIN)
        if self._limits.keep_alive is not None:
            idle = (m for m in active if m.state in (State.READY, *AWAY) and not m.in_use and not m.pinned)
            due += [m.last_used + self._limits.keep_alive for m in idle]
        return min(due, default=None)

    def lose_worker(self, model: Model) -> None:
        """The model's worker is gone: what is left of it is cleared away, though leases may not have ended yet."""
        if model.state in (State.PARKING, State.SUSPENDING, *STARTING):
            model.unwanted = Reason.WORKER_LOST  # what runs hears of it, too
        elif model.state in (State.READY, State.DRAINING, *AWAY):
            self._on_event(Event(What.EVICTED, model, reason=Reason.WORKER_LOST))
            self._effects.unload(model)

    def lose_all(self) -> None:
        """All workers are gone."""
        self._effects.cancel()
        self._standby_is_due = True
        for model in self._models.values():
            if model.state in IN_MEMORY:
                model.leave_memory()

    async def close(self) -> None:
        """Ends what runs."""
        await asyncio.gather(*self._effects.cancel(), return_exceptions=True)

    # Room

    def _reason_to_leave(self, model: Model) -> Reason | None:
        if model.unwanted:
            return model.unwanted
        if model.in_use or model.pinned:
            return None
        if model.stale:
            return Reason.STALE
        keep_alive = self._limits.keep_alive
        return Reason.KEEP_ALIVE if keep_alive is not None and _now() >= model.last_used + keep_alive else None

    def _free_slots(self, active: Sequence[Model]) -> int:
        return self._limits.concurrent_loads - sum(m.state in STARTING for m in active)

    def _is_open(self, model: Model) -> bool:
        """Whether the model's size is still to be seen: never measured, or larger than all there is, and long ago."""
        if not self._memory.is_measured(model.archive):
            return True
        if self._memory.predict(model.archive) <= self._memory.budget:
            return False
        if model.refused_at is None:
            model.refused_at = _now()
        return _now() >= model.refused_at + _REFUSAL_STANDS

    def _serve_first(self, model: Model) -> bool:
        """Loads or wakes the model, or makes room for it; False where those behind it have to wait, too."""
        need, coming, room = self._memory.predict(model.archive), self._accounting.coming(), self._accounting.room()
        attainable = room + self._accounting.obtainable()
        if attainable > 0 and self._is_open(model):
            # Alone with all that can be had it is tried, whatever was guessed.
            need = min(need, attainable)
        missing = need - model.reserved - room
        if model.state not in AWAY:
            missing -= self._free_standby()  # it is the worker that will load
        if missing <= 0 and not (model.squeezed and coming):
            model.hold(need)
            (self._effects.wake if model.state in AWAY else self._effects.load)(model)
            return True
        if model.state in AWAY and missing > coming:
            missing -= self._dismiss_standby()
        self._make_room(model, missing - coming)
        # Where others hold the device's memory, nothing here can hurry it: let smaller ones pass meanwhile.
        return missing > self._accounting.obtainable()

    def _make_room(self, model: Model, need: int) -> None:
        """Others are parked; where that is not enough, they leave the device altogether: suspended, else unloaded."""
        for park in (True, False):
            others = [r for r in self._accounting.evictable(park) if r.key != model.archive.engine_name]
            victims = choose_victims(need, others, _now(), self._limits.minimum_stay)
            if victims is not None:
                self._evict(victims, Reason.MEMORY, park)
                return

    def _shrink_to_budget(self) -> None:
        """A model may turn out larger than predicted; idle ones then make up for it."""
        self._evict_idle(self._accounting.excess())

    def _evict_idle(self, need: int) -> None:
        """Evicts for `need` bytes, or for as many of them as the standby worker and idle models hold."""
        if need > 0:
            need -= self._dismiss_standby()
        if need > 0:
            idle = self._accounting.idle()
            victims = choose_victims(min(need, sum(r.size for r in idle)), idle, _now(), 0)
            self._evict(victims, Reason.MEMORY, park=True)

    def _free_standby(self) -> int:
        """Bytes of a standby worker that is neither dismissed nor taken over already."""
        return 0 if self._standby.leaving else self._accounting.standby()

    def _dismiss_standby(self) -> int:
        """Bytes that come back by that."""
        freed = self._free_standby()
        return freed if freed and self._standby.dismiss() else 0

    def _evict(self, victims: list[Resident] | None, reason: Reason, park: bool) -> None:
        for victim in victims or []:
            model = self._models[victim.key]
            if model.state not in LEAVING:  # one before it may have needed its host memory
                self._drain(model, reason, self._accounting.away(model, park))

    def _drain(self, model: Model, reason: Reason, away: Taken | None) -> None:
        """Admits nothing new; what runs finishes first."""
        model.evicted_at = _now()
        self._on_event(Event(What.EVICTED, model, reason=reason))
        if model.state in AWAY and away is None:
            self._effects.unload(model)
            return
        model.to(State.DRAINING if model.state is State.READY else State.SUSPENDING)
        model.away = away
        self._leave(model)

    def _leave(self, model: Model) -> None:
        """Sends it away when nothing runs in it: to host memory if that is where it goes and has room, else to disk."""
        if model.leases or model.effect:
            return
        if model.unwanted or model.stale:
            model.away = None
        if model.away is None:
            self._effects.unload(model)
        elif self._has_host_room(model.away.host - model.host):
            model.host = model.away.host
            (self._effects.suspend if model.state is State.SUSPENDING else self._effects.park)(model)
        elif not self._accounting.host_coming():
            self._effects.unload(model)

    def _has_host_room(self, need: int) -> bool:
        """Says whether host memory has room. Where it has none yet, parked and suspended models leave, oldest first."""
        missing = self._accounting.host_missing(need)
        if missing > 0:
            need = missing - self._accounting.host_coming()
            for victim in choose_victims(need, self._accounting.idle_away(), _now(), 0) or []:
                self._drain(self._models[victim.key], Reason.HOST_MEMORY, None)
        return missing <= 0

    # Ends of effects

    def _send_to_the_end(self, model: Model) -> None:
        """Whoever waits for the model had this load."""
        send_to_the_end({waiter.client for waiter in model.waiters}, self._models.values(), _now())

    def on_loaded(self, model: Model, outcome: int | PalimpsestError, seconds: float) -> None:
        self._send_to_the_end(model)
        if isinstance(outcome, OutOfMemory):
            self._on_out_of_memory(model)
        elif isinstance(outcome, PalimpsestError):
            self._on_load_failed(model, outcome)
        else:
            model.loads += 1
            model.error = None
            self._on_ready(model, What.LOADED, Taken(outcome, 0), seconds)
            self._standby_is_due = True
            if self._memory.is_measured(model.archive) and outcome > self._accounting.largest(model):
                model.refused_at, model.unwanted = _now(), Reason.TOO_LARGE
                model.fail_waiters(self._accounting.refusal(model))

    def on_parked(self, model: Model, outcome: Taken | PalimpsestError, seconds: float) -> None:
        if isinstance(outcome, PalimpsestError):
            logger.warning("%s is unloaded, for it could not be parked: %s", model.archive.name, outcome.message)
            self._effects.unload(model)
        else:
            model.to(State.PARKED)
            model.hold(outcome.device)
            self._on_event(Event(What.PARKED, model, seconds))
            if model.away and model.away.suspended:
                model.to(State.SUSPENDING)
            else:
                model.away, model.host = outcome, outcome.host

    def on_suspended(self, model: Model, outcome: Taken | PalimpsestError, seconds: float) -> None:
        if isinstance(outcome, PalimpsestError):
            logger.warning("%s is unloaded, for it could not be suspended: %s", model.archive.name, outcome.message)
            self._effects.unload(model)
        else:
            model.to(State.SUSPENDED)
            model.hold(outcome.device)
            model.away, model.host = outcome, outcome.host
            self._on_event(Event(What.SUSPENDED, model, seconds))

    def on_woken(self, model: Model, outcome: Taken | PalimpsestError, seconds: float) -> None:
        self._send_to_the_end(model)
        was_suspended = model.away is not None and model.away.suspended
        if isinstance(outcome, OutOfMemory) and not was_suspended:
            self._on_out_of_memory(model)
        elif isinstance(outcome, PalimpsestError):
            logger.warning("%s is loaded anew, for it could not be woken: %s", model.archive.name, outcome.message)
            self._effects.unload(model)
        else:
            model.wakes += 1
            self._on_ready(model, What.WOKEN, outcome, seconds)

    def _on_ready(self, model: Model, what: What, taken: Taken, seconds: float) -> None:
        model.to(State.READY)
        model.hold(taken.device)
        model.away, model.host = None, taken.host
        model.ready_since = model.last_used = _now()
        model.arrived = Arrived(model.ready_since, seconds)
        self._on_event(Event(what, model, seconds))

    def _on_load_failed(self, model: Model, error: PalimpsestError) -> None:
        model.error, model.failed_at = error, _now()
        model.failures += 1
        self._on_event(Event(What.LOAD_FAILED, model))
        if isinstance(error, EngineUnavailable) and not isinstance(error, WorkerDied):
            # Nothing is wrong with the model, and no worker has seen what waits for it.
            model.leave_memory()
            model.rests_until = _now() + _LOOK_AGAIN
            return
        # What another try at once would only repeat; else its archive was replaced or its worker killed.
        lasting = isinstance(error, ModelLoadFailed | OutOfMemory | DeadlineExceeded)
        model.leave_memory(State.FAILED if lasting else State.ABSENT)
        model.fail_waiters(error)

    def _on_out_of_memory(self, model: Model) -> None:
        """The device had less room than was accounted for: one idle model goes before the next try, or all have."""
        self._on_event(Event(What.LOAD_OUT_OF_MEMORY, model))
        idle = self._accounting.idle()
        # Also one that this load was to take over, and has not.
        dismissed = self._standby.dismiss()
        hopeless = not idle and not self._accounting.coming()
        if model.state is State.WAKING and model.away:
            model.to(State.PARKED)
            model.hold(model.away.device)
        elif not hopeless:
            model.leave_memory()
        if hopeless:
            self._on_hopeless(model)
        elif model.waiters:
            model.squeezed = True
            if not dismissed:
                self._evict(choose_victims(1, idle, _now(), 0), Reason.OUT_OF_MEMORY, park=True)

    def _on_hopeless(self, model: Model) -> None:
        error = OutOfMemory(
            f"the device has no room for {model.archive.name!r}, and nothing idle is left to unload: try again later"
        )
        if model.state is State.PARKED:
            model.fail_waiters(error)
        else:
            self._on_load_failed(model, error)

    def on_unloaded(self, model: Model, seconds: float) -> None:
        model.leave_memory()
        self._standby_is_due = True
        self._on_event(Event(What.UNLOADED, model, seconds))


def _now() -> float:
    return asyncio.get_running_loop().time()
