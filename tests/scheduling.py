"""A scheduler in a world of its own: virtual time, an engine whose loads end when the test says so, a small device.

Sizes are small integers. Whatever breaks the contract between scheduler and engine is put down in `World.violations`.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtual_time import VirtualTimeLoop

from serve.errors import OutOfMemory
from serve.residency.events import Event, What
from serve.residency.model import STARTING, Reason, Taken
from serve.residency.scheduler import Model, Scheduler, SchedulerLimits, State
from serve.residency.standby import Standby
from serve.store.catalog import Archive

MakeWorld = Callable[..., "World"]


class Version(Archive):
    """An archive whose path makes the difference between versions."""

    @property
    def engine_name(self) -> str:
        return f"{self.name}@{self.path.name}"


def archive(name: str, version: int = 1) -> Archive:
    return Version(name=name, path=Path("/store") / name / str(version))


class Device:
    """capacity: what it really has. held: by loaded workers. foreign: by others. predicted, actual: size by name.

    guessed: names whose predicted size nobody has measured yet. peaks: what those names take that take more while they
    work. parked: what those names take when they are parked that can be. suspends: whether those can be suspended then,
    which takes as much more of the host as they keep of the device.
    """

    def __init__(self, budget: int, capacity: int, host_budget: int) -> None:
        self.budget, self.capacity, self.foreign, self.host_budget = budget, capacity, 0, host_budget
        self.parked: dict[str, Taken] = {}
        self.suspends = False
        self.host_held: dict[str, int] = {}
        self.held: dict[str, int] = {}
        self.predicted: dict[str, int] = {}
        self.guessed: set[str] = set()
        self.peaks: dict[str, int] = {}
        self.actual: dict[str, int] = {}

    def free(self) -> int:
        return self.capacity - self.foreign - sum(self.held.values())

    def predict(self, archive: Archive) -> int:
        return self.predicted.get(archive.name, 1)

    def is_measured(self, archive: Archive) -> bool:
        return archive.name not in self.guessed

    def predict_peak(self, archive: Archive) -> int:
        return self.peaks.get(archive.name, 0)

    def predict_parked(self, archive: Archive) -> Taken | None:
        parked = self.parked.get(archive.name)
        return parked if parked and parked.device < self.predict(archive) else None

    def predict_suspended(self, archive: Archive) -> Taken | None:
        parked = self.parked.get(archive.name)
        return Taken(0, parked.host + parked.device, suspended=True) if parked and self.suspends else None

    def take(self, archive: Archive) -> int:
        size = self.actual.get(archive.name, self.predict(archive))
        if size > self.free() + self.held.get(archive.engine_name, 0):
            raise OutOfMemory(f"{archive.name} does not fit")
        self.held[archive.engine_name] = size
        if archive.name in self.guessed:
            self.guessed.discard(archive.name)
            self.predicted[archive.name] = size
        return size


class Warm:
    """The standby worker: takes its memory at once, and what it takes comes back a moment after it was dismissed."""

    def __init__(self, world: "World", size: int) -> None:
        self._world, self._size = world, size
        self.standby = self._dismissed = False
        self.prepared = self.taken = 0

    def prepare_standby(self) -> None:
        if self.standby:
            self._world.violations.append("a second standby")
        device, models = self._world.device, self._world.scheduler.models()
        if self._size > min(device.free(), device.budget - sum(m.reserved for m in models)):
            self._world.violations.append("a standby without room")
        self.standby, self._dismissed, self.prepared = True, False, self.prepared + 1
        device.held["standby"] = self._size

    def dismiss_standby(self) -> None:
        self._dismissed = True
        self._world.loop.call_later(0.1, self.lose)

    def take(self) -> None:
        """By a load."""
        if self.standby and not self._dismissed:
            self.taken += 1
            self.lose()

    def lose(self) -> None:
        if self.standby:
            self.standby = False
            self._world.device.held.pop("standby", None)
            self._world.loop.call_soon(self._world.scheduler.on_standby)


@dataclass
class Engine:
    """Loads and unloads end by `World.end`, or after so many seconds where these are given.

    lost: workers that died since their load. undo_seconds: what a cancelled load takes to clean up. deaf: nothing can
    be cancelled. keeps_copies: a woken model keeps its copy in host memory. suspended, broken: workers that can only be
    woken or unloaded, and those that can only be unloaded.
    """

    world: "World"
    load_seconds: float | None = None
    unload_seconds: float | None = None
    undo_seconds: float = 0.0
    deaf: bool = False
    keeps_copies: bool = False
    frees_late: bool = False
    running: dict[str, tuple[str, asyncio.Future[None]]] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    suspended: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)

    async def load(self, archive: Archive) -> int:
        self._check_load(archive)
        self.world.warm.take()
        await self._run("load", archive, self.load_seconds)
        self.lost.discard(archive.engine_name)
        return self.world.device.take(archive)

    async def park(self, archive: Archive) -> Taken:
        if self.world.model(archive).leases:
            self.world.violations.append(f"{archive.engine_name} is parked while it works")
        return await self._put_away("park", archive, self.world.device.parked[archive.name])

    async def suspend(self, archive: Archive) -> Taken:
        if archive.engine_name not in self.world.device.host_held:
            self.world.violations.append(f"{archive.engine_name} is suspended and was not parked")
        suspended = self.world.device.predict_suspended(archive)
        assert suspended
        taken = await self._put_away("suspend", archive, suspended)
        self.suspended.add(archive.engine_name)
        return taken

    async def _put_away(self, kind: str, archive: Archive, taken: Taken) -> Taken:
        device = self.world.device
        held = sum(size for name, size in device.host_held.items() if name != archive.engine_name)
        if held + taken.host > device.host_budget:
            self.world.violations.append(f"{kind} of {archive.engine_name} over the host budget")
        device.host_held[archive.engine_name] = taken.host
        try:
            await self._run(kind, archive, self.unload_seconds)
        except BaseException:
            device.host_held.pop(archive.engine_name, None)
            raise
        device.held[archive.engine_name] = taken.device
        return taken

    async def wake(self, archive: Archive) -> Taken:
        if archive.engine_name not in self.world.device.host_held:
            self.world.violations.append(f"{archive.engine_name} is woken and was not parked")
        try:
            await self._run("wake", archive, self.load_seconds)
            size = self.world.device.take(archive)
        except BaseException:
            self.broken |= self.suspended & {archive.engine_name}
            raise
        self.suspended.discard(archive.engine_name)
        if not self.keeps_copies:
            self.world.device.host_held.pop(archive.engine_name, None)
        return Taken(size, self.world.device.host_held.get(archive.engine_name, 0))

    async def unload(self, archive: Archive) -> None:
        self._check_unload(archive)
        try:
            await self._run("unload", archive, self.unload_seconds)
        finally:
            self.suspended.discard(archive.engine_name)
            self.broken.discard(archive.engine_name)
            self.world.device.host_held.pop(archive.engine_name, None)
            size = self.world.device.held.pop(archive.engine_name, 0)
            if self.frees_late:
                self.world.device.foreign += size

    async def _run(self, kind: str, archive: Archive, seconds: float | None) -> None:
        self.log.append(f"{kind} {archive.name}")
        if kind != "unload" and archive.engine_name in self.broken:
            self.world.violations.append(f"{kind} of {archive.engine_name}, which is broken")
        key, done = archive.engine_name, asyncio.get_running_loop().create_future()
        if key in self.running:
            self.world.violations.append(f"{kind} of {key} while its {self.running[key][0]} runs")
        self.running[key] = kind, done
        try:
            await (done if seconds is None else asyncio.sleep(seconds))
        except asyncio.CancelledError:
            if kind == "load" and self.undo_seconds:
                await asyncio.sleep(self.undo_seconds)
            if not self.deaf:
                raise
        finally:
            del self.running[key]

    def _check_load(self, archive: Archive) -> None:
        if sum(m.state in STARTING for m in self.world.scheduler.models()) > self.world.limits.concurrent_loads:
            self.world.violations.append("too many loads at once")
        if archive.engine_name in self.world.device.held:
            self.world.violations.append(f"{archive.engine_name} is loaded twice")

    def _check_unload(self, archive: Archive) -> None:
        leases = self.world.model(archive).leases
        if leases and archive.engine_name not in self.lost:
            self.world.violations.append(f"unload of {archive.engine_name} with {leases} leases")


class Request:
    """One request: waits, holds its lease until `finish` (or for `seconds`), ends."""

    def __init__(
        self, world: "World", archive: Archive, wait: float | None, seconds: float | None, client: str = ""
    ) -> None:
        self.client = client
        self._world, self.archive, self.wait, self._seconds = world, archive, wait, seconds
        self._finish = asyncio.Event()
        self.holding = False
        self.since, self.waited = world.loop.time(), 0.0
        self.task = world.loop.create_task(self._run())

    async def _run(self) -> None:
        async with self._world.scheduler.lease(self.archive, self.wait, self.client) as model:
            assert model.archive == self.archive
            if model.state not in {State.READY, State.DRAINING} and self.archive.engine_name not in (
                self._world.engine.lost
            ):
                self._world.violations.append(f"a lease of a model that is {model.state}")
            self.holding, self.waited = True, self._world.loop.time() - self.since
            try:
                await (self._finish.wait() if self._seconds is None else asyncio.sleep(self._seconds))
            finally:
                self.holding = False

    def finish(self) -> None:
        self._finish.set()

    def cancel(self) -> None:
        self.task.cancel()

    @property
    def waiting(self) -> bool:
        return not self.holding and not self.task.done()

    @property
    def served(self) -> bool:
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None

    @property
    def error(self) -> BaseException | None:
        return self.task.exception() if self.task.done() and not self.task.cancelled() else None


class World:
    """budget: of the books. capacity: of the device, if it differs. host_budget: for parked models. standby: what a
    standby worker takes; 0: there is none. limits: fields of SchedulerLimits."""

    def __init__(
        self, budget: int = 2, capacity: int | None = None, host_budget: int = 0, standby: int = 0, **limits: Any
    ) -> None:
        self.loop = VirtualTimeLoop()
        self.violations: list[str] = []
        self.loop.set_exception_handler(lambda loop, context: self.violations.append(str(context)))
        self.limits = SchedulerLimits(**limits)
        self.device = Device(budget, budget if capacity is None else capacity, host_budget)
        self.engine = Engine(self)
        self.events: Counter[What | Reason] = Counter()
        self.requests: list[Request] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.warm = Warm(self, standby)
        self.scheduler = Scheduler(self.engine, self.device, self.limits, self._count, Standby(self.warm, standby))
        self._watch_the_books()

    def _count(self, event: Event) -> None:
        self.events[event.reason or event.what] += 1

    def _watch_the_books(self) -> None:
        """When a load is decided, not a moment later, when another may have turned out larger than predicted."""
        effects = self.scheduler._places._effects

        def checked(start: Callable[[Model], None]) -> Callable[[Model], None]:
            def check(model: Model) -> None:
                reserved = sum(m.reserved for m in self.scheduler.models())
                if not 0 < model.reserved <= reserved <= self.device.budget:
                    self.violations.append(f"load of {model.archive.name}: {reserved} of {self.device.budget} reserved")
                start(model)

            return check

        effects.load, effects.wake = checked(effects.load), checked(effects.wake)  # type: ignore[method-assign, assignment]

    def parkable(self, **sizes: int) -> None:
        """These can be parked, and then take nothing of the device and so much of the host."""
        self.device.parked |= {name: Taken(0, host) for name, host in sizes.items()}

    # What a test does

    def request(
        self, name: str, version: int = 1, *, wait: float | None = None, seconds: float | None = None, client: str = ""
    ) -> Request:
        request = Request(self, archive(name, version), wait, seconds, client)
        self.requests.append(request)
        self.pass_time(0)
        return request

    def start(self, coroutine: Any) -> asyncio.Task[Any]:
        self.tasks.append(self.loop.create_task(coroutine))
        self.pass_time(0)
        return self.tasks[-1]

    def call(self, function: Any, *arguments: Any) -> None:
        """Calls a method of the scheduler inside the loop, as a callback of the supervisor would."""
        self.loop.call_soon(function, *arguments)
        self.pass_time(0)

    def pass_time(self, seconds: float) -> None:
        self.loop.run_for(seconds)

    def end(self, name: str, error: Exception | None = None, version: int = 1) -> None:
        """Ends the load or unload that runs for the model."""
        _, done = self.engine.running[archive(name, version).engine_name]
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
        self.pass_time(0)

    def loaded(self, *names: str) -> None:
        """Loads models, each used a second after the one before."""
        for name in names:
            task = self.start(self.scheduler.load(archive(name)))
            self.end(name)
            assert task.done()
            self.pass_time(1)
        self.engine.log.clear()
        self.events.clear()

    def lose_worker(self, name: str, version: int = 1) -> None:
        key = archive(name, version).engine_name

        def lose() -> None:
            self.engine.lost.add(key)
            self.device.held.pop(key, None)
            self.device.host_held.pop(key, None)
            self.scheduler.on_worker_lost(key)

        self.call(lose)

    def lose_engine(self) -> None:
        def lose() -> None:
            self.engine.lost |= {m.archive.engine_name for m in self.scheduler.models()}
            self.engine.suspended.clear()
            self.engine.broken.clear()
            self.device.held.clear()
            self.device.host_held.clear()
            self.warm.standby = False
            self.scheduler.on_engine_lost()

        self.call(lose)

    # What a test sees

    def model(self, which: str | Archive) -> Model:
        key = (archive(which) if isinstance(which, str) else which).engine_name
        return next(m for m in self.scheduler.models() if m.archive.engine_name == key)

    def state(self, name: str) -> State:
        return self.model(name).state

    def running(self) -> list[str]:
        """Loads and unloads that run now."""
        return sorted(f"{kind} {key.partition('@')[0]}" for key, (kind, _) in self.engine.running.items())

    def close(self) -> None:
        """Ends everything; the contract held throughout, and nothing is left over."""
        for request in self.requests:
            request.cancel()
        self.pass_time(0)
        self.loop.run_until_complete(self.scheduler.close(0))
        self.pass_time(0)
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.exception()  # seen, or asyncio would complain
        self.pass_time(self.engine.undo_seconds)
        left = asyncio.all_tasks(self.loop)
        self.loop.close()
        assert not self.violations, self.violations
        assert not left
