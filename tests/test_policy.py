"""Which models must go: the rules one by one, then for all small cases that Hypothesis can think of."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.residency.policy import Resident, choose_victims, heat_after

NOW, STAY = 100.0, 2.0


def resident(
    key: str,
    size: int = 1,
    in_use: bool = False,
    stale: bool = False,
    ready: float = 0.0,
    used: float = 0.0,
    heat: float = 0.0,
) -> Resident:
    return Resident(key, size, in_use, stale, ready, used, heat)


def victims(need: int, *residents: Resident) -> list[str] | None:
    chosen = choose_victims(need, residents, NOW, STAY)
    return None if chosen is None else [r.key for r in chosen]


def test_nobody_goes_where_nothing_is_needed() -> None:
    assert victims(0, resident("a")) == []
    assert victims(-5, resident("a")) == []
    assert victims(0) == []


def test_the_idle_model_unused_longest_goes_first() -> None:
    a, b, c = resident("a", used=3), resident("b", used=1), resident("c", used=2)
    assert victims(1, a, b, c) == ["b"]
    assert victims(2, a, b, c) == ["b", "c"]


def test_a_cold_model_goes_before_one_unused_longer() -> None:
    assert victims(1, resident("hot", used=1, heat=2.0), resident("cold", used=9, heat=1.0)) == ["cold"]


def test_often_is_hotter_than_lately_and_yet_forgotten() -> None:
    often = never = -math.inf
    for request in range(1, 11):
        often = heat_after(often, request)
    assert often > heat_after(never, 11)
    assert often < heat_after(never, 1000)


def test_heat_bears_any_number_of_requests() -> None:
    heat = 0.0
    for request in range(10**12, 10**12 + 1000):
        hotter = heat_after(heat, request)
        assert heat < hotter < math.inf
        heat = hotter


def test_an_idle_model_goes_before_a_busy_one_and_a_stale_one_before_both() -> None:
    busy, idle = resident("busy", in_use=True), resident("idle", used=99)
    assert victims(1, busy, idle) == ["idle"]
    assert victims(2, busy, idle) == ["idle", "busy"]
    assert victims(1, busy, idle, resident("old", stale=True, used=100)) == ["old"]
    assert victims(1, busy, resident("old", in_use=True, stale=True, ready=50)) == ["old"]


def test_a_busy_model_stays_for_the_minimum_stay() -> None:
    assert victims(1, resident("new", in_use=True, ready=NOW - STAY + 0.1)) is None
    assert victims(1, resident("new", in_use=True, ready=NOW - STAY)) == ["new"]
    assert victims(1, resident("new", in_use=True, stale=True, ready=NOW)) == ["new"]


def test_the_busy_model_that_has_stayed_longest_goes_first() -> None:
    assert victims(1, resident("a", in_use=True, ready=20), resident("b", in_use=True, ready=10)) == ["b"]


def test_a_small_model_stays_where_a_larger_one_must_go_anyway() -> None:
    assert victims(8, resident("small", 1, used=1), resident("large", 8, used=2)) == ["large"]


def test_none_where_all_together_are_too_small() -> None:
    assert victims(3, resident("a"), resident("b")) is None
    assert victims(1) is None


residents = st.lists(
    st.builds(
        resident,
        key=st.uuids().map(str),
        size=st.integers(0, 8),
        in_use=st.booleans(),
        stale=st.booleans(),
        ready=st.sampled_from([0.0, 50.0, NOW - STAY, NOW - 1, NOW]),
        used=st.sampled_from([0.0, 50.0, NOW]),
        heat=st.sampled_from([-math.inf, 0.0, 3.5]),
    ),
    max_size=7,
)
needs = st.integers(-2, 30)


def may_go(r: Resident) -> bool:
    return not r.in_use or r.stale or r.ready_since + STAY <= NOW


def rank(r: Resident) -> tuple[bool, bool, tuple[float, ...]]:
    """Less goes earlier."""
    return r.in_use, not r.stale, (r.ready_since,) if r.in_use else (r.heat, r.last_used)


@given(needs, residents)
def test_the_victims_are_enough_and_none_of_them_can_be_spared(need: int, residents: list[Resident]) -> None:
    chosen = choose_victims(need, residents, NOW, STAY)
    if chosen is not None:
        freed = sum(r.size for r in chosen)
        assert freed >= need or not chosen
        assert all(freed - r.size < need for r in chosen)


@pytest.mark.slow
@given(needs, residents)
def test_none_only_where_it_is_impossible(need: int, residents: list[Resident]) -> None:
    possible = need <= sum(r.size for r in residents if may_go(r))
    assert (choose_victims(need, residents, NOW, STAY) is not None) == (possible or need <= 0)


@given(needs, residents)
def test_victims_may_go_and_go_in_order(need: int, residents: list[Resident]) -> None:
    chosen = choose_victims(need, residents, NOW, STAY) or []
    assert all(may_go(r) for r in chosen)
    assert [rank(r) for r in chosen] == sorted(rank(r) for r in chosen)
    assert len({r.key for r in chosen}) == len(chosen)


@given(needs, residents)
def test_nobody_goes_for_whom_an_earlier_one_would_do(need: int, residents: list[Resident]) -> None:
    """The last victim goes only because all that come before it in the order are too small together."""
    chosen = choose_victims(need, residents, NOW, STAY)
    if chosen:
        earlier = [r for r in residents if may_go(r) and rank(r) < rank(chosen[-1])]
        assert sum(r.size for r in earlier) < need


@given(needs, residents)
def test_the_choice_depends_on_the_arguments_alone(need: int, residents: list[Resident]) -> None:
    before = list(residents)
    first = choose_victims(need, residents, NOW, STAY)
    assert residents == before
    assert choose_victims(need, residents, NOW, STAY) == first
    if len({rank(r) for r in residents}) == len(residents):
        assert choose_victims(need, residents[::-1], NOW, STAY) == first


@given(needs, residents)
def test_a_busy_model_goes_only_where_the_idle_ones_are_not_enough(need: int, residents: list[Resident]) -> None:
    chosen = choose_victims(need, residents, NOW, STAY) or []
    enough = sum(r.size for r in residents if not r.in_use) >= need
    assert not (enough and any(r.in_use for r in chosen))
