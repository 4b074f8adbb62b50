"""Clients are served in turn, however many requests each of them sends."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import MakeWorld, Request, World, archive

from serve.errors import QueueFull

BATCH, PERSON = "batch", "person"


@pytest.mark.parametrize("running", [0.1, 0.5, 0.9])
def test_a_click_waits_for_no_more_of_a_batch_than_what_runs(make_world: MakeWorld, running: float) -> None:
    world = make_world(1, queue_per_model=64)
    world.loaded("a")
    for _ in range(64):
        world.request("a", seconds=1, client=BATCH, wait=1000)
    for clicks in range(1, 6):
        world.pass_time(running)
        click = world.request("a", seconds=0.1, client=PERSON)
        assert click.waiting
        world.pass_time(1 - running)
        assert click.holding, clicks
        world.pass_time(0.1)
        assert click.served
    world.pass_time(100)
    assert all(r.served for r in world.requests)


def test_a_person_who_clicks_on_and_on_lets_the_batch_on_too(make_world: MakeWorld) -> None:
    world = make_world(1)
    world.loaded("a")
    batch = [world.request("a", seconds=1, client=BATCH, wait=1000) for _ in range(10)]

    async def clicking() -> None:
        while not all(r.task.done() for r in batch):
            async with world.scheduler.lease(archive("a"), client=PERSON):
                done.append(sum(r.served for r in batch))

    done: list[int] = []
    world.start(clicking())
    world.pass_time(100)
    assert all(r.served for r in batch)
    assert done[:10] == list(range(1, 11))  # one click after each of the batch


def test_a_batch_over_many_models_lets_a_model_of_another_load_next(make_world: MakeWorld) -> None:
    world = make_world(1, minimum_stay=0)
    world.engine.load_seconds = world.engine.unload_seconds = 1
    for name in "abcd":
        world.request(name, seconds=0.1, client=BATCH, wait=1000)
    world.pass_time(0.5)
    assert world.running() == ["load a"]
    click = world.request("e", seconds=0.1, client=PERSON)
    world.pass_time(2.5)
    assert world.engine.log == ["load a", "unload a", "load e"]
    world.pass_time(100)
    assert click.served
    assert [each for each in world.engine.log if "unload" not in each] == [f"load {name}" for name in "aebcd"]
    assert all(r.served for r in world.requests)


def test_room_to_work_in_goes_to_clients_in_turn(make_world: MakeWorld) -> None:
    """Two models are loaded, and a request of either takes all the room that is left."""
    world = make_world(4)
    world.device.peaks = {"a": 3, "b": 3}
    world.loaded("a", "b")
    for _ in range(5):
        world.request("a", seconds=1, client=BATCH, wait=1000)
    world.pass_time(0.5)
    click = world.request("b", seconds=0.1, client=PERSON)
    assert click.waiting
    world.pass_time(0.5)
    assert click.holding


requests = st.lists(
    st.tuples(
        st.sampled_from("ab"),  # the model
        st.sampled_from(["x", "y", "z", ""]),  # the client
        st.sampled_from([0.1, 0.3, 1.0]),  # seconds that it takes
        st.sampled_from([0, 0, 0, 0.05, 0.7]),  # seconds until the next
        st.sampled_from([None, None, None, 0.2]),  # seconds until it gives up
    ),
    max_size=40,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, database=None)
@given(requests)
def test_no_client_is_served_twice_while_another_waits(mix: list[tuple[str, str, float, float, float | None]]) -> None:
    """By one model: between two grants to one client each other that waits has had one."""
    world = World(2, queue_per_model=100)
    world.loaded("a", "b")
    world.requests.clear()
    made: list[Request] = []
    for name, client, seconds, pause, patience in mix:
        made.append(world.request(name, seconds=seconds, client=client, wait=patience or 1000))
        world.pass_time(pause)
    world.pass_time(100)
    for request, (*_, patience) in zip(made, mix, strict=True):
        assert request.served or patience
    try:
        for name in "ab":
            check_turns([r for r in made if r.archive.name == name and r.served])
    finally:
        world.close()


def check_turns(served: list[Request]) -> None:
    granted = sorted(served, key=lambda r: r.since + r.waited)
    for place, second in enumerate(granted):
        before = [i for i, r in enumerate(granted[:place]) if r.client == second.client]
        if not before:
            continue
        first = granted[before[-1]]
        between = {r.client for r in granted[before[-1] : place]}
        for other in granted[place + 1 :]:
            waited = other.since < first.since + first.waited
            assert not waited or other.client in between, f"{second.client} twice, and {other.client} waited"


# Full queues


def test_who_is_alone_may_fill_a_queue(make_world: MakeWorld) -> None:
    world = make_world(2, queue_per_model=4)
    mine = [world.request("a", client=BATCH) for _ in range(5)]
    assert [r.waiting for r in mine] == [True] * 4 + [False]
    error = mine[4].error
    assert isinstance(error, QueueFull)
    assert error.retry_after


@pytest.mark.parametrize("limits", [{"queue_per_model": 4}, {"queue_total": 4}])
def test_in_a_full_queue_whoever_has_most_makes_room(make_world: MakeWorld, limits: dict[str, int]) -> None:
    world = make_world(2, **limits)
    mine = [world.request("a", client=BATCH) for _ in range(4)]
    others = [world.request("a", client=PERSON) for _ in range(2)]
    assert [r.waiting for r in mine] == [True, True, False, False]
    assert all(isinstance(r.error, QueueFull) for r in mine[2:])
    assert all(r.waiting for r in others)
    assert isinstance(world.request("a", client=PERSON).error, QueueFull)  # as many as the other has
    assert world.request("a", client="third").waiting
    assert not mine[1].waiting
    assert mine[0].waiting


def test_many_clients_keep_nobody_out_who_has_nothing_there(make_world: MakeWorld) -> None:
    world = make_world(2, queue_per_model=8)
    for number in range(16):
        world.request("a", client=f"batch-{number % 4}")
    click = world.request("a", client=PERSON)
    assert click.waiting
    world.end("a")
    for request in world.requests:
        request.finish()
    world.pass_time(1)
    assert click.served
