"""The benches' short variants: they run, and nothing is lost."""

from pathlib import Path

import pytest

from bench import coldstart, memory, residency, soak

pytestmark = [pytest.mark.torchserve, pytest.mark.alone]


def test_twenty_models_with_room_for_four_lose_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_MEMORY_BUDGET", "")  # the bench sets it: put it back afterwards
    result = residency.run(tmp_path, seconds=8, clients=16, rounds=5)
    traffic = result["traffic"]
    assert traffic["answers"] == {"200": traffic["requests"]}
    assert traffic["requests"] >= 16
    assert traffic["loads"] > residency.ROOM  # so some had to leave
    assert traffic["loaded at the end"] <= residency.ROOM
    for make in ("ours", "another make"):
        assert result["overhead"][make]["ms"].keys() == {"gateway", "directly", "bare relay"}


def test_ours_answers_sooner_than_stock(tmp_path: Path) -> None:
    sam = coldstart.run(tmp_path, rounds=1, models=["sam"], full_size=None, cuda=False)["sam"]
    # On a quiet machine 14 times; two would be a fault even on a busy one.
    assert sam["stock"]["first answer s"] > 2 * sam["ours"]["first answer s"]


def test_the_cuda_mode_runs_dry(tmp_path: Path) -> None:
    report = coldstart.run(tmp_path, rounds=1, models=["sam"], full_size=None, cuda=True)
    assert report.keys() == {"sam", "copies"}


def test_what_processes_hold_and_requests_cost_is_measured() -> None:
    table = memory.run(rounds=1, full_size=None, baseline=None)["here"]
    for process in ("gateway", "Java", "zygote"):
        for when in ("idle", "after these"):
            resident, private = (table[f"{process}, {when}: {kind} MB"][0] for kind in ("resident", "private"))
            assert resident > private > 0
    for model in ("demo SAM", "demo LaMa", "demo SD"):
        assert table[f"{model}: user s"][0] > 0
        assert table[f"{model}: peak MB"][0] >= table[f"{model}: resident MB, then"][0] > 0
    assert len(memory.as_text({"here": table}).splitlines()) == 2 + len(table)


def test_a_fleet_is_asked_at_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_MEMORY_BUDGET", "400")  # of a few such models
    report = coldstart.run(tmp_path, rounds=2, models=["sam"], full_size=None, cuda=False, fleet=5)
    assert sum(place["count"] for place in report.values()) == 10
    assert report.keys() <= {"gpu", "memory", "parked", "suspended", "disk"}


def test_two_keys_share_a_machine_on_which_models_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PALIMPSEST_MEMORY_BUDGET", "PALIMPSEST_KEYS"):
        monkeypatch.setenv(name, "")  # the bench sets them
    report = soak.run(tmp_path, seconds=4, load=0.8)
    for key in ("batch", "person", "person alone"):
        assert (list(report[key]["answers"]), report[key]["lost"]) == (["200"], [])
    assert report["loads"] > soak.ROOM
    assert (report["loads failed"], report["leases and waiting at the end"]) == (0, 0)
    assert (report["exit code"], report["left behind"]) == (0, [])
    assert all(first >= 0 and last >= 0 for first, last in report["held, first and last quarter"].values())
