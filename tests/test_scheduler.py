"""The scheduler's rules one by one, in virtual time: nothing sleeps, nothing listens."""

import asyncio

import pytest
from scheduling import MakeWorld, Request, World, archive

from serve.errors import EngineUnavailable, ModelLoadFailed, ModelNotReady, OutOfMemory, PalimpsestError, QueueFull
from serve.residency.events import What
from serve.residency.model import Reason
from serve.residency.scheduler import Model, State


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """Room for two models of size 1."""
    return make_world(2)


def holding(*requests: Request) -> list[bool]:
    return [r.holding for r in requests]


# Loads and leases


def test_many_requests_share_one_load_and_take_turns(world: World) -> None:
    a, b, c = (world.request("a") for _ in range(3))
    assert world.engine.log == ["load a"]
    world.end("a")
    assert holding(a, b, c) == [True, False, False]
    a.finish()
    world.pass_time(0)
    assert holding(a, b, c) == [False, True, False]
    b.finish()
    c.finish()
    world.pass_time(0)
    assert a.served
    assert b.served
    assert c.served
    assert world.engine.log == ["load a"]


def test_a_request_for_a_ready_model_is_a_hit_and_waits_for_nothing(world: World) -> None:
    world.loaded("a")
    request = world.request("a", wait=0)
    assert request.holding
    assert request.waited == 0
    model = world.model("a")
    assert (model.requests, model.hits, model.loads) == (2, 1, 1)


def test_a_request_that_leaves_does_not_end_the_load(world: World) -> None:
    world.request("a").cancel()
    world.pass_time(0)
    world.end("a")
    assert world.state("a") is State.READY
    assert world.request("a").holding
    assert world.engine.log == ["load a"]


def test_load_returns_when_the_model_is_ready_and_at_once_where_it_is(world: World) -> None:
    loading = world.start(world.scheduler.load(archive("a")))
    assert not loading.done()
    world.end("a")
    assert loading.done()
    assert world.state("a") is State.READY
    world.request("a")
    assert world.start(world.scheduler.load(archive("a"), 0)).done()  # though its worker is busy


def test_one_load_at_a_time_in_the_order_of_arrival(make_world: MakeWorld) -> None:
    world = make_world(9)
    for name in "abc":
        world.request(name)
    assert world.running() == ["load a"]
    world.end("a")
    assert world.running() == ["load b"]


def test_nothing_is_looked_at_again_while_a_load_must_end_first(world: World) -> None:
    world.request("a")
    world.request("b")
    assert world.scheduler._timer is None


def test_several_loads_at_a_time_where_the_limit_allows(make_world: MakeWorld) -> None:
    world = make_world(9, concurrent_loads=2)
    for name in "abc":
        world.request(name)
    assert world.running() == ["load a", "load b"]


@pytest.mark.parametrize(("budget", "capacity"), [(2, 9), (9, 2)])
def test_loads_that_run_together_share_what_there_is(make_world: MakeWorld, budget: int, capacity: int) -> None:
    world = make_world(budget, capacity, concurrent_loads=2)
    world.device.predicted["b"] = 2
    world.request("a")
    world.request("b")
    assert world.running() == ["load a"]


# Eviction


def test_the_model_unused_longest_makes_room(world: World) -> None:
    world.loaded("a", "b")
    world.request("a").finish()
    world.pass_time(1)
    world.request("c")
    assert world.engine.log == ["unload b"]
    world.end("b")
    assert world.engine.log == ["unload b", "load c"]
    assert world.state("a") is State.READY
    assert world.events[Reason.MEMORY] == 1


def test_an_idle_model_goes_before_a_busy_one_however_old(world: World) -> None:
    world.loaded("a", "b")
    world.request("a")
    world.pass_time(100)
    world.request("c")
    assert world.running() == ["unload b"]


