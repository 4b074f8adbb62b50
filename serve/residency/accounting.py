"""What memory is spoken for, and how much of it could come back: sums over all models that change nothing."""

from collections.abc import Mapping
from typing import Protocol

from serve.errors import OutOfMemory
from serve.residency.model import AWAY, LEAVING, STARTING, Model, State, Taken
from serve.residency.policy import Resident
from serve.residency.standby import Standby
from serve.store.catalog import Archive


class Memory(Protocol):
    """The device and what is known of each model's size, in bytes. All calls must be quick and not raise."""

    budget: int
    host_budget: int

    def free(self) -> int:
        """What the device reports as free, at this moment."""

    def predict(self, archive: Archive) -> int:
        """What loading the archive will take: measured, or a guess."""

    def is_measured(self, archive: Archive) -> bool:
        """Whether that was measured."""

    def predict_peak(self, archive: Archive) -> int:
        """What its model will take while it works on a request, all together; 0 where that is not known."""

    def predict_parked(self, archive: Archive) -> Taken | None:
        """What the archive's model will take once it is parked; None where it can't be, or where that frees nothing."""

    def predict_suspended(self, archive: Archive) -> Taken | None:
        """The same once it is suspended, too."""


class Accounting:
    """models: those that are in memory or in use, as they change."""

    def __init__(self, memory: Memory, models: Mapping[str, Model], standby: Standby) -> None:
        self._memory, self._models, self._standby = memory, models, standby

    def room(self) -> int:
        """Bytes that nobody holds by the accounts, or on the device where that has less; may be negative."""
        reserved = sum(m.reserved for m in self._models.values())
        loading = sum(m.reserved for m in self._models.values() if m.state in STARTING)
        return min(self._memory.budget - reserved - self.standby(), self._memory.free() - loading)

    def standby(self) -> int:
        """Bytes that the standby worker holds beside all models; none while one loads, which takes it over."""
        return 0 if any(m.state is State.LOADING for m in self._models.values()) else self._standby.held

    def coming(self) -> int:
        """Bytes that come back without anything more to be done."""
        models = sum(m.reserved - _stays(m) for m in self._models.values() if m.state in LEAVING)
        return models + (self._standby.held if self._standby.leaving else 0)

    def at_work(self) -> bool:
        """Whether a request that runs will give bytes back when it ends."""
        return any(m.leases and m.reserved > m.resting for m in self._models.values())

    def obtainable(self) -> int:
        """Bytes that would come back if all went that may go."""
        return self.standby() + sum(m.reserved for m in self._models.values() if m.state in LEAVING or not m.pinned)

    def excess(self) -> int:
        """Bytes by which what stays exceeds the budget; 0 or less if it does not."""
        models = self._models.values()
        taken = sum(_stays(m) if m.state in LEAVING else m.reserved for m in models)
        return taken + (0 if self._standby.leaving else self.standby()) - self._memory.budget

    def evictable(self, park: bool) -> list[Resident]:
        """park: those that can be parked give back only what that frees; else all leave the device altogether."""
        return [
            _resident(key, m, m.reserved - (away.device if (away := self.away(m, park)) else 0))
            for key, m in self._models.items()
            if m.state in (State.READY, State.PARKED) and not m.pinned
        ]

    def idle(self) -> list[Resident]:
        """The models that nobody uses and whose going frees something, one place colder where they can be."""
        return [r for r in self.evictable(park=True) if not r.in_use and r.size > 0]

    def away(self, model: Model, park: bool) -> Taken | None:
        """What the model will take once it has left: parked, where that is enough (`park`), else suspended; None where
        it is neither, and goes to disk.
        """
        if model.stale:
            return None
        parked = self._memory.predict_parked(model.archive) if park and model.state is not State.PARKED else None
        places = (parked, self._memory.predict_suspended(model.archive))
        return next((taken for taken in places if taken and taken.host <= self._memory.host_budget), None)

    def host_missing(self, need: int) -> int:
        """Bytes short of `need` in host memory."""
        return need - self._memory.host_budget + sum(m.host for m in self._models.values())

    def host_coming(self) -> int:
        """Bytes of host memory that come back without anything more to be done."""
        return sum(m.host for m in self._models.values() if m.state is State.UNLOADING)

    def idle_away(self) -> list[Resident]:
        """The idle parked and suspended models with what each holds of host memory."""
        return [
            _resident(key, m, m.host)
            for key, m in self._models.items()
            if m.state in AWAY and not m.in_use and not m.pinned
        ]

    def largest(self, model: Model) -> int:
        """Bytes that the model could get if all others went that may go."""
        return self._memory.budget - sum(
            m.resting for m in self._models.values() if m is not model and m.pinned and m.state not in LEAVING
        )

    def refusal(self, model: Model) -> OutOfMemory:
        """Returns the error for a model that is larger than that."""
        name, budget = model.archive.name, self._memory.budget
        pinned = budget - self.largest(model)
        held = f", of which pinned models hold {_mib(pinned)}" if pinned else ""
        if not self._memory.is_measured(model.archive):
            return OutOfMemory(f"there is no room for {name!r}: the budget is {_mib(budget)}{held}: unpin one of them")
        return OutOfMemory(
            f"{name!r} took {_mib(self._memory.predict(model.archive))} when it was loaded, and the budget is"
            f" {_mib(budget)}{held}: raise PALIMPSEST_MEMORY_BUDGET or use a smaller model"
        )


def _stays(model: Model) -> int:
    """Bytes that a leaving model keeps on the device."""
    return model.away.device if model.away else 0


def _resident(key: str, model: Model, size: int) -> Resident:
    return Resident(key, size, model.in_use, model.stale, model.ready_since, model.last_used, model.heat)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
