"""What the operator bounds."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SchedulerLimits:
    """queue_per_model, queue_total: waiting requests. wait: seconds that one waits at most. concurrent_loads: at a
    time. minimum_stay: seconds that a busy model keeps its place. keep_alive: seconds until an idle model goes even
    if nobody needs its place (None: never; 0: after each answer). failure_pause: seconds in which a model that failed
    to load is not tried again. eviction: which idle model goes first: asked for least often of late, or longest ago."""

    queue_per_model: int = 128
    queue_total: int = 256
    wait: float = 60.0
    concurrent_loads: int = 1
    minimum_stay: float = 2.0
    keep_alive: float | None = None
    failure_pause: float = 5.0
    eviction: Literal["lrfu", "lru"] = "lrfu"
