"""Which box a request goes to: preference by preference, then what holds for all views."""

import asyncio
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.cluster.policy import ASKED, FREE, LOAD, QUEUE, ROUNDS, WAKE, Published, View

BOXES = [f"box{number}" for number in range(20)]
MODELS = [f"model{number}" for number in range(300)]


def seen(*ids: str, **boxes: Published) -> View:
    """A view of boxes without a load, and of some that publish this."""
    view = View()
    for id in ids:
        view.update(id, Published())
    for id, published in boxes.items():
        view.update(id, published)
    return view


def order(view: View, model: str) -> list[str]:
    return list(view.order(model))


def first(view: View, model: str = "m") -> str:
    return order(view, model)[0]


# Hashing


def test_an_idle_fleet_shares_the_models_evenly() -> None:
    view = seen(*BOXES)
    counts = Counter(first(view, model) for model in MODELS)
    assert set(counts) == set(BOXES)
    assert max(counts.values()) < 3 * len(MODELS) / len(BOXES)


@given(st.sampled_from(BOXES))
def test_a_box_that_leaves_moves_only_its_own_models_and_gets_them_back(id: str) -> None:
    view = seen(*BOXES)
    before = {model: order(view, model) for model in MODELS[:50]}
    view.leave(id)
    assert {model: order(view, model) for model in before} == {
        model: [other for other in order if other != id] for model, order in before.items()
    }
    view.update(id, Published())
    assert {model: order(view, model) for model in before} == before


