"""Suspension: a parked model keeps a piece of the device, which it gives back where the driver can take it away."""

import pytest
from scheduling import MakeWorld, World, archive

from serve.errors import DeadlineExceeded, EngineUnavailable, OutOfMemory, PalimpsestError
from serve.residency.events import What
from serve.residency.model import Reason, Taken
from serve.residency.scheduler import State


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """Room for one that works and one that is parked; models of 2, of which parking leaves 1 on the device."""
    world = make_world(3, host_budget=10)
    world.device.suspends = True
    for name in "abcd":
        world.device.predicted[name], world.device.parked[name] = 2, Taken(1, 2)
    return world


def suspended(world: World) -> None:
    """a is suspended, b parked, c idle and loaded."""
    world.loaded("a")
    world.request("b").finish()
    world.end("a")
    world.end("b")
    world.pass_time(1)
    world.request("c").finish()
    # Parking b alone would leave 1 of a and 1 of b: a has been there longest.
    assert world.running() == ["park b", "suspend a"]
    world.end("a")
    world.end("b")
    world.end("c")
    world.pass_time(1)
    assert [world.state(name) for name in "abc"] == [State.SUSPENDED, State.PARKED, State.READY]


def test_parked_models_are_suspended_for_room_and_come_back_by_waking(world: World) -> None:
    suspended(world)
    model = world.model("a")
    assert (model.reserved, model.host) == (0, 3)
    assert (world.events[What.PARKED], world.events[What.SUSPENDED]) == (2, 1)
    request = world.request("a")
    assert world.running() == ["park c", "suspend b"]
    world.end("b")
    world.end("c")
    assert world.running() == ["wake a"]
    world.end("a")
    assert request.holding
    assert (model.state, model.loads, model.wakes, model.reserved, model.host) == (State.READY, 1, 1, 2, 0)


def test_where_parking_frees_too_little_a_model_is_suspended_at_once(world: World) -> None:
    world.device.predicted["c"] = 3
    world.loaded("a")
    world.request("c")
    assert world.running() == ["park a"]
    world.end("a")
    assert world.state("a") is State.SUSPENDING
    assert world.running() == ["suspend a"]
    world.end("a")
    assert world.running() == ["load c"]
    assert world.events[Reason.MEMORY] == 1


def test_where_the_driver_cannot_all_is_as_it_was(world: World) -> None:
    world.device.suspends = False
    world.loaded("a")
    world.request("b").finish()
    world.end("a")
    world.end("b")
    world.pass_time(1)
    world.request("c")
    assert world.running() == ["park b", "unload a"]


@pytest.mark.parametrize("error", [EngineUnavailable("no"), DeadlineExceeded("late")])
def test_a_failed_suspension_becomes_an_unload(world: World, error: PalimpsestError) -> None:
    world.device.predicted["c"] = 3
    world.loaded("a")
    request = world.request("c")
    world.end("a")
    world.end("a", error)
    assert world.running() == ["unload a"]
    world.end("a")
    world.end("c")
    assert request.holding
    assert (world.model("a").state, world.model("a").host) == (State.ABSENT, 0)


@pytest.mark.parametrize("error", [EngineUnavailable("no"), DeadlineExceeded("late"), OutOfMemory("no")])
def test_a_failed_resumption_becomes_a_load_and_the_request_is_served(world: World, error: PalimpsestError) -> None:
    """A process that the driver could not restore never works again, whatever the reason."""
    suspended(world)
    request = world.request("a")
    world.end("b")
    world.end("c")
    world.end("a", error)
    assert world.running() == ["unload a"]
    world.end("a")
    assert world.running() == ["load a"]
    world.end("a")
    assert request.holding


@pytest.mark.parametrize("how", ["unload", "worker lost", "replaced", "keep-alive"])
def test_a_suspended_model_goes_to_disk_when_told_to(make_world: MakeWorld, how: str) -> None:
    world = make_world(3, host_budget=10, keep_alive=100 if how == "keep-alive" else None)
    world.device.suspends = True
    for name in "abc":
        world.device.predicted[name], world.device.parked[name] = 2, Taken(1, 2)
    suspended(world)
    model = world.model("a")
    if how == "unload":
        world.start(world.scheduler.unload("a"))
    elif how == "worker lost":
        world.lose_worker("a")
    elif how == "replaced":
        world.request("a", version=2)
    else:
        world.pass_time(100)
    assert "unload a" in world.running()
    world.end("a")
    assert (model.state, model.host, model.reserved) == (State.ABSENT, 0, 0)


def test_a_worker_lost_while_it_is_being_suspended_is_cleared_away(world: World) -> None:
    world.device.predicted["c"] = 3
    world.loaded("a")
    world.request("c")
    world.end("a")
    world.lose_worker("a")
    world.end("a", EngineUnavailable("its worker ended"))
    world.end("a")  # the unload
    assert world.state("a") is State.ABSENT
    assert world.running() == ["load c"]


def test_a_full_host_sends_to_disk_who_has_been_away_longest(world: World) -> None:
    world.device.host_budget = 6
    suspended(world)  # 3 of a, 2 of b
    world.request("d")  # c is to be parked, b to be suspended: 2 and 1 more
    assert "unload a" in world.running()
    assert world.state("b") is State.SUSPENDING
    for name in ("a", "b", "c", "d"):
        world.end(name)
    assert [world.state(name) for name in "abcd"] == [State.ABSENT, State.SUSPENDED, State.PARKED, State.READY]
    assert world.events[Reason.HOST_MEMORY] == 1


def test_a_request_for_a_model_that_is_being_suspended_wakes_it_when_its_turn_comes(world: World) -> None:
    world.device.predicted["c"] = 3
    world.loaded("a")
    first = world.request("c")
    world.end("a")
    world.pass_time(1)
    request = world.request("a")
    world.end("a")
    world.end("c")
    assert first.holding
    assert world.state("a") is State.SUSPENDED
    first.finish()
    world.pass_time(2)
    world.end("c")
    world.end("a")
    assert request.holding


def test_shutting_down_leaves_no_suspension_running(world: World) -> None:
    """The fixture's end checks that nothing is left."""
    world.device.predicted["c"] = 3
    world.loaded("a")
    world.request("c")
    world.end("a")
    assert world.running() == ["suspend a"]


def test_what_is_suspended_takes_none_of_what_others_may_have(world: World) -> None:
    """Many more models than the device holds, all of them with a worker."""
    world.device.host_budget = 100
    names = [f"m{number}" for number in range(20)]
    for name in names:
        world.device.predicted[name], world.device.parked[name] = 2, Taken(1, 2)
    world.engine.load_seconds = world.engine.unload_seconds = 0.1
    for _ in range(2):
        for name in names:
            request = world.request(name, seconds=0)
            world.pass_time(5)
            assert request.served
    assert all(world.model(name).loads == 1 for name in names)
    assert all(world.model(name).wakes == 1 for name in names[:-2])
    assert archive(names[0]) in [m.archive for m in world.scheduler.active()]
