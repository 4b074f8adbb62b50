"""Parking: a model that has to leave the device keeps its worker and waits in host memory, as long as there is room."""

import pytest
from scheduling import MakeWorld, Request, World, archive

from serve.errors import EngineUnavailable, OutOfMemory
from serve.residency.events import What
from serve.residency.model import Reason, Taken
from serve.residency.scheduler import State


@pytest.fixture
def parking(make_world: MakeWorld) -> World:
    """Room for two on the device and for two more in host memory."""
    world = make_world(2, host_budget=2)
    world.parkable(a=1, b=1, c=1, d=1, e=1)
    return world


def test_who_has_to_leave_is_parked_and_comes_back_by_waking(parking: World) -> None:
    parking.loaded("a", "b")
    parking.request("c")
    assert parking.running() == ["park a"]
    parking.end("a")
    assert (parking.state("a"), parking.model("a").reserved, parking.model("a").host) == (State.PARKED, 0, 1)
    assert parking.running() == ["load c"]
    parking.end("c")

    again = parking.request("a")
    assert parking.running() == ["park b"]
    parking.end("b")
    assert parking.running() == ["wake a"]
    parking.end("a")
    assert again.holding
    model = parking.model("a")
    assert (model.state, model.loads, model.wakes, model.host) == (State.READY, 1, 1, 0)
    assert parking.events[What.PARKED] == 2
    assert parking.events[What.WOKEN] == 1


def test_a_full_host_sends_the_one_parked_longest_to_disk(parking: World) -> None:
    parking.loaded("a", "b")
    for name, leaves in (("c", "a"), ("d", "b")):
        request = parking.request(name)
        parking.end(leaves)
        parking.end(name)
        request.finish()
        parking.pass_time(1)
    parking.request("e")
    assert parking.running() == ["unload a"]  # host memory first
    parking.end("a")
    assert parking.running() == ["park c"]
    parking.end("c")
    parking.end("e")
    assert [parking.state(name) for name in "abcde"] == [
        State.ABSENT, State.PARKED, State.PARKED, State.READY, State.READY,
    ]  # fmt: skip
    assert parking.events[Reason.HOST_MEMORY] == 1


def test_who_leaves_the_host_for_another_victim_is_no_victim_once_more(make_world: MakeWorld) -> None:
    world = make_world(4, host_budget=1)
    world.device.predicted = {"a": 1, "b": 2, "c": 2, "d": 4}
    world.device.parked = {"a": Taken(0, 1), "c": Taken(1, 1)}
    world.loaded("c")
    for _ in range(3):
        world.request("c").finish()  # in more demand than a and b
    a = world.request("a")
    world.end("a")
    b = world.request("b")
    world.end("c")  # parked: a is busy
    world.end("b")
    a.finish()
    b.finish()
    world.request("d")  # a is to be parked in place of c, which is to go, too
    assert world.running() == ["unload b", "unload c"]
    world.end("c")
    assert world.running() == ["park a", "unload b"]
    world.end("a")
    world.end("b")
    assert world.running() == ["load d"]


def test_without_host_budget_nothing_is_parked(make_world: MakeWorld) -> None:
    world = make_world(1)
    world.parkable(a=1)
    world.loaded("a")
    world.request("b")
    assert world.running() == ["unload a"]


def test_what_cannot_be_parked_is_unloaded(parking: World) -> None:
    parking.device.parked.clear()
    parking.loaded("a", "b")
    parking.request("c")
    assert parking.running() == ["unload a"]


def test_where_parking_frees_too_little_models_are_unloaded(make_world: MakeWorld) -> None:
    world = make_world(4, host_budget=9)
    world.device.predicted = {"a": 2, "b": 2, "c": 4}
    world.device.parked = {"a": Taken(1, 1), "b": Taken(1, 1)}
    world.loaded("a", "b")
    world.request("c")
    assert world.running() == ["unload a", "unload b"]


