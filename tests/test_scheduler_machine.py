"""The scheduler under whatever order of events Hypothesis thinks of.

SCHEDULER_EXAMPLES=5000 looks longer.
"""

import os
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from scheduling import Request, World, archive

from serve.errors import Busy, ModelLoadFailed, OutOfMemory, PalimpsestError
from serve.residency.model import Taken
from serve.residency.scheduler import Model, State
from serve.store.catalog import Archive

names = st.sampled_from("abcd")
RARE = (
    "replace_archive", "pin", "unload", "worker_lost", "footprint_measured", "engine_lost", "others_take_memory",
    "unloads_free_late", "standby_lost",
)  # fmt: skip
PATIENT = 1e5  # seconds that some requests wait: they must get a real answer


class SchedulerMachine(RuleBasedStateMachine):
    """A rule that ends with `_settle(False)` leaves callbacks to run: the next rule then meets them half-way."""

    requests: Bundle[Request] = Bundle("requests")

    @initialize(
        budget=st.integers(2, 4),
        less=st.integers(0, 1),
        loads=st.integers(1, 2),
        keep_alive=st.sampled_from([None, 0, 10]),
        undo=st.sampled_from([0, 1]),
        larger=st.booleans(),
        guessed=st.booleans(),
        host_budget=st.integers(0, 3),
        keeps_copies=st.booleans(),
        suspends=st.booleans(),
        standby=st.integers(0, 2),
    )
    def begin(
        self,
        budget: int,
        less: int,
        loads: int,
        keep_alive: float | None,
        undo: float,
        larger: bool,
        guessed: bool,
        host_budget: int,
        keeps_copies: bool,
        suspends: bool,
        standby: int,
    ) -> None:
        self.world = World(
            budget,
            budget - less,
            host_budget,
            standby,
            queue_per_model=4,
            queue_total=8,
            wait=30,
            concurrent_loads=loads,
            keep_alive=keep_alive,
        )
        self.world.device.predicted = {"a": 1, "b": 1, "c": 2, "d": 3}
        self.world.device.parked = {"a": Taken(0, 1), "c": Taken(1, 1), "d": Taken(0, 2)}
        self.world.device.suspends = suspends
        self.world.device.actual = {"b": 2, "c": 2} if larger else {"c": 2}
        if guessed:
            self.world.device.predicted["c"] = 9
            self.world.device.guessed.add("c")
        self.world.engine.undo_seconds = undo
        self.world.engine.keeps_copies = keeps_copies
        self.engine_up = True
        self.versions = dict.fromkeys("abcd", 1)
        self.settled = True

    # Requests

    @rule(
        target=requests,
        name=names,
        client=st.sampled_from(["", "x", "y"]),
        wait=st.sampled_from([0, 1, None, PATIENT]),
        settle=st.booleans(),
    )
    def request(self, name: str, client: str, wait: float | None, settle: bool) -> Request:
        made = Request(self.world, archive(name, self.versions[name]), wait, None, client)
        self.world.requests.append(made)
        self._settle(settle)
        return made

    @rule(request=consumes(requests), settle=st.booleans())
    def cancel(self, request: Request, settle: bool) -> None:
        request.cancel()
        self._settle(settle)

    @rule(target=requests, request=consumes(requests), settle=st.booleans())
    def finish(self, request: Request, settle: bool) -> Any:
        if not request.holding:
            return request
        request.finish()
        self._settle(settle)
        return multiple()

    # Effects

    @precondition(lambda self: self.world.engine.running)
    @rule(
        data=st.data(),
        error=st.sampled_from([None, None, None, OutOfMemory, ModelLoadFailed, ZeroDivisionError]),
        settle=st.booleans(),
    )
    def effect_ends(self, data: st.DataObject, error: type[Exception] | None, settle: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.engine.running)))
        _, done = self.world.engine.running[key]
        if not done.done():
            done.set_exception(error("no")) if error else done.set_result(None)
        self._settle(settle)

    # The world

    @rule(seconds=st.sampled_from([0, 0.1, 1, 2.7, 5, 31]))
    def time_passes(self, seconds: float) -> None:
        """Never to the very moment in which a minimum stay is over: rounding would decide whether it was seen."""
        self.world.pass_time(seconds)
        self.settled = True

    @precondition(lambda self: not self.engine_up)
    @rule()
    def engine_back(self) -> None:
        self.engine_up = True
        self.world.call(self.world.scheduler.on_engine_ready)
        self.settled = True

    @rule(data=st.data(), name=names)
    def something_rare(self, data: st.DataObject, name: str) -> None:
        """One rule for all of it, so that most steps are requests and effects."""
        self.world.pass_time(0)
        version = archive(name, self.versions[name])
        model = next((m for m in self.world.scheduler.models() if m.archive == version), None)
        getattr(self, data.draw(st.sampled_from(RARE)))(data, version, model)
        self.settled = True

    def replace_archive(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        self.versions[version.name] = 3 - self.versions[version.name]

    def pin(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        self.world.call(self.world.scheduler.pin, version, data.draw(st.booleans()))

    def unload(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        self.world.start(self.world.scheduler.unload(version.name))

    def worker_lost(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        """The engine does not report a worker that it is ending anyway."""
        if model is not None and model.state is not State.UNLOADING:
            self.world.lose_worker(version.name, self.versions[version.name])

    def footprint_measured(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        """Whatever is seen to be taken between requests and while they run, the whole budget and more included."""
        if model is not None and model.state in {State.READY, State.DRAINING}:
            size = data.draw(st.integers(1, 6))
            self.world.device.held[version.engine_name] = size
            self.world.device.peaks[version.name] = data.draw(st.integers(0, 9))
            self.world.call(self.world.scheduler.on_footprint, version.engine_name, size)

    def engine_lost(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        self.engine_up = False
        self.world.lose_engine()

    def others_take_memory(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        self.world.device.foreign = data.draw(st.integers(0, 2))
        self.world.pass_time(1)

    def unloads_free_late(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        self.world.engine.frees_late = not self.world.engine.frees_late

    def standby_lost(self, data: st.DataObject, version: Archive, model: Model | None) -> None:
        self.world.call(self.world.warm.lose)

    # What always holds

    @invariant()
    def the_contract_with_the_engine_holds(self) -> None:
        assert not self.world.violations, self.world.violations

    @invariant()
    def parked_models_stay_within_the_host_budget(self) -> None:
        assert sum(m.host for m in self.world.scheduler.models()) <= self.world.device.host_budget

    @invariant()
    def a_suspended_model_has_left_the_device(self) -> None:
        for model in self.world.scheduler.models():
            if model.state is State.SUSPENDED:
                assert (model.reserved, self.world.device.held.get(model.archive.engine_name, 0)) == (0, 0)
                assert self.world.device.suspends

    @invariant()
    def queues_are_bounded(self) -> None:
        lengths = [len(m.waiters) for m in self.world.scheduler.models()]
        assert max(lengths, default=0) <= 4
        assert sum(lengths) <= 8

    @invariant()
    def leases_are_those_that_requests_hold(self) -> None:
        if self.settled:
            for model in self.world.scheduler.models():
                mine = [r for r in self.world.requests if r.archive == model.archive]
                assert model.leases == sum(r.holding for r in mine)
                assert len(model.waiters) == sum(r.waiting for r in mine)

    @invariant()
    def bytes_are_reserved_for_models_in_memory_only(self) -> None:
        for model in self.world.scheduler.models():
            if model.state in {State.ABSENT, State.FAILED}:
                assert model.reserved == 0

    @invariant()
    def only_requests_that_run_hold_more_than_a_model_at_rest(self) -> None:
        for model in self.world.scheduler.models():
            if not model.leases and model.state is not State.UNLOADING:
                assert model.reserved == model.resting

    @invariant()
    def one_version_of_a_name_is_current(self) -> None:
        current = [m.archive.name for m in self.world.scheduler.models() if not m.stale]
        assert len(current) == len(set(current))

    @invariant()
    def no_wake_up_is_lost(self) -> None:
        """Whatever can be done has been done: to look again changes nothing."""
        if self.settled:
            before = self._picture()
            self.world.call(self.world.scheduler._advance)
            after = self._picture()
            assert after == before, f"{before} became {after}"

    @invariant()
    def where_requests_wait_something_will_happen(self) -> None:
        if self.settled and self.engine_up:
            for model in self.world.scheduler.models():
                assert not (model.state is State.READY and model.waiters and not model.leases)
                if model.waiters and model.state in {State.ABSENT, State.FAILED}:
                    assert self.world.engine.running or self.world.scheduler._timer is not None

    def teardown(self) -> None:
        """When all effects and leases end and the world is kind, every request ends, and the patient are answered."""
        if not hasattr(self, "world"):
            return
        try:
            self._end_well()
        finally:
            self.world.close()

    def _end_well(self) -> None:
        world = self.world
        world.pass_time(0)
        world.engine.load_seconds = world.engine.unload_seconds = 0.1
        world.engine.frees_late, world.device.foreign, world.device.actual = False, 0, {"c": 2}
        world.device.capacity = world.device.budget
        patient = [r for r in world.requests if r.waiting and r.wait == PATIENT]
        world.call(world.scheduler.on_engine_ready)
        for name, version in self.versions.items():
            world.call(world.scheduler.pin, archive(name, version), False)
        for request in world.requests:
            request.finish()
        for _, done in list(world.engine.running.values()):
            if not done.done():
                done.set_result(None)
        world.pass_time(100)
        assert all(r.task.done() for r in world.requests)
        assert all(not m.leases and not m.waiters and m.effect is None for m in world.scheduler.models())
        assert all(not isinstance(r.error, Busy) for r in patient)
        assert all(r.error is None or isinstance(r.error, PalimpsestError) for r in world.requests)
        assert all(task.done() for task in world.tasks)
        self._ask_for_all_that_fit()

    def _ask_for_all_that_fit(self) -> None:
        """No measurement of a request, however large, has made a model unloadable whose own size fits."""
        for name, version in self.versions.items():
            if self.world.device.predicted[name] <= self.world.device.budget or name in self.world.device.guessed:
                request = self.world.request(name, version, wait=PATIENT, seconds=0)
                self.world.pass_time(100)
                assert request.served, (name, request.error)

    def _settle(self, settle: bool) -> None:
        self.settled = settle
        if settle:
            self.world.pass_time(0)

    def _picture(self) -> Any:
        models = [
            (m.archive.engine_name, m.state.name, m.leases, len(m.waiters), m.reserved, m.resting, m.stale, m.pinned)
            for m in self.world.scheduler.models()
        ]
        return models, sorted(self.world.engine.running), len(self.world.engine.log)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=int(os.environ.get("SCHEDULER_EXAMPLES", "120")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
