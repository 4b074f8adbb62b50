"""GET /v1/state: what routers and operators may ask all the time."""

import os
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient
from scheduling import MakeWorld

from serve.gateway.state import States

MIB = 2**20


def state(client: TestClient) -> dict[str, Any]:
    answer = client.get("/v1/state")
    assert answer.status_code == 200
    return dict(answer.json())


def test_it_says_where_models_are(tmp_path: Path) -> None:
    store = make_store(tmp_path, "sam", "team/own", memory_mib=100)
    with gateway(FakeTorchServe(), store, budget=150 * MIB) as client:
        empty = state(client)
        assert empty == {
            "change": 0, "ready": [], "parked": [], "loading": [], "leases": 0, "queue": 0,
            "budget_bytes": 150 * MIB, "reserved_bytes": 0,
        }  # fmt: skip
        assert client.post("/predictions/sam").status_code == 200
        one = state(client)
        assert (one["ready"], one["reserved_bytes"], one["change"]) == (["sam"], 100 * MIB, 1)
        assert client.post("/predictions/sam").status_code == 200
        assert state(client) == one  # nothing has moved
        assert client.post("/predictions/team/own").status_code == 200
        other = state(client)
        assert (other["ready"], other["change"]) == (["team/own"], 2)


def test_parked_models_are_told_apart(make_world: MakeWorld) -> None:
    world = make_world(1, host_budget=1)
    states = States(world.scheduler, world.device)
    world.parkable(a=1)
    world.loaded("a")
    world.request("b")
    world.end("a")
    assert (states.take().ready, states.take().parked, states.take().loading) == ([], ["a"], ["b"])


def test_what_loads_and_what_waits_is_counted(make_world: MakeWorld) -> None:
    world = make_world(2)
    states = States(world.scheduler, world.device)
    for name in ("a", "a", "a", "b"):
        world.request(name)
    loading = states.take()
    assert (loading.ready, loading.loading, loading.leases, loading.queue) == ([], ["a"], 0, 4)
    world.end("a")
    after = states.take()
    assert (after.ready, after.loading, after.leases, after.queue) == (["a"], ["b"], 1, 3)
    assert after.change > loading.change


def test_a_version_that_was_replaced_is_not_ready(make_world: MakeWorld) -> None:
    world = make_world(2)
    states = States(world.scheduler, world.device)
    old = world.request("a")
    world.end("a")
    assert states.take().ready == ["a"]
    world.request("a", version=2)
    assert states.take().ready == []
    old.finish()


def test_it_asks_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, "sam")
    with gateway(FakeTorchServe(), store) as client:
        assert client.post("/predictions/sam").status_code == 200
        asked = list[Any]()
        for name in ("stat", "open", "listdir", "scandir"):
            before = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *args, before=before, **named: asked.append(args) or before(*args, **named)
            )
        assert state(client)["ready"] == ["sam"]
        monkeypatch.undo()
        assert not [each for each in asked if str(tmp_path) in str(each)]