@pytest.mark.parametrize(("eviction", "gone"), [("lrfu", "b"), ("lru", "a")])
def test_the_setting_says_whether_often_or_lately_counts(make_world: MakeWorld, eviction: str, gone: str) -> None:
    world = make_world(2, eviction=eviction)
    world.loaded("a", "b")
    for name in "aaab":
        world.request(name).finish()
        world.pass_time(1)
    world.request("c")
    assert world.engine.log == [f"unload {gone}"]


def test_evicted_bytes_stay_reserved_until_the_unload_has_returned(world: World) -> None:
    world.loaded("a", "b")
    world.request("c")
    assert sum(m.reserved for m in world.scheduler.models()) == 2
    assert world.running() == ["unload a"]
    world.request("d")
    assert world.running() == ["unload a"]  # one unload serves c; d waits behind it
    world.end("a")
    assert world.running() == ["load c"]


def test_a_pinned_model_is_never_evicted(world: World) -> None:
    world.loaded("a", "b")
    world.call(world.scheduler.pin, archive("a"), True)
    world.request("c")
    assert world.running() == ["unload b"]


def test_a_busy_model_is_drained_after_its_minimum_stay_and_not_before(make_world: MakeWorld) -> None:
    world = make_world(1, minimum_stay=2)
    running, queued, _ = world.request("a"), world.request("a"), world.end("a")
    other = world.request("b")
    world.pass_time(1.9)
    assert world.state("a") is State.READY
    world.pass_time(0.2)
    assert world.state("a") is State.DRAINING
    assert running.holding  # what runs is not disturbed
    running.finish()
    world.pass_time(0)
    assert world.running() == ["unload a"]
    assert queued.waiting  # nothing new is admitted
    world.end("a")
    world.end("b")
    assert other.holding
    other.finish()
    world.pass_time(3)
    world.end("b")
    world.end("a")
    assert queued.holding  # and has lost nothing but time


