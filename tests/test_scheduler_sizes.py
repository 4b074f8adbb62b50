"""A model's size decides whether it is loaded, a request's peak what runs beside it, and neither disables a model."""

import pytest
from scheduling import MakeWorld, World, archive

from serve.errors import EngineUnavailable, ModelNotFound, OutOfMemory, WorkerDied
from serve.residency import versions
from serve.residency.places import _REFUSAL_STANDS
from serve.residency.scheduler import Model, State

MIB = 1 << 20


def measured(world: World, name: str, rest: int, peak: int = 0) -> None:
    """Its worker takes `rest` from now on, and was seen to take `peak`."""
    world.device.held[f"{name}@1"] = rest
    world.device.peaks[name] = max(rest, peak)
    world.call(world.scheduler.on_footprint, f"{name}@1", rest)


# Guesses


def test_a_guess_larger_than_the_budget_is_tried_alone_and_measured(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.loaded("a", "b")
    world.device.predicted["new"], world.device.actual["new"] = 600, 1
    world.device.guessed.add("new")
    request = world.request("new")
    assert world.running() == ["unload a", "unload b"]
    world.end("a")
    world.end("b")
    world.end("new")
    assert request.holding
    assert world.model("new").reserved == 1
    world.request("a")
    assert world.running() == ["load a"]  # beside it, now that its size is known


def test_a_guess_larger_than_what_pinned_models_leave_is_tried_in_that(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.call(world.scheduler.pin, archive("pinned"), True)
    world.loaded("pinned")
    world.device.predicted["new"], world.device.actual["new"] = 600, 2
    world.device.guessed.add("new")
    request = world.request("new")
    world.end("new")
    assert request.holding


def test_what_strangers_hold_does_not_make_a_guess_a_refusal(make_world: MakeWorld) -> None:
    world = make_world(8)
    world.device.foreign = 6
    world.device.predicted["new"], world.device.actual["new"] = 5, 1
    world.device.guessed.add("new")
    request = world.request("new")
    world.end("new")
    assert request.holding


def test_a_model_measured_larger_than_the_budget_leaves_and_the_message_says_so(make_world: MakeWorld) -> None:
    world = make_world(8 * MIB, capacity=100 * MIB)
    world.device.predicted["new"], world.device.actual["new"] = 2 * MIB, 9 * MIB
    world.device.guessed.add("new")
    request = world.request("new")
    world.end("new")
    assert isinstance(request.error, OutOfMemory)
    assert "took 9 MiB when it was loaded" in request.error.message
    assert "8 MiB" in request.error.message
    assert world.running() == ["unload new"]
    world.end("new")
    assert isinstance(world.request("new").error, OutOfMemory)
    assert world.running() == []


def test_a_wrong_measurement_is_not_for_ever(make_world: MakeWorld) -> None:
    world = make_world(8)
    world.device.predicted["a"], world.device.actual["a"] = 9, 3
    assert isinstance(world.request("a").error, OutOfMemory)
    world.pass_time(_REFUSAL_STANDS)
    world.device.guessed.add("a")  # the device measures it anew
    request = world.request("a")
    world.end("a")
    assert request.holding
    assert world.model("a").reserved == 3


def test_where_pinned_models_hold_everything_a_guess_says_so(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.call(world.scheduler.pin, archive("pinned"), True)
    world.device.predicted["pinned"] = 2
    world.loaded("pinned")
    world.device.guessed.add("new")
    error = world.request("new").error
    assert isinstance(error, OutOfMemory)
    assert "unpin" in error.message


# Peaks


def test_one_large_request_disables_neither_its_model_nor_others(make_world: MakeWorld) -> None:
    world = make_world(100, capacity=1000)
    world.device.predicted = {"a": 32, "b": 32}
    world.loaded("a", "b")
    measured(world, "a", rest=185)
    assert world.running() == ["unload a"]  # used less lately than b
    world.end("a")
    world.device.peaks["a"] = 185
    request = world.request("a")
    world.end("a")
    assert world.running() == ["unload b"]  # nothing beside it while it may take as much again
    world.end("b")
    assert request.holding
    request.finish()
    world.pass_time(0)
    assert world.model("a").reserved == 32
    again = world.request("b")
    world.end("b")
    assert again.holding
    assert world.state("a") is State.READY


def test_a_request_that_needs_room_waits_for_what_another_gives_back(make_world: MakeWorld) -> None:
    world = make_world(100)
    world.device.predicted = {"a": 30, "b": 30}
    world.loaded("a", "b")
    world.device.peaks = {"a": 60, "b": 60}
    first, second = world.request("a"), world.request("b")
    world.pass_time(0.1)
    third = world.request("a")
    assert first.holding
    assert second.waiting
    first.finish()
    world.pass_time(0)
    assert second.holding  # it came before the third
    assert third.waiting
    second.finish()
    world.pass_time(0)
    assert third.holding
    assert world.engine.log == []


def test_a_request_that_needs_no_more_than_its_model_overtakes_one_that_waits_for_room(make_world: MakeWorld) -> None:
    world = make_world(100)
    world.device.predicted = {"a": 30, "b": 30, "c": 30}
    world.loaded("a", "b", "c")
    world.device.peaks = {"a": 40, "b": 50}
    large, small = world.request("a"), world.request("c")
    world.pass_time(0.1)
    waiting, next_small = world.request("b"), world.request("c")
    assert large.holding
    assert waiting.waiting
    small.finish()
    world.pass_time(0)
    assert next_small.holding
    assert waiting.waiting


def test_a_request_larger_than_the_budget_runs_alone(make_world: MakeWorld) -> None:
    world = make_world(100)
    world.device.predicted = {"a": 30, "b": 30, "c": 30}
    world.loaded("a", "b", "c")
    world.device.peaks = {"a": 500}
    busy, large = world.request("b"), world.request("a")
    assert world.running() == ["unload c"]
    world.end("c")
    assert large.holding  # what is busy and gives nothing back is not waited for
    busy.finish()
    world.pass_time(0)
    assert world.running() == ["unload b"]


def test_room_for_work_is_made_by_parking_where_that_is_enough(make_world: MakeWorld) -> None:
    world = make_world(3, host_budget=5)
    world.parkable(b=1)
    world.loaded("a", "b")
    world.device.peaks["a"] = 3
    request = world.request("a")
    assert world.running() == ["park b"]
    world.end("b")
    assert request.holding


def test_a_pinned_model_at_work_refuses_nobody(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.call(world.scheduler.pin, archive("a"), True)
    world.loaded("a")
    world.device.peaks["a"] = 9
    request = world.request("a")
    other = world.request("b")
    assert other.waiting
    request.finish()
    world.pass_time(0)
    world.end("b")
    assert other.holding


def test_a_measurement_beside_a_running_request_keeps_the_room_for_its_work(make_world: MakeWorld) -> None:
    world = make_world(9)
    world.loaded("a")
    world.device.peaks["a"] = 5
    request = world.request("a")
    measured(world, "a", rest=2, peak=5)
    assert world.model("a").reserved == 5
    request.finish()
    world.pass_time(0)
    assert world.model("a").reserved == 2


# What no worker has seen


def test_a_load_that_did_not_reach_the_engine_is_tried_again_for_those_who_wait(make_world: MakeWorld) -> None:
    world = make_world(2)
    request = world.request("a", wait=30)
    world.end("a", EngineUnavailable("the connection broke"))
    assert request.waiting
    assert world.running() == []
    world.lose_engine()
    world.pass_time(10)
    assert request.waiting
    world.call(world.scheduler.on_engine_ready)
    world.end("a")
    assert request.holding


def test_without_an_engine_the_wait_ends_with_503_and_a_time_to_come_back(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.lose_engine()
    request = world.request("a", wait=3)
    world.pass_time(4)
    assert isinstance(request.error, EngineUnavailable)
    assert request.error.retry_after


@pytest.mark.parametrize("error", [WorkerDied("killed"), ModelNotFound("removed")])
def test_what_is_no_fault_of_the_model_does_not_keep_it_from_the_next_try(
    make_world: MakeWorld, error: WorkerDied | ModelNotFound
) -> None:
    world = make_world(2)
    request = world.request("a")
    world.end("a", error)
    assert request.error is error
    world.request("a")
    assert world.running() == ["load a"]


# Many archives


def test_what_was_merely_seen_is_forgotten_beyond_a_bound(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "MAX_REMEMBERED", 3)
    world = make_world(2)
    world.call(world.scheduler.pin, archive("pinned"), True)
    world.loaded("a", "b")
    for number in range(20):
        world.request(f"m{number}", wait=0)
    names = {m.archive.name for m in world.scheduler.models()}
    assert {"a", "b", "pinned", "m19"} <= names
    assert len(names) <= 3 + 3 + 1
    assert world.model("pinned").pinned


def test_an_event_looks_only_at_what_is_in_memory_or_waits(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(2)
    world.engine.load_seconds = world.engine.unload_seconds = 0.1
    for number in range(50):
        world.request(f"m{number}", seconds=0)
        world.pass_time(1)
    looked_at: set[str] = set()
    in_use = Model.in_use.fget
    monkeypatch.setattr(
        Model,
        "in_use",
        property(lambda self: (looked_at.add(self.archive.name), in_use(self))[1]),  # type: ignore[misc]
    )
    ready = next(m.archive.name for m in world.scheduler.models() if m.state is State.READY)
    assert world.request(ready).holding
    assert len(looked_at) <= 3
