"""Where models are and how busy the server is, for routers and operators that ask all the time."""

from pydantic import BaseModel, Field

from serve.residency.accounting import Memory
from serve.residency.model import AWAY, STARTING, Model
from serve.residency.model import State as Residency
from serve.residency.scheduler import Scheduler


class State(BaseModel):
    """What there is of models that are in memory or in use: a few, however many the store holds."""

    change: int = Field(
        description="Another number than before: models have come, left or moved. From 0 at each start."
    )
    ready: list[str] = Field(description="Models that answer at once, by name.")
    parked: list[str] = Field(description="Models that come back within a moment: parked or suspended.")
    loading: list[str] = Field(description="Models that are loaded or woken.")
    leases: int = Field(description="Requests that run.")
    queue: int = Field(description="Requests that wait.")
    budget_bytes: int = Field(description="Memory that models may take together.")
    reserved_bytes: int = Field(description="Memory that is held for models.")


class States:
    """Takes them, and numbers those that differ in where models are."""

    def __init__(self, scheduler: Scheduler, memory: Memory) -> None:
        self._scheduler, self._memory = scheduler, memory
        self._change = 0
        self._places: list[list[str]] = [[], [], []]

    def take(self) -> State:
        """No disk; costs as much as there are models in memory or in use."""
        active = self._scheduler.active()
        places = [_names(active, (Residency.READY,)), _names(active, AWAY), _names(active, STARTING)]
        if places != self._places:
            self._places, self._change = places, self._change + 1
        ready, parked, loading = places
        return State(
            change=self._change,
            ready=ready,
            parked=parked,
            loading=loading,
            leases=sum(m.leases for m in active),
            queue=sum(len(m.waiters) for m in active),
            budget_bytes=self._memory.budget,
            reserved_bytes=sum(m.reserved for m in active),
        )


def _names(models: list[Model], states: tuple[Residency, ...]) -> list[str]:
    return sorted({m.archive.name for m in models if m.state in states and not m.stale})
