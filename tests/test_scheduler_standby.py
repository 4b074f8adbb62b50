"""The standby worker in the accounts: the next load takes it over, and it goes before anybody else has to."""

import pytest
from scheduling import MakeWorld, World, archive

from serve.errors import OutOfMemory
from serve.residency.events import What
from serve.residency.model import Taken
from serve.residency.scheduler import State


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """Room for three models of 2, of which a standby worker is 1 before it is one of them."""
    world = make_world(6, standby=1)
    for name in "abcd":
        world.device.predicted[name] = 2
    world.call(world.scheduler.on_standby)
    return world


def test_there_is_one_from_the_start_and_again_after_each_load(world: World) -> None:
    assert world.warm.prepared == 1
    world.request("a").finish()
    assert (world.warm.taken, world.warm.standby) == (1, False)
    assert world.warm.prepared == 1  # not beside the load
    world.end("a")
    assert (world.warm.prepared, world.warm.standby) == (2, True)


def test_a_load_that_takes_it_over_needs_no_room_for_it(world: World) -> None:
    world.loaded("a", "b")
    assert world.warm.standby
    request = world.request("c")  # 2 and 2, and 1 of the standby worker, of 6
    assert world.running() == ["load c"]
    world.end("c")
    assert request.holding
    # Nothing is left for another.
    assert not world.warm.standby
    assert world.running() == []


def test_there_is_none_where_it_has_no_room_until_there_is(world: World) -> None:
    world.loaded("a", "b", "c")
    assert not world.warm.standby
    world.start(world.scheduler.unload("a"))
    world.end("a")
    assert world.warm.standby


def test_a_request_that_needs_its_memory_gets_it_and_nobody_else_has_to_go(world: World) -> None:
    world.device.peaks["b"] = 4
    world.loaded("a", "b")
    request = world.request("b")
    assert not request.holding
    assert world.running() == []
    world.pass_time(0.1)
    assert request.holding
    assert not world.warm.standby
    assert world.state("a") is State.READY
    # Not before the next load: it would come and go with every such request.
    request.finish()
    world.pass_time(10)
    assert not world.warm.standby


def test_a_waking_that_needs_its_memory_gets_it(make_world: MakeWorld) -> None:
    world = make_world(4, host_budget=9, standby=1)
    for name in "abc":
        world.device.predicted[name], world.device.parked[name] = 2, Taken(0, 2)
    world.loaded("a", "b")
    world.request("c").finish()
    world.end("a")
    world.end("c")
    world.start(world.scheduler.unload("b"))
    world.end("b")
    assert world.warm.standby
    request = world.request("a")
    assert world.running() == []
    world.pass_time(0.1)
    assert world.running() == ["wake a"]
    world.end("a")
    assert request.holding


def test_a_device_that_turns_out_full_gets_its_memory_first(world: World) -> None:
    world.loaded("a")
    world.device.predicted["b"] = 2
    request = world.request("b")
    world.call(world.warm.prepare_standby)  # as if the load had not taken it
    world.end("b", OutOfMemory("no"))
    assert world.running() == []
    world.pass_time(0.2)
    assert world.running() == ["load b"]
    world.end("b")
    assert request.holding
    assert world.events[What.LOAD_OUT_OF_MEMORY] == 1
    assert world.state("a") is State.READY


def test_one_that_is_lost_is_not_made_anew_by_itself(world: World) -> None:
    world.loaded("a")
    before = world.warm.prepared
    world.call(world.warm.lose)
    world.pass_time(100)
    assert world.warm.prepared == before


def test_after_the_engine_was_lost_there_is_another(world: World) -> None:
    world.lose_engine()
    assert not world.warm.standby
    world.call(world.scheduler.on_engine_ready)
    assert world.warm.standby


def test_a_model_larger_than_the_budget_without_it_is_loaded(world: World) -> None:
    world.device.predicted["a"] = 6
    request = world.request("a")
    assert world.running() == ["load a"]
    world.end("a")
    assert request.holding
    assert archive("a") == world.model("a").archive
