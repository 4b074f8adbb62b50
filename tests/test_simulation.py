"""The fleet in virtual time, a small one, and the rules of eviction on short traces."""

from dataclasses import replace
from statistics import mean
from typing import Any

import pytest

from bench import eviction
from bench.simulation import POLICIES, Scene, chart, requests, run

pytestmark = pytest.mark.slow

SCENE = Scene(boxes=30, archives=300, seconds=48.0)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return {policy: run(SCENE, policy) for policy in POLICIES}


def test_every_request_is_answered_though_boxes_are_lost(results: dict[str, dict[str, Any]]) -> None:
    for policy in ("ours", "ours, views never old"):
        ends = dict(results[policy]["ends"])
        assert ends.pop("lost with its box", 0) < 20
        assert ends == {"answered": len(requests(SCENE))}


def test_who_knows_the_state_finds_more_models_ready() -> None:
    """The mean of three seeds: one alone is too small a fleet to tell old views from new ones."""
    fresh, ours, bounded, two = (
        mean(run(replace(SCENE, seed=seed), policy)["ready share"] for seed in range(3))
        for policy in ("ours, views never old", "ours", "bounded hashing", "power of two")
    )
    assert ours > bounded > two
    assert fresh - ours < 0.03  # old views cost little, since boxes are asked


def test_without_the_load_or_the_state_requests_wait_longer(results: dict[str, dict[str, Any]]) -> None:
    others = ("power of two", "consistent hashing")
    assert results["ours"]["wait s"]["p99"] < min(results[policy]["wait s"]["p99"] for policy in others)


def test_a_run_is_the_same_each_time(results: dict[str, dict[str, Any]]) -> None:
    again = run(SCENE, "ours")
    clocked = ("choice us", "requests per CPU second")
    assert {k: v for k, v in again.items() if k not in clocked} == {
        k: v for k, v in results["ours"].items() if k not in clocked
    }


def test_the_figures_become_a_chart(results: dict[str, dict[str, Any]]) -> None:
    scene = {"boxes": SCENE.boxes, "archives": SCENE.archives, "stale": SCENE.stale}
    svg = chart([scene | result for result in results.values()])
    assert svg.startswith("<svg")
    assert all(policy in svg for policy in POLICIES)


def test_the_servers_rule_evicts_better_than_the_longest_unused_and_worse_than_who_knows_the_future() -> None:
    for rules in eviction.compare(1000, 1).values():
        assert rules["LRU"].found < rules["LRFU"].found < rules["Belady"].found
