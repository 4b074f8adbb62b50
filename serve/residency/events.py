"""What the scheduler tells whoever counts: every event and every reason by its name."""

from dataclasses import dataclass
from enum import Enum, auto

from serve.residency.model import Model, Reason


class What(Enum):
    QUEUE_WAIT = auto()  # a request got its turn
    LOADED = auto()
    LOAD_FAILED = auto()  # model.error says why
    LOAD_OUT_OF_MEMORY = auto()
    EVICTED = auto()  # it has to leave, for the reason
    PARKED = auto()
    SUSPENDED = auto()
    WOKEN = auto()
    UNLOADED = auto()


@dataclass(frozen=True)
class Event:
    """seconds: that it took. reason: of an eviction."""

    what: What
    model: Model
    seconds: float = 0.0
    reason: Reason | None = None