@pytest.mark.slow
def test_the_choice_is_the_same_in_every_process() -> None:
    code = f"""
from serve.cluster.policy import Published, View
view = View()
for id in {BOXES}:
    view.update(id, Published())
print([next(view.order(model)) for model in {MODELS[:20]}])
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


# Preferences


def test_ready_comes_before_parked_and_parked_before_the_hashs_choice() -> None:
    parked = Published(load=1.0, parked=["m"])
    assert first(seen(*BOXES, parked=parked)) == "parked"
    assert first(seen(*BOXES, parked=parked, ready=Published(load=1.0, ready={"m": 0}))) == "ready"
    assert first(seen(*BOXES, other=Published(load=1.0, ready={"n": 0}))) in BOXES


def test_a_model_that_is_being_loaded_is_waited_for() -> None:
    assert first(seen(*BOXES, loading=Published(load=20.0, loading={"m": 20.0}))) == "loading"


def test_a_second_router_need_not_say_that_a_model_is_on_its_way() -> None:
    view = seen(*BOXES)
    sent = view.sent(first(view), "m")
    assert {first(view) for _ in range(20)} == {sent.box}


def test_a_parked_copy_on_a_busy_box_is_not_waited_for() -> None:
    assert first(seen(*BOXES, parked=Published(load=2 * WAKE, parked=["m"]))) in BOXES


def test_work_for_other_models_makes_no_copy() -> None:
    assert first(seen(*BOXES, ready=Published(load=100.0, ready={"m": 0, "n": 100.0}))) == "ready"


def test_where_nobody_is_free_the_least_busy_box_gets_a_model_that_nobody_has() -> None:
    busy = {id: Published(load=FREE + number) for number, id in enumerate(reversed(BOXES))}
    assert first(seen(**busy)) == BOXES[-1]


def test_of_two_models_that_one_box_is_to_load_the_second_goes_elsewhere() -> None:
    """Though it has no work yet: loads come one after another."""
    loading = {id: Published(load=FREE, loading={"n": 0.0}) for id in BOXES[:10]}
    busy = {id: Published(load=LOAD) for id in BOXES[10:]}
    assert first(seen(**loading, **busy)) in busy
    assert first(seen(**{id: Published(loading={"n": 0.0}) for id in BOXES}, free=Published())) == "free"


# Asking


class Fleet:
    """What the boxes say when they are asked; None: nothing. asked: those that were."""

    def __init__(self, view: View, says: dict[str, Published | None]) -> None:
        self.view, self.says = view, says
        self.rounds, self.asked = 0, list[str]()

    async def ask(self, ids: list[str]) -> list[str]:
        self.rounds += 1
        self.asked += ids
        for id in ids:
            if (said := self.says.get(id)) is not None:
                self.view.update(id, said)
        return [id for id in ids if self.says.get(id) is None]

    def choose(self, model: str = "m") -> list[str]:
        return list(asyncio.run(self.view.choose(model, self.ask)))


def test_what_a_box_says_now_counts_and_not_what_it_published() -> None:
    published = {"a": Published(ready={"m": 0.0}), "b": Published(), "c": Published()}
    says = published | {"a": Published(), "c": Published(load=9.0, ready={"m": 0.0})}
    fleet = Fleet(seen(**published), says)
    assert fleet.choose()[0] == "c"
    assert fleet.rounds == 1


def test_others_are_asked_where_the_first_are_not_what_they_were() -> None:
    published = {id: Published(ready={"m": 0.0}) for id in BOXES[:4]} | {"busy": Published(load=5.0)}
    says = {id: Published(load=9.0) for id in BOXES[:4]} | {"busy": Published(load=5.0)}
    fleet = Fleet(seen(**published), says)
    assert fleet.choose()[0] == "busy"
    assert sorted(fleet.asked) == [*BOXES[:4], "busy"]


def test_who_says_nothing_comes_last_and_is_not_asked_again() -> None:
    published = {"gone": Published(ready={"m": 0.0}), "a": Published(load=3.0), "b": Published(load=2.0)}
    fleet = Fleet(seen(**published), published | {"gone": None})
    assert fleet.choose() == ["b", "a", "gone"]
    assert fleet.asked.count("gone") == 1


def test_one_box_alone_is_not_asked() -> None:
    fleet = Fleet(seen("a"), {})
    assert fleet.choose() == ["a"]
    assert not fleet.asked


# Copies


def spread(view: View, requests: int) -> Counter[str]:
    """Where so many requests for one model go that nobody answers; what is sent to gets it ready."""
    for _ in range(requests):
        id = first(view)
        view.sent(id, "m")
        view.update(id, Published(ready={"m": 0.0}))
    return Counter(sent for sent, box in view._boxes.items() for _ in range(box.requests["m"]))


def test_copies_grow_with_the_queue_and_fewer_suffice_for_a_short_one() -> None:
    copies = [len(spread(seen(*BOXES), requests)) for requests in (1, 6, 12, 40, 400)]
    assert copies[:2] == [1, 1]
    assert copies == sorted(copies)
    assert copies[2] < 12
    assert copies[-1] == len(BOXES)  # there is no cap


def test_no_more_copies_are_loaded_at_a_time_than_there_are() -> None:
    view = seen(*BOXES, a=Published(20.0, ready={"m": 20.0}), b=Published(20.0, ready={"m": 20.0}))
    for _ in range(30):
        view.sent(first(view), "m")
    assert sum(box.requests["m"] > 0 for box in view._boxes.values()) == 2


def test_copies_shrink_with_the_queue() -> None:
    """One request at a time uses one copy of ten: the others fall idle."""
    view = seen(*BOXES[10:], **{id: Published(ready={"m": 0.0}) for id in BOXES[:10]})
    used = set[str]()
    for _ in range(20):
        sent = view.sent(first(view), "m")
        used.add(sent.box)
        view.ended(sent)
    assert len(used) == 1


# Properties

names = st.sampled_from(["m", "n", "o"])
queues = st.dictionaries(names, st.floats(0, 50))
published = st.builds(Published, st.floats(0, 100), queues, st.lists(names), queues)
fleets = st.dictionaries(st.sampled_from(BOXES), published, max_size=5)
# What a router may do: send, hear that it ended (twice, even), hear of a box that it does not know, or lose one.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("sent"), st.sampled_from(BOXES), names),
        st.tuples(st.just("ended"), st.integers(0, 30), st.none()),
        st.tuples(st.just("leave"), st.sampled_from(BOXES), st.none()),
        st.tuples(st.just("update"), st.sampled_from(BOXES), published),
    ),
    max_size=12,
)


def play(fleet: dict[str, Published], steps: list[tuple]) -> tuple[View, set[str]]:
    """The view after these steps, and the boxes that are there then."""
    view, there, sent = seen(**fleet), set(fleet), []
    for step, which, what in steps:
        if step == "sent":
            sent.append(view.sent(which, what, 2.0))
        elif step == "ended" and sent:
            view.ended(sent[which % len(sent)])
        elif step == "leave":
            view.leave(which)
            there.discard(which)
        elif step == "update":
            view.update(which, what)
            there.add(which)
    return view, there


@pytest.mark.slow
@given(fleets, steps, names)
def test_every_box_is_offered_once_whatever_the_view(fleet: dict[str, Published], steps: list, model: str) -> None:
    view, there = play(fleet, steps)
    offered = order(view, model)
    assert len(offered) == len(set(offered))
    assert set(offered) == there
    assert order(view, model) == offered


@given(fleets, names)
def test_a_free_box_with_the_model_ready_is_always_taken(fleet: dict[str, Published], model: str) -> None:
    free = {id for id, box in fleet.items() if box.load / 2 < FREE and model in box.ready}
    assert not free or first(seen(**fleet), model) in free


@given(fleets, st.dictionaries(st.sampled_from(BOXES), published | st.none(), max_size=5), steps, names)
def test_few_boxes_are_asked_each_once_and_the_one_that_is_chosen_has_answered(
    boxes: dict[str, Published], says: dict[str, Published | None], steps: list, model: str
) -> None:
    view, there = play(boxes, steps)
    fleet = Fleet(view, says)
    chosen = fleet.choose(model)
    assert sorted(chosen) == sorted(there)
    assert len(fleet.asked) == len(set(fleet.asked)) <= ASKED * ROUNDS
    assert fleet.rounds <= ROUNDS
    answered = [id for id in fleet.asked if says.get(id) is not None]
    if answered and fleet.rounds < ROUNDS:
        assert chosen[0] in answered


@given(fleets, names)
def test_no_copy_is_made_where_a_queue_is_short(fleet: dict[str, Published], model: str) -> None:
    short = {id for id, box in fleet.items() if model in box.ready and box.ready[model] < QUEUE}
    if short:
        assert model in fleet[first(seen(**fleet), model)].ready


@given(fleets, steps)
def test_nothing_is_kept_of_boxes_that_left(fleet: dict[str, Published], steps: list) -> None:
    view, there = play(fleet, steps)
    for id in there:
        view.leave(id)
    assert not any((view._boxes, view._ready, view._parked, view._loading, view._requested))


@given(fleets, steps)
def test_an_old_state_is_forgotten_with_the_next(fleet: dict[str, Published], steps: list) -> None:
    view, there = play(fleet, steps)
    for id in there:
        view.update(id, Published())
    assert not any((view._ready, view._parked, view._loading))


def test_own_requests_stand_for_those_of_all_routers() -> None:
    view = seen("a", "b", a=Published(1.5))
    view.sent("b", "other", 1.0)
    assert first(view) == "b"
    view.count_routers(4)
    assert first(view) == "a"