def test_a_small_model_does_not_overtake_a_large_one(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.device.predicted = {"large": 3}
    world.loaded("a")
    busy = world.request("a")
    world.request("large")
    world.request("small")
    assert world.running() == []
    world.pass_time(5)
    busy.finish()
    world.pass_time(0)
    world.end("a")
    assert world.running() == ["load large"]


def test_when_the_first_in_line_leaves_it_is_the_next_ones_turn(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.device.predicted = {"large": 3}
    world.loaded("a")
    world.request("a")
    large = world.request("large")
    world.request("small")
    large.cancel()
    world.pass_time(0)
    assert world.running() == ["load small"]


def test_a_model_larger_than_predicted_is_made_up_for_by_idle_ones(make_world: MakeWorld) -> None:
    world = make_world(4, capacity=9)
    world.loaded("a", "b", "c")
    world.device.actual["d"] = 3
    world.request("d")
    world.end("d")
    assert world.running() == ["unload a", "unload b"]


def test_a_model_that_grew_while_it_worked_is_made_up_for(make_world: MakeWorld) -> None:
    world = make_world(3, capacity=9)
    world.loaded("a", "b", "c")
    world.request("c")
    world.call(world.scheduler.on_footprint, "c@1", 2)
    assert world.running() == ["unload a"]


def test_a_model_that_shrank_lets_the_next_one_in(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.device.predicted["a"] = 4
    world.loaded("a")
    world.request("a")
    world.request("b")
    assert world.running() == []
    world.device.held["a@1"] = 2
    world.call(world.scheduler.on_footprint, "a@1", 2)
    assert world.running() == ["load b"]


@pytest.mark.parametrize("keep_alive", [0, 10])
def test_an_idle_model_goes_when_its_keep_alive_has_passed(make_world: MakeWorld, keep_alive: float) -> None:
    world = make_world(2, keep_alive=keep_alive)
    first, second = world.request("a"), world.request("a")
    world.end("a")
    first.finish()
    world.pass_time(0)
    assert second.holding  # not between two requests
    world.pass_time(30)
    second.finish()
    world.pass_time(0)
    if keep_alive:
        world.pass_time(keep_alive - 0.1)
        assert world.state("a") is State.READY
        world.pass_time(0.2)
    assert world.running() == ["unload a"]
    assert world.events[Reason.KEEP_ALIVE] == 1


def test_without_keep_alive_an_idle_model_stays_and_no_timer_runs(world: World) -> None:
    world.loaded("a")
    world.pass_time(1e6)
    assert world.state("a") is State.READY
    assert world.scheduler._timer is None


def test_a_pinned_model_does_not_expire(make_world: MakeWorld) -> None:
    world = make_world(2, keep_alive=10)
    world.call(world.scheduler.pin, archive("a"), True)
    world.loaded("a")
    world.pass_time(100)
    world.request("b")
    assert world.state("a") is State.READY
    world.call(world.scheduler.pin, archive("a"), False)
    assert world.running() == ["load b", "unload a"]


# Fairness


def clients(world: World, name: str, count: int, until: float, waits: list[float]) -> None:
    """So many clients that ask again as soon as they have their answer, which takes 0.3 s."""

    async def ask() -> None:
        while world.loop.time() < until:
            began = world.loop.time()
            async with world.scheduler.lease(archive(name)):
                waits.append(world.loop.time() - began)
                await asyncio.sleep(0.3)

    for _ in range(count):
        world.loop.create_task(ask())


def test_no_model_starves_behind_a_hot_one(make_world: MakeWorld) -> None:
    """Each turn of a model costs its stay, the request that runs, an unload and a load: 2 + 0.3 + 0.5 + 1 s."""
    world = make_world(1, minimum_stay=2, wait=1000)
    world.engine.load_seconds, world.engine.unload_seconds = 1.0, 0.5
    waits: dict[str, list[float]] = {name: [] for name in "abcd"}
    clients(world, "a", 40, 300, waits["a"])
    for name in "bcd":
        clients(world, name, 1, 300, waits[name])
    world.pass_time(400)
    round_ = 4 * (2 + 0.3 + 0.5 + 1)
    assert all(max(w) <= round_ for name, w in waits.items() if name != "a")
    assert min(len(w) for w in waits.values()) >= 300 / round_ - 1
    assert len(waits["a"]) > 3 * len(waits["b"])  # and yet the hot model does most of the work


def test_two_hot_models_do_not_chase_each_other_out(make_world: MakeWorld) -> None:
    world = make_world(1, minimum_stay=2)
    world.engine.load_seconds = world.engine.unload_seconds = 0.1
    waits: dict[str, list[float]] = {"a": [], "b": []}
    for name in "ab":
        clients(world, name, 4, 100, waits[name])
    world.pass_time(150)
    assert world.events[What.LOADED] <= 100 / 2 + 2
    assert sum(len(w) for w in waits.values()) > 100 / 0.3 * 0.8


# Bounds


def test_a_full_queue_is_refused_at_once(make_world: MakeWorld) -> None:
    world = make_world(2, queue_per_model=2)
    world.request("a")
    world.request("a")
    error = world.request("a").error
    assert isinstance(error, QueueFull)
    assert error.retry_after > 0
    assert world.request("b").waiting


def test_all_queues_together_are_bounded_too(make_world: MakeWorld) -> None:
    world = make_world(2, queue_total=2)
    world.loaded("c")
    world.request("a")
    world.request("b")
    assert isinstance(world.request("d").error, QueueFull)
    assert world.request("c").holding  # it waits for nothing
    assert isinstance(world.request("c").error, QueueFull)


def test_a_request_waits_no_longer_than_its_deadline_and_the_load_goes_on(world: World) -> None:
    request = world.request("a", wait=3)
    world.pass_time(2.9)
    assert request.waiting
    world.pass_time(0.2)
    assert isinstance(request.error, ModelNotReady)
    assert request.error.retry_after > 0
    assert world.running() == ["load a"]
    world.end("a")
    assert world.request("a").holding


def test_a_model_larger_than_the_budget_is_refused_with_both_numbers(make_world: MakeWorld) -> None:
    world = make_world(8 << 20)
    world.device.predicted["a"] = 9 << 20
    world.loaded("b")
    error = world.request("a").error
    assert isinstance(error, OutOfMemory)
    assert "9 MiB" in error.message
    assert "8 MiB" in error.message
    assert world.engine.log == []


def test_a_model_for_which_pinned_ones_leave_no_room_is_refused_and_blocks_nobody(make_world: MakeWorld) -> None:
    world = make_world(8 << 20)
    world.device.predicted = {"pinned": 5 << 20, "large": 4 << 20}
    world.call(world.scheduler.pin, archive("pinned"), True)
    world.loaded("pinned")
    error = world.request("large").error
    assert isinstance(error, OutOfMemory)
    for number in ("4 MiB", "8 MiB", "5 MiB"):
        assert number in error.message
    assert world.request("small").waiting
    assert world.running() == ["load small"]


def test_a_waiting_model_is_refused_as_soon_as_it_can_no_longer_fit(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.device.predicted["large"] = 2
    world.loaded("a")
    world.request("a")
    large = world.request("large")
    assert large.waiting
    world.call(world.scheduler.pin, archive("a"), True)
    assert isinstance(large.error, OutOfMemory)


def test_a_model_that_leaves_stands_in_nobodys_way_though_it_is_pinned(make_world: MakeWorld) -> None:
    world = make_world(1)
    world.loaded("a")
    world.request("a")
    world.start(world.scheduler.unload("a"))
    world.call(world.scheduler.pin, archive("a"), True)
    assert world.request("b").waiting


# Memory that the books do not know of


def test_out_of_memory_in_a_load_evicts_one_idle_model_and_tries_again(make_world: MakeWorld) -> None:
    world = make_world(9, capacity=3)
    world.loaded("a", "b", "c")
    world.device.foreign = -1  # seemed free when the load began
    request = world.request("d")
    world.device.foreign = 0
    world.end("d")
    assert world.running() == ["unload a"]
    assert request.waiting
    world.end("a")
    assert world.running() == ["load d"]
    world.end("d")
    assert request.holding
    assert world.state("b") is world.state("c") is State.READY


def test_after_out_of_memory_the_next_try_waits_for_what_was_evicted(make_world: MakeWorld) -> None:
    world = make_world(9)
    world.loaded("a")
    world.request("b")
    world.end("b", OutOfMemory("whatever the device reports"))
    assert world.running() == ["unload a"]
    world.end("a")
    assert world.running() == ["load b"]


def test_out_of_memory_beside_a_model_that_leaves_is_not_the_end(make_world: MakeWorld) -> None:
    world = make_world(9)
    world.loaded("a")
    request = world.request("b")
    world.start(world.scheduler.unload("a"))
    world.end("b", OutOfMemory("no"))
    assert request.waiting
    world.end("a")
    world.end("b")
    assert request.holding


def test_out_of_memory_with_nothing_idle_left_disturbs_nothing_else(world: World) -> None:
    world.loaded("a")
    busy, queued = world.request("a"), world.request("a")
    request = world.request("b")
    world.end("b", OutOfMemory("no"))
    assert isinstance(request.error, OutOfMemory)
    assert "nothing idle" in request.error.message
    assert busy.holding
    assert queued.waiting
    assert world.state("a") is State.READY
    assert world.model("b").reserved == 0


def test_a_model_that_never_fits_does_not_evict_the_idle_ones_at_every_request(world: World) -> None:
    request = world.request("b")
    world.end("b", OutOfMemory("no"))
    assert isinstance(request.error, OutOfMemory)
    world.loaded("a")
    assert isinstance(world.request("b").error, OutOfMemory)
    assert world.engine.log == []
    world.pass_time(world.limits.failure_pause)
    world.request("b")
    assert world.running() == ["load b"]


def test_out_of_memory_evicts_nobody_for_a_model_that_nobody_waits_for(world: World) -> None:
    world.loaded("a")
    world.request("b").cancel()
    world.pass_time(0)
    world.end("b", OutOfMemory("no"))
    assert world.running() == []
    assert world.state("b") is State.ABSENT


def test_where_the_device_has_less_than_the_books_idle_models_go(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.loaded("a", "b")
    world.device.foreign = 2
    world.request("c")
    assert world.running() == ["unload a"]
    world.end("a")
    assert world.running() == ["load c"]


def test_memory_that_comes_back_late_is_waited_for(make_world: MakeWorld) -> None:
    world = make_world(1)
    world.engine.frees_late = True
    world.loaded("a")
    request = world.request("b")
    world.end("a")
    assert world.running() == []
    world.pass_time(3)
    assert world.running() == []
    world.device.foreign = 0
    world.pass_time(1)
    world.end("b")
    assert request.holding


def test_where_others_hold_the_device_a_smaller_model_may_pass(make_world: MakeWorld) -> None:
    world = make_world(4)
    world.device.foreign = 2
    world.device.predicted["large"] = 3
    large, small = world.request("large"), world.request("small")
    world.end("small")
    assert small.holding
    world.device.foreign = 0
    world.pass_time(1)
    world.end("large")
    assert large.holding


# Failures


def test_a_failed_load_fails_all_that_wait_and_is_tried_again_after_a_pause(make_world: MakeWorld) -> None:
    world = make_world(2, failure_pause=5)
    requests = [world.request("a") for _ in range(3)]
    world.end("a", ModelLoadFailed("broken"))
    assert [str(r.error) for r in requests] == ["broken"] * 3
    assert world.state("a") is State.FAILED
    assert world.model("a").failures == 1
    world.pass_time(4)
    assert isinstance(world.request("a").error, ModelLoadFailed)
    assert world.running() == []
    world.pass_time(1)
    again = world.request("a")
    world.end("a")
    assert again.holding
    assert world.model("a").error is None


def test_the_shared_error_does_not_grow_with_each_request_that_gets_it(world: World) -> None:
    world.request("a")
    world.end("a", ModelLoadFailed("broken"))

    def depth(request: Request) -> int:
        traceback, count = request.error.__traceback__, 0
        while traceback is not None:
            traceback, count = traceback.tb_next, count + 1
        return count

    first = depth(world.request("a"))
    assert depth([world.request("a") for _ in range(20)][-1]) == first


def test_an_error_that_nobody_foresaw_fails_the_load_and_blocks_nobody(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = world.request("a"), world.request("b")
    world.end("a", ZeroDivisionError("a bug"))
    assert isinstance(a.error, ModelLoadFailed)
    assert "a bug" in caplog.text
    world.end("b")
    assert b.holding


@pytest.mark.parametrize("error", [EngineUnavailable("no answer"), ZeroDivisionError("a bug")])
def test_an_unload_that_fails_ends_all_the_same(
    world: World, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    world.loaded("a", "b")
    c = world.request("c")
    world.end("a", error)
    assert "could not be unloaded cleanly" in caplog.text
    world.end("c")
    assert c.holding


def test_a_transition_that_is_not_in_the_diagram_raises() -> None:
    for start, end in [
        (State.ABSENT, State.READY),
        (State.READY, State.LOADING),
        (State.DRAINING, State.READY),
        (State.UNLOADING, State.READY),
        (State.FAILED, State.READY),
    ]:
        with pytest.raises(RuntimeError, match=f"{start.name} -> {end.name}"):
            Model(archive("a"), state=start).to(end)


# Versions, unloading, pinning


def test_a_replaced_archive_serves_new_requests_and_the_old_one_finishes(make_world: MakeWorld) -> None:
    world = make_world(3)
    running, queued, _ = world.request("a"), world.request("a"), world.end("a")
    new = world.request("a", version=2)
    world.end("a", version=2)
    assert new.holding
    assert running.holding
    running.finish()
    world.pass_time(0)
    assert queued.holding
    queued.finish()
    world.pass_time(0)
    assert world.running() == ["unload a"]
    world.end("a")
    assert [m.archive.path.name for m in world.scheduler.models()] == ["2"]
    assert world.events[Reason.STALE] == 1


def test_an_old_version_goes_even_if_the_queue_has_no_room_for_the_new_one(make_world: MakeWorld) -> None:
    world = make_world(9, queue_total=1)
    world.loaded("a")
    world.request("b")
    assert isinstance(world.request("a", version=2).error, QueueFull)
    assert world.running() == ["load b", "unload a"]


def test_an_old_version_is_not_forgotten_while_its_load_is_being_cancelled(world: World) -> None:
    world.engine.undo_seconds = 3
    old = world.request("a")
    world.lose_engine()
    old.cancel()
    world.request("a", version=2).cancel()
    again = world.request("a")
    world.call(world.scheduler.on_engine_ready)
    assert world.engine.log == ["load a"]
    world.pass_time(3)
    assert world.engine.log == ["load a", "load a"]
    world.end("a")
    assert again.holding


def test_a_version_that_comes_back_is_current_again(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.request("a")
    world.end("a")
    new = world.request("a", version=2)
    world.end("a", version=2)
    world.request("a")
    new.finish()
    world.pass_time(0)
    assert world.running() == ["unload a"]
    assert not world.model(archive("a", 1)).stale
    assert world.model(archive("a", 2)).stale


def test_a_new_version_inherits_the_pin(make_world: MakeWorld) -> None:
    world = make_world(3)
    world.call(world.scheduler.pin, archive("a"), True)
    world.loaded("a")
    world.request("a", version=2)
    assert world.model(archive("a", 2)).pinned
    assert world.running() == ["load a", "unload a"]


def test_unload_drains_and_returns_when_the_memory_is_back(world: World) -> None:
    world.loaded("a")
    request = world.request("a")
    unloading = world.start(world.scheduler.unload("a"))
    assert world.state("a") is State.DRAINING
    request.finish()
    world.pass_time(0)
    assert world.running() == ["unload a"]
    assert not unloading.done()
    world.end("a")
    assert unloading.done()
    assert world.state("a") is State.ABSENT


def test_unload_while_loading_waits_for_the_load(world: World) -> None:
    request = world.request("a")
    unloading = world.start(world.scheduler.unload("a"))
    world.end("a")
    assert world.running() == ["unload a"]
    assert request.waiting
    world.end("a")
    assert unloading.done()
    world.end("a")
    assert request.holding  # it has the model loaded again


def test_unload_of_a_load_that_fails_is_done(world: World) -> None:
    world.request("a")
    unloading = world.start(world.scheduler.unload("a"))
    world.end("a", ModelLoadFailed("broken"))
    assert unloading.done()
    assert unloading.exception() is None


def test_unload_takes_a_pinned_model_even_if_it_is_pinned_again(world: World) -> None:
    world.call(world.scheduler.pin, archive("a"), True)
    world.request("a")
    unloading = world.start(world.scheduler.unload("a"))
    world.call(world.scheduler.pin, archive("a"), True)
    world.end("a")
    assert world.running() == ["unload a"]
    world.end("a")
    assert unloading.done()


def test_unload_of_what_is_not_in_memory_is_a_key_error(world: World) -> None:
    assert isinstance(world.start(world.scheduler.unload("a")).exception(), KeyError)
    world.request("a")
    world.end("a", ModelLoadFailed("broken"))
    assert isinstance(world.start(world.scheduler.unload("a")).exception(), KeyError)


def test_two_unloads_share_one(world: World) -> None:
    world.loaded("a")
    first, second = (world.start(world.scheduler.unload("a")) for _ in range(2))
    first.cancel()
    world.end("a")
    assert first.cancelled()
    assert second.exception() is None
    assert world.engine.log == ["unload a"]


# Workers and the engine


def test_a_worker_lost_while_leased_is_cleared_away_and_loaded_again(world: World) -> None:
    world.loaded("a")
    running, queued = world.request("a"), world.request("a")
    world.lose_worker("a")
    assert world.running() == ["unload a"]
    world.end("a")
    world.end("a")
    assert queued.waiting  # the first still holds the lease whose worker is gone
    running.finish()
    world.pass_time(0)
    assert queued.holding


def test_a_worker_lost_while_idle_leaves_memory(world: World) -> None:
    world.loaded("a")
    world.lose_worker("a")
    world.end("a")
    assert world.state("a") is State.ABSENT
    assert world.running() == []


def test_a_worker_lost_while_draining_is_not_waited_for(world: World) -> None:
    world.loaded("a")
    world.request("a")
    world.start(world.scheduler.unload("a"))
    world.lose_worker("a")
    assert world.running() == ["unload a"]


def test_a_worker_lost_in_the_last_moment_of_its_load_serves_nobody(world: World) -> None:
    request = world.request("a")
    world.lose_worker("a")
    world.end("a")
    assert world.running() == ["unload a"]
    assert request.waiting
    world.end("a")
    world.end("a")
    assert request.holding


def test_a_worker_lost_in_the_moment_in_which_its_load_ends(world: World) -> None:
    request = world.request("a")
    world.engine.running["a@1"][1].set_result(None)
    world.lose_worker("a")  # before anyone else has heard of the load's end
    assert world.running() == ["unload a"]
    assert world.model("a").effect is not None
    world.end("a")
    world.end("a")
    assert request.holding


def test_news_of_an_unknown_or_absent_model_is_ignored(world: World) -> None:
    world.lose_worker("never seen")
    world.call(world.scheduler.on_footprint, "never seen", 5)
    world.request("a").cancel()
    world.end("a", ModelLoadFailed("broken"))
    world.lose_worker("a")
    world.call(world.scheduler.on_footprint, "a@1", 5)
    assert world.model("a").reserved == 0
    assert world.state("a") is State.FAILED


def test_an_engine_lost_and_back_loses_no_waiting_request(make_world: MakeWorld) -> None:
    world = make_world(2)
    world.loaded("a")
    a1, a2, b = world.request("a"), world.request("a"), world.request("b")
    unloading = world.start(world.scheduler.unload("b"))
    world.lose_engine()
    assert world.running() == []
    assert unloading.done()
    assert {m.state for m in world.scheduler.models()} == {State.ABSENT}
    c = world.request("c")
    world.pass_time(10)
    assert a2.waiting
    assert b.waiting
    assert world.running() == []
    a1.finish()
    world.call(world.scheduler.on_engine_ready)
    for name in "abc":
        if name == "c":
            a2.finish()
            b.finish()
            world.pass_time(0)
            world.end("a")
        world.end(name)
    assert a2.served
    assert b.served
    assert c.holding


def test_a_load_that_is_still_being_cancelled_does_not_meet_the_next_one(world: World) -> None:
    world.engine.undo_seconds = 3
    request = world.request("a")
    world.lose_engine()
    world.call(world.scheduler.on_engine_ready)
    assert world.engine.log == ["load a"]
    world.pass_time(3)
    assert world.engine.log == ["load a", "load a"]
    world.end("a")
    assert request.holding


def test_effects_that_end_well_after_the_engine_was_lost_change_nothing(world: World) -> None:
    world.engine.deaf = True
    world.loaded("a")
    world.start(world.scheduler.unload("a"))
    request = world.request("b")
    world.lose_engine()
    assert world.state("a") is world.state("b") is State.ABSENT
    world.device.held.clear()
    world.call(world.scheduler.on_engine_ready)
    world.end("b")
    assert request.holding


def test_what_failed_under_the_lost_engine_is_tried_at_once(world: World) -> None:
    world.request("a")
    world.end("a", EngineUnavailable("gone"))
    world.lose_engine()
    world.call(world.scheduler.on_engine_ready)
    world.request("a")
    assert world.running() == ["load a"]


# The end


def test_close_lets_leases_finish_and_fails_what_waits(world: World) -> None:
    world.loaded("a")
    running, queued, other = world.request("a"), world.request("a"), world.request("b")
    unloading = world.start(world.scheduler.unload("a"))
    closing = world.start(world.scheduler.close(30))
    assert isinstance(queued.error, ModelNotReady)
    assert isinstance(other.error, ModelNotReady)
    assert isinstance(world.request("a").error, ModelNotReady)
    world.pass_time(10)
    assert not closing.done()
    running.finish()
    world.pass_time(0)
    assert closing.done()
    assert running.served
    assert world.running() == []
    assert isinstance(unloading.exception(), ModelNotReady)
    assert isinstance(world.start(world.scheduler.unload("a")).exception(), ModelNotReady)


def test_close_waits_for_leases_no_longer_than_its_timeout(world: World) -> None:
    world.loaded("a")
    world.request("a")
    closing = world.start(world.scheduler.close(30))
    world.pass_time(31)
    assert closing.done()


def test_nothing_starts_after_close(world: World) -> None:
    world.loaded("a", "b")
    running = world.request("a")
    world.start(world.scheduler.close(30))
    world.call(world.scheduler.on_footprint, "b@1", 9)
    world.lose_worker("a")
    world.call(world.scheduler.on_engine_ready)
    world.call(world.scheduler.pin, archive("c"), True)
    running.finish()
    world.pass_time(0)
    assert world.running() == []
    assert world.engine.log == []


# Cancellation


def test_a_request_cancelled_in_the_moment_of_its_grant_passes_the_lease_on(world: World) -> None:
    world.loaded("a")
    first, second, third = (world.request("a") for _ in range(3))
    # The release grants the second before its task runs again; it is cancelled in between.
    first.task.add_done_callback(lambda done: second.cancel())
    first.finish()
    world.pass_time(0)
    assert second.task.cancelled()
    assert third.holding
    assert world.model("a").leases == 1


@pytest.mark.parametrize("ticks", range(8))
@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize("error", [None, ModelLoadFailed("broken")])
def test_a_cancellation_at_any_tick_loses_no_lease_and_no_wake_up(
    world: World, victim: int, ticks: int, error: Exception | None
) -> None:
    """Three requests meet a load that ends, while one of them is cancelled some event-loop ticks later."""
    requests = [world.request("a", seconds=0) for _ in range(3)]

    async def cancel() -> None:
        for _ in range(ticks - 1):
            await asyncio.sleep(0)
        requests[victim].cancel()

    done = world.engine.running["a@1"][1]
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
    if ticks:
        world.start(cancel())
    else:
        requests[victim].cancel()
    world.pass_time(1)
    assert all(r.served if error is None else r.error is error for i, r in enumerate(requests) if i != victim)
    assert requests[victim].task.done()
    assert world.model("a").leases == 0
    assert not world.model("a").waiters


@pytest.mark.parametrize("error", [None, ModelLoadFailed("broken"), OutOfMemory("no")])
def test_a_deadline_in_the_moment_of_the_answer_loses_nothing(world: World, error: PalimpsestError | None) -> None:
    requests = [world.request("a", wait=5, seconds=0) for _ in range(2)]
    world.loop.call_at(
        5,
        world.engine.running["a@1"][1].set_result if error is None else (world.engine.running["a@1"][1].set_exception),
        error,
    )
    world.pass_time(6)
    assert all(r.task.done() for r in requests)
    assert world.model("a").leases == 0
    assert not world.model("a").waiters
    assert world.request("a", wait=0).holding or error is not None
