"""Who gets a place in memory and who gives one up: starts loads and unloads, and takes note of how they end.

Three modules help: books (sums of bytes), policy (who must go), effects (loads and unloads that run).
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from serve.errors import OutOfMemory, PalimpsestError
from serve.residency.books import Books, Memory
from serve.residency.effects import Effects, Engine
from serve.residency.limits import Limits
from serve.residency.model import IN_MEMORY, Model, State
from serve.residency.policy import Resident, choose_victims

# While a model waits for a place, look again after so many seconds: the minimum stay of others passes, and memory that
# strangers hold comes back, without anyone telling.
_LOOK_AGAIN = 0.5


class Places:
    """models: all of them, as they change. on_change: called when a load or unload has ended."""

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        limits: Limits,
        models: Mapping[str, Model],
        on_event: Callable[[str, Model, float], None],
        on_change: Callable[[], None],
    ) -> None:
        self._memory, self._limits, self._models, self._on_event = memory, limits, models, on_event
        self._books = Books(memory, models)
        self._effects = Effects(engine, self._on_loaded, self._on_unloaded, on_change)

    def clear(self, active: Sequence[Model]) -> None:
        """Models leave that have a reason of their own to."""
        for model in active:
            if model.state is State.READY and (reason := self._reason_to_leave(model)):
                self._drain(model, reason)
            elif model.state is State.DRAINING and not model.leases:
                self._effects.unload(model)
        self._shrink_to_budget()

    def fill(self, active: Sequence[Model]) -> None:
        """Models that requests wait for are loaded, or others leave so that they can be.

        Strictly in line: a small model that overtook a large one could starve it.
        """
        slots = self._free_slots(active)
        for model in sorted((m for m in active if m.waits_for_place), key=lambda m: m.in_line_since):
            if slots <= 0 or not self._serve_first(model):
                break
            slots -= model.state is State.LOADING
        # Only now: a pinned model that has just begun to load leaves less for the others.
        largest = self._books.largest()
        for model in active:
            if model.waits_for_place and self._memory.predict(model.archive) > largest:
                model.fail_waiters(self._books.refusal(model.archive))

    def refusal(self, model: Model) -> OutOfMemory | None:
        """Why the model cannot be loaded, whatever leaves; None: it can, or need not."""
        fits = model.state in IN_MEMORY or self._memory.predict(model.archive) <= self._books.largest()
        return None if fits else self._books.refusal(model.archive)

    def next_step(self, active: Sequence[Model]) -> float | None:
        """When time alone may allow a step."""
        due = list[float]()
        if self._free_slots(active) > 0 and any(m.waits_for_place for m in active):
            due.append(_now() + _LOOK_AGAIN)
        if self._limits.keep_alive is not None:
            idle = (m for m in active if m.state is State.READY and not m.in_use and not m.pinned)
            due += [m.last_used + self._limits.keep_alive for m in idle]
        return min(due, default=None)

    def lose_worker(self, model: Model) -> None:
        """The model's worker is gone: what is left of it is cleared away, though leases may not have ended yet."""
        if model.state is State.LOADING:
            model.unwanted = "worker lost"  # it died between its last word and our hearing it
        elif model.state in (State.READY, State.PARKED, State.DRAINING):
            self._on_event("evicted: worker lost", model, 0.0)
            self._effects.unload(model)

    def lose_all(self) -> None:
        """All workers are gone."""
        self._effects.cancel()
        for model in self._models.values():
            if model.state in IN_MEMORY:
                model.leave_memory()

    async def close(self) -> None:
        """Ends what runs."""
        await asyncio.gather(*self._effects.cancel(), return_exceptions=True)

    # Room

    def _reason_to_leave(self, model: Model) -> str:
        if model.unwanted:
            return model.unwanted
        if model.in_use or model.pinned:
            return ""
        if model.stale:
            return "stale"
        keep_alive = self._limits.keep_alive
        return "keep-alive" if keep_alive is not None and _now() >= model.last_used + keep_alive else ""

    def _free_slots(self, active: Sequence[Model]) -> int:
        return self._limits.concurrent_loads - sum(m.state is State.LOADING for m in active)

    def _serve_first(self, model: Model) -> bool:
        """Loads the model or makes room for it; False where those behind it have to wait, too."""
        need, coming = self._memory.predict(model.archive), self._books.coming()
        missing = self._books.missing(need)
        if missing <= 0 and not (model.squeezed and coming):
            model.reserved = need
            self._effects.load(model)
            return True
        evictable = self._books.evictable()
        self._evict(choose_victims(missing - coming, evictable, _now(), self._limits.minimum_stay), "memory")
        # Where others hold the device's memory, nothing here can hurry it: let smaller ones pass meanwhile.
        return missing > self._books.obtainable()

    def _shrink_to_budget(self) -> None:
        """A model may turn out larger than predicted; idle ones then make up for it."""
        excess = self._books.excess()
        if excess > 0:
            idle = self._books.idle()
            self._evict(choose_victims(min(excess, sum(r.size for r in idle)), idle, _now(), 0), "memory")

    def _evict(self, victims: list[Resident] | None, reason: str) -> None:
        for victim in victims or []:
            self._drain(self._models[victim.key], reason)

    def _drain(self, model: Model, reason: str) -> None:
        """Admits nothing new; what runs finishes first."""
        model.to(State.DRAINING)
        model.evicted_at = _now()
        self._on_event(f"evicted: {reason}", model, 0.0)
        if not model.leases:
            self._effects.unload(model)

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
            model.ready_since = model.last_used = _now()
            self._on_event("loaded", model, seconds)

    def _on_load_failed(self, model: Model, error: PalimpsestError) -> None:
        model.leave_memory(State.FAILED)
        model.error, model.failed_at = error, _now()
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
            self._evict(choose_victims(1, idle, _now(), 0), "out of memory")

    def _on_unloaded(self, model: Model, seconds: float) -> None:
        model.leave_memory()
        self._on_event("unloaded", model, seconds)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _nothing_left(model: Model) -> OutOfMemory:
    return OutOfMemory(
        f"the device has no room for {model.archive.name!r}, and nothing idle is left to unload: try again later"
    )
