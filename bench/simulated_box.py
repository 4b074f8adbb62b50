"""One box in virtual time: the real scheduler, and in place of TorchServe and a GPU how long these would take."""

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from serve.cluster.policy import Published
from serve.residency.events import Event
from serve.residency.model import State, Taken
from serve.residency.scheduler import Scheduler, SchedulerLimits
from serve.store.catalog import Archive

MIB = 2**20


class Kind(NamedTuple):
    """weights, size: MiB of its file, and of the device once it is loaded. load, wake, answer: seconds."""

    weights: int
    size: int
    load: float
    wake: float
    answer: float


# Sizes, loads and wakings as measured with full-size weights on an H200 (docs/residency.md), answers of a card with a
# tenth of its speed: a click, a hole to fill, a painting of thirty steps.
KINDS = {
    "sam": Kind(196, 2400, 1.6, 0.02, 0.2),
    "lama": Kind(204, 1300, 1.3, 0.02, 0.2),
    "sd": Kind(2580, 4300, 2.7, 0.06, 2.0),
}
UNLOAD, PARK = 0.3, 0.05  # seconds
PARKED = 720  # MiB of the device that a parked worker keeps
# Four models of the mean size, and four parked ones: 92 % of a card of 16 GB.
BUDGET, HOST_BUDGET = 13_500, 16_000  # MiB


@dataclass(frozen=True)
class Simulated(Archive):
    kind: Kind = KINDS["sam"]

    @property
    def engine_name(self) -> str:
        return self.name


def archive(name: str, kind: str) -> Simulated:
    return Simulated(name, Path(name), kind=KINDS[kind])


class Lost(Exception):
    """The box is gone, and what was inside it."""


class Sizes:
    """What is known of the models: all of it, exactly."""

    budget, host_budget = BUDGET * MIB, HOST_BUDGET * MIB

    def free(self) -> int:
        return self.budget

    def predict(self, archive: Simulated) -> int:
        return archive.kind.size * MIB

    def is_measured(self, archive: Simulated) -> bool:
        return True

    def predict_peak(self, archive: Simulated) -> int:
        return 0

    def predict_parked(self, archive: Simulated) -> Taken | None:
        return Taken(PARKED * MIB, archive.kind.weights * MIB)

    def predict_suspended(self, archive: Simulated) -> Taken | None:
        return None


class Engine:
    """moved: MiB that were read from disk and copied to the device."""

    def __init__(self) -> None:
        self.moved = {"disk": 0, "host": 0}

    async def load(self, archive: Simulated) -> int:
        await asyncio.sleep(archive.kind.load)
        self.moved["disk"] += archive.kind.weights
        return archive.kind.size * MIB

    async def unload(self, archive: Simulated) -> None:
        await asyncio.sleep(UNLOAD)

    async def park(self, archive: Simulated) -> Taken:
        await asyncio.sleep(PARK)
        return Taken(PARKED * MIB, archive.kind.weights * MIB)

    async def suspend(self, archive: Simulated) -> Taken:
        raise NotImplementedError

    async def wake(self, archive: Simulated) -> Taken:
        await asyncio.sleep(archive.kind.wake)
        self.moved["host"] += archive.kind.weights
        return Taken(archive.kind.size * MIB, archive.kind.weights * MIB)


class Gpu:
    """Works on everything that runs at once, in equal shares."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._done, self._since = 0.0, 0.0  # seconds of work that each of what runs has had; when that was reckoned
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def work(self, seconds: float) -> None:
        """Returns when it has worked so long on this."""
        self._reckon()
        entry = self._done + seconds, next(self._numbers), self._loop.create_future()
        heapq.heappush(self._running, entry)
        self._set_timer()
        try:
            await entry[2]
        except asyncio.CancelledError:
            self._reckon()
            self._running.remove(entry)
            heapq.heapify(self._running)
            self._set_timer()
            raise

    def _reckon(self) -> None:
        now = self._loop.time()
        if self._running:
            self._done += (now - self._since) / len(self._running)
        self._since = now

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if self._running:
            left = max(0.0, self._running[0][0] - self._done) * len(self._running)
            self._timer = self._loop.call_later(left, self._finish)

    def _finish(self) -> None:
        self._reckon()
        while self._running and self._running[0][0] <= self._done + 1e-9:
            future = heapq.heappop(self._running)[2]
            if not future.done():
                future.set_result(None)
        self._set_timer()


class Box:
    """on_change: called when what it would publish may have changed. found: requests by the state in which they found
    their model.
    """

    def __init__(self, id: str, on_change: Callable[["Box"], None]) -> None:
        loop = asyncio.get_running_loop()
        self.id, self.alive, self.load = id, True, 0.0
        self.events: Counter[str] = Counter()
        self.engine = Engine()
        self._gpu = Gpu(loop)
        self._on_change = on_change
        self._inside: dict[asyncio.Task[None], None] = {}  # a set has another order in each run
        self.scheduler = Scheduler(self.engine, Sizes(), SchedulerLimits(), self._on_event)

    async def serve(self, archive: Simulated, work: float) -> float:
        """Answers one request, which takes the GPU so many seconds. Returns when it got its turn; raises Lost, or as
        Scheduler.lease.
        """
        task = asyncio.current_task()
        assert task
        self._inside[task] = None
        self.load += archive.kind.answer
        self._on_change(self)
        try:
            async with self.scheduler.lease(archive):
                began = asyncio.get_running_loop().time()
                await self._gpu.work(work)
            return began
        except asyncio.CancelledError:
            if self.alive:
                raise
            task.uncancel()
            raise Lost from None
        finally:
            del self._inside[task]
            self.load -= archive.kind.answer
            self._on_change(self)

    def place(self, archive: Simulated) -> str:
        model = self.scheduler.get(archive)
        return model.state.value if model else State.ABSENT.value

    def published(self) -> Published:
        places: dict[State, dict[str, float]] = {State.READY: {}, State.PARKED: {}, State.LOADING: {}}
        places[State.WAKING] = places[State.LOADING]
        for model in self.scheduler.active():
            if model.state in places:
                requests = model.leases + len(model.waiters)
                places[model.state][model.archive.name] = requests * model.archive.kind.answer
        return Published(self.load, places[State.READY], list(places[State.PARKED]), places[State.LOADING])

    async def lose(self) -> None:
        """Everything inside it is gone."""
        self.alive = False
        for task in list(self._inside):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await self.scheduler.close(0)

    def _on_event(self, event: Event) -> None:
        self.events[event.what.name.lower()] += 1
        self._on_change(self)
