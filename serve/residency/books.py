"""What memory is spoken for, and how much of it could come back: sums over all models that change nothing."""

from collections.abc import Mapping
from typing import Protocol

from serve.errors import OutOfMemory
from serve.residency.catalog import Archive
from serve.residency.model import LEAVING, Model, State
from serve.residency.policy import Resident


class Memory(Protocol):
    """The device and what is known of each model's size, in bytes. Both calls must be quick and not raise."""

    budget: int

    def free(self) -> int:
        """What the device reports as free, at this moment."""

    def predict(self, archive: Archive) -> int:
        """What loading the archive will take."""


class Books:
    """models: all of them, as they change."""

    def __init__(self, memory: Memory, models: Mapping[str, Model]) -> None:
        self._memory, self._models = memory, models

    def missing(self, need: int) -> int:
        """Bytes short of `need` in the books, or on the device where that has less; none short: 0 or less."""
        reserved = sum(m.reserved for m in self._models.values())
        loading = sum(m.reserved for m in self._models.values() if m.state is State.LOADING)
        return need - min(self._memory.budget - reserved, self._memory.free() - loading)

    def coming(self) -> int:
        """Bytes that come back without anything more to be done."""
        return sum(m.reserved for m in self._models.values() if m.state in LEAVING)

    def obtainable(self) -> int:
        """Bytes that would come back if all went that may go."""
        return sum(m.reserved for m in self._models.values() if m.state in LEAVING or not m.pinned)

    def excess(self) -> int:
        """Bytes by which models that stay exceed the budget; 0 or less if they don't."""
        return sum(m.reserved for m in self._models.values() if m.state not in LEAVING) - self._memory.budget

    def evictable(self) -> list[Resident]:
        return [
            Resident(key, m.reserved, m.in_use, m.stale, m.ready_since, m.last_used)
            for key, m in self._models.items()
            if m.state is State.READY and not m.pinned
        ]

    def idle(self) -> list[Resident]:
        return [resident for resident in self.evictable() if not resident.in_use]

    def largest(self) -> int:
        """Bytes that a model could get if all went that may go."""
        return self._memory.budget - sum(m.reserved for m in self._models.values()) + self.obtainable()

    def refusal(self, archive: Archive) -> OutOfMemory:
        """Of a model larger than that."""
        need, budget, pinned = self._memory.predict(archive), self._memory.budget, self._memory.budget - self.largest()
        held = f", of which pinned models hold {_mib(pinned)}" if pinned else ""
        return OutOfMemory(
            f"{archive.name!r} needs {_mib(need)} and the budget is {_mib(budget)}{held}:"
            " raise PALIMPSEST_MEMORY_BUDGET or use a smaller model"
        )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
