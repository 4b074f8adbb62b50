"""One model's state and its queue.

    ABSENT ──► LOADING ──► READY ──► DRAINING ──► UNLOADING ──► ABSENT
       ▲          │         ▲  │         │             ▲
       │          │         │  │         ▼             │
       │          ▼         │  │      PARKING ─────────┤
       └─────── FAILED      │  │         ▼             │
                            │  │       PARKED ─────────┤
                            │  │       │ ▼             │
                            │  │       │ SUSPENDING ───┤
                            │  │       │ ▼             │
                            │  │       │ SUSPENDED ────┤
                            │  │       ▼ ▼             │
                            └──┼────── WAKING ─────────┤
                               └── worker lost ────────┘

FAILED ──► LOADING: the next request after a pause. PARKING, SUSPENDING, WAKING ──► UNLOADING: they failed.
WAKING ──► PARKED: the device has no room for one that was parked. From everywhere in memory to ABSENT: the engine was
lost, and all workers with it.
"""

import asyncio
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from serve.errors import PalimpsestError
from serve.store.catalog import Archive


class State(Enum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # serves what runs, admits nothing new
    PARKING = "parking"
    PARKED = "parked"  # worker alive, weights in host memory
    SUSPENDING = "suspending"  # also while it waits for room in host memory
    SUSPENDED = "suspended"  # parked, and CUDA itself taken off the device by the driver
    WAKING = "waking"
    UNLOADING = "unloading"
    FAILED = "failed"


class Reason(Enum):
    """Why a model leaves memory, or its place on the device."""

    ASKED_FOR = "asked_for"
    STALE = "stale"
    KEEP_ALIVE = "keep-alive"
    MEMORY = "memory"
    HOST_MEMORY = "host_memory"
    OUT_OF_MEMORY = "out_of_memory"
    TOO_LARGE = "larger_than_the_budget"
    WORKER_LOST = "worker_lost"


_RECENT = 8  # requests that an average is of

# Tuples: to find an Enum member in a set takes several times as long.
AWAY = (State.PARKED, State.SUSPENDED)
_OUT = (State.ABSENT, State.FAILED, *AWAY)
STARTING = (State.LOADING, State.WAKING)
LEAVING = (State.DRAINING, State.PARKING, State.SUSPENDING, State.UNLOADING)
IN_MEMORY = (*STARTING, State.READY, *AWAY, *LEAVING)

_TRANSITIONS = {
    State.ABSENT: {State.LOADING},
    State.LOADING: {State.READY, State.FAILED, State.ABSENT},
    State.READY: {State.DRAINING, State.UNLOADING, State.ABSENT},
    State.DRAINING: {State.PARKING, State.UNLOADING, State.ABSENT},
    State.PARKING: {State.PARKED, State.UNLOADING, State.ABSENT},
    State.PARKED: {State.SUSPENDING, State.WAKING, State.UNLOADING, State.ABSENT},
    State.SUSPENDING: {State.SUSPENDED, State.UNLOADING, State.ABSENT},
    State.SUSPENDED: {State.WAKING, State.UNLOADING, State.ABSENT},
    State.WAKING: {State.READY, State.PARKED, State.UNLOADING, State.ABSENT},
    State.UNLOADING: {State.ABSENT},
    State.FAILED: {State.LOADING, State.ABSENT},
}


@dataclass(frozen=True)
class Taken:
    """What a model takes, in bytes. device: when parked, a CUDA context above all. host: the copy of its weights, and
    of that context where it is suspended.
    """

    device: int
    host: int
    suspended: bool = False


class Arrived(NamedTuple):
    """A load or a waking that has ended. when: the event loop's time of its end. seconds: that it took."""

    when: float
    seconds: float


@dataclass(eq=False)
class Waiter:
    """One request that waits for its model. outcome: None when it is granted a lease, else why it gets none.

    client: whose it is: a key's name, or an address; empty: nobody's. turn: the least of its model's is granted next; a
    number that grows with every request and every grant. in_line_since: when it came, or when its client was last given
    what several models want, if that was later.
    """

    outcome: asyncio.Future[PalimpsestError | None]
    since: float
    turn: int
    client: str = ""
    granted: bool = False
    in_line_since: float = 0.0

    def __post_init__(self) -> None:
        self.in_line_since = self.since

    def settle(self, error: PalimpsestError | None) -> None:
        self.granted = error is None
        self.outcome.set_result(error)


@dataclass(eq=False)
class Model:
    """One version of one archive. Times are the event loop's seconds.

    waiters: in the order in which they came.
    reserved: bytes held for it on the device, from the start of its load until its unload is done. resting: those of
    them that it keeps between two requests, as last measured; the rest is what the request that runs is expected to
    take beside. host: bytes held for it in host memory, from the start of its parking. away: what it takes, or will
    take, when it is parked or suspended; None where it is not and won't be. stale: a newer version was asked for.
    unwanted: why it is to leave as soon as it can. squeezed: the device had less room for it than was accounted for.
    effect: what runs to load, park, suspend, wake or unload it. leaving: resolved when its memory is back. evicted_at:
    when it last had to go. rests_until: no load is tried before, for the engine could not be reached. refused_at: when
    it was first found larger than the budget. error: of the last load. arrived: its last load or
    waking. hits: requests that found it ready. request_seconds: that a request has it, of late, on average. heat: how
    much it is in demand, by the rule of eviction.
    """

    archive: Archive
    state: State = State.ABSENT
    leases: int = 0
    waiters: list[Waiter] = field(default_factory=list)
    reserved: int = 0
    resting: int = 0
    host: int = 0
    away: Taken | None = None
    pinned: bool = False
    stale: bool = False
    unwanted: Reason | None = None
    squeezed: bool = False
    effect: asyncio.Task[None] | None = None
    leaving: list[asyncio.Future[None]] = field(default_factory=list)
    ready_since: float = 0.0
    last_used: float = 0.0
    heat: float = -math.inf
    evicted_at: float = 0.0
    failed_at: float = 0.0
    rests_until: float = 0.0
    refused_at: float | None = None
    error: PalimpsestError | None = None
    arrived: Arrived | None = None
    loads: int = 0
    wakes: int = 0
    failures: int = 0
    hits: int = 0
    request_seconds: float = 0.0
    requests: int = 0

    def to(self, state: State) -> None:
        """Changes the state; RuntimeError for a transition that the diagram above does not have."""
        if state not in _TRANSITIONS[self.state]:
            raise RuntimeError(f"{self.archive.name}: {self.state.name} -> {state.name} is not a transition")
        self.state = state

    @property
    def in_use(self) -> bool:
        return self.leases > 0 or bool(self.waiters)

    @property
    def active(self) -> bool:
        """Whether anything of it is in memory or under way; what is not costs nothing but its entry in a list."""
        return self.in_use or self.state in IN_MEMORY or self.effect is not None

    @property
    def waits_for_turn(self) -> bool:
        return self.state is State.READY and bool(self.waiters) and not self.leases

    @property
    def waits_for_place(self) -> bool:
        """Requests wait and nothing is under way for them; a load that is being cancelled must end first."""
        return bool(self.waiters) and self.state in _OUT and self.effect is None

    @property
    def in_line_since(self) -> tuple[float, float]:
        """What decides its turn among those that wait: clients in turn, and each one's models as they were asked for.

        One that was evicted goes to the end, or requests that it could not serve would bring it back before the model
        that it made room for.
        """
        in_turn = min(waiter.in_line_since for waiter in self.waiters)
        return max(in_turn, self.evicted_at), max(self.waiters[0].since, self.evicted_at)

    def take_next(self) -> Waiter:
        """Whose turn it is, who then waits no longer."""
        waiter = min(self.waiters, key=lambda each: each.turn)
        self.waiters.remove(waiter)
        return waiter

    def took(self, seconds: float) -> None:
        """A request had it for so long."""
        self.request_seconds += (seconds - self.request_seconds) / min(max(self.requests, 1), _RECENT)

    def hold(self, size: int) -> None:
        """Reserves so many bytes for it, whether it works or not."""
        self.reserved = self.resting = size

    def fail_waiters(self, error: PalimpsestError) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.outcome.done():
                waiter.settle(error)

    def serve_others_first(self, client: str, turn: int) -> None:
        """The client was served here: whoever waits for the model now comes before its further requests."""
        for waiter in self.waiters:
            if waiter.client == client:
                waiter.turn = turn

    def leave_memory(self, state: State = State.ABSENT) -> None:
        """Notes that its worker is gone and its bytes are back."""
        self.to(state)
        self.hold(0)
        self.host, self.away = 0, None
        self.unwanted, self.squeezed = None, False
        for future in self.leaving:
            if not future.done():
                future.set_result(None)
        self.leaving.clear()


def send_to_the_end(clients: Collection[str], models: Iterable[Model], now: float) -> None:
    """These clients had what several models want, a load or room to work in: others' models come before theirs."""
    for model in models:
        for waiter in model.waiters:
            if waiter.client in clients:
                waiter.in_line_since = now