def test_what_parked_models_keep_of_the_device_goes_last(make_world: MakeWorld) -> None:
    world = make_world(4, host_budget=9)
    world.device.predicted = {"a": 2, "b": 2, "c": 1, "d": 2}
    world.device.parked = {"a": Taken(1, 1)}
    world.loaded("a", "b")
    world.request("c")
    world.end("a")
    assert world.state("a") is State.PARKED
    world.end("c")
    world.request("d")  # 1 of "a", 2 of "b" and 1 of "c", which is busy: b's going is enough
    assert world.running() == ["unload b"]
    assert world.state("a") is State.PARKED


def test_a_request_for_a_model_that_is_being_parked_wakes_it(parking: World) -> None:
    parking.loaded("a", "b")
    parking.request("c")
    parking.pass_time(1)
    request = parking.request("a")
    parking.end("a")  # parked
    parking.end("c")
    parking.end("b")  # parked, too
    assert parking.running() == ["wake a"]
    parking.end("a")
    assert request.holding


def test_a_copy_that_a_woken_model_keeps_counts_and_serves_again(parking: World) -> None:
    parking.engine.keeps_copies = True
    request = parked_and_asked_for(parking)  # b is parked, too: the host is full
    parking.end("a")
    request.finish()
    parking.pass_time(1)
    assert parking.model("a").host == 1
    parking.request("b")  # c has been idle longest, and only a has room in host memory
    assert parking.running() == ["unload c"]
    parking.end("c")
    parking.end("b")
    parking.request("d")
    assert parking.running() == ["park a"]


def test_a_failed_parking_becomes_an_unload(parking: World) -> None:
    parking.loaded("a", "b")
    parking.request("c")
    parking.end("a", EngineUnavailable("no"))
    assert parking.running() == ["unload a"]
    parking.end("a")
    assert parking.running() == ["load c"]
    assert parking.model("a").host == 0


def test_a_failed_waking_becomes_a_load(parking: World) -> None:
    request = parked_and_asked_for(parking)
    parking.end("a", EngineUnavailable("no"))
    assert parking.running() == ["unload a"]
    parking.end("a")
    assert parking.running() == ["load a"]
    parking.end("a")
    assert request.holding


def test_a_waking_without_room_makes_some_and_tries_again(parking: World) -> None:
    request = parked_and_asked_for(parking)
    parking.end("a", OutOfMemory("no"))
    assert parking.state("a") is State.PARKED
    assert parking.running() == ["unload b"]  # host memory is full
    parking.end("b")
    assert parking.running() == ["park c"]
    parking.end("c")
    parking.end("a")
    assert request.holding


def test_a_waking_without_room_and_nobody_left_to_go_is_an_error(parking: World) -> None:
    request = parked_and_asked_for(parking)
    parking.request("c")  # keeps it
    parking.end("a", OutOfMemory("no"))
    assert isinstance(request.error, OutOfMemory)
    assert parking.state("a") is State.PARKED


@pytest.mark.parametrize("how", ["unload", "worker lost", "replaced"])
def test_a_parked_model_goes_to_disk_when_told_to(parking: World, how: str) -> None:
    parking.loaded("a", "b")
    parking.request("c").finish()
    parking.end("a")
    parking.end("c")
    assert parking.state("a") is State.PARKED
    if how == "unload":
        parking.start(parking.scheduler.unload("a"))
    elif how == "worker lost":
        parking.lose_worker("a")
    else:
        parking.request("a", version=2)
    assert "unload a" in parking.running()
    model = next(m for m in parking.scheduler.models() if m.archive == archive("a"))
    parking.end("a")
    assert (model.state, model.host, model.reserved) == (State.ABSENT, 0, 0)


def parked_and_asked_for(world: World) -> Request:
    """a is parked, c idle, b parked as well; a request waits while a wakes."""
    world.loaded("a", "b")
    world.start(world.scheduler.load(archive("c")))
    world.end("a")
    world.end("c")
    world.pass_time(1)
    request = world.request("a")
    world.end("b")
    assert world.running() == ["wake a"]
    return request
