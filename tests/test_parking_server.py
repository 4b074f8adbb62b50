"""Parking by the whole server: two models of 200 MB, room for one of them in memory."""

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import encoded
from serving import Server, serving, until

from bench import stores

pytestmark = pytest.mark.torchserve
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("parking")
    store = stores.build_full_size(folder / "store", ["lama"])
    shutil.move(store / "lama", store / "a")
    with (store / "a" / "model-config.yaml").open("a") as config:
        config.write("  memory_mib: 250\n")  # about what it turns out to take; else a first guess decides
    shutil.copytree(store / "a", store / "b")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PALIMPSEST_MEMORY_BUDGET", "400")
        environment.setenv("PALIMPSEST_HOST_BUDGET", "500")
        environment.setenv("PALIMPSEST_MINIMUM_STAY", "0")
        with serving(folder, store, "full", cpu_only=True) as running:
            yield running


def load(server: Server, name: str) -> dict[str, dict[str, Any]]:
    """Loads or wakes it; what /v1/models says afterwards, by name."""
    answer = server.http.post(f"/v1/models/{name}/load")
    assert answer.status_code == 200, answer.text
    return {model["name"]: model for model in server.http.get("/v1/models").json()["models"]}


def test_the_budgets_decide_who_is_ready_parked_or_on_disk(server: Server) -> None:
    first = load(server, "a")["a"]
    assert first["reserved_bytes"] > 200 * MIB

    models = load(server, "b")
    assert (models["b"]["state"], models["a"]["state"]) == ("ready", "parked")
    assert models["a"]["reserved_bytes"] < first["reserved_bytes"] - 100 * MIB  # measured, in the worker
    assert models["a"]["host_bytes"] > 190 * MIB

    models = load(server, "a")  # b is parked, a woken
    assert (models["a"]["state"], models["a"]["loads"], models["a"]["wakes"]) == ("ready", 1, 1)
    assert models["b"]["state"] == "parked"

    memory = server.http.get("/v1/models").json()["memory"]
    assert memory["host_reserved_bytes"] == models["b"]["host_bytes"] <= memory["host_budget_bytes"]
    metrics = server.http.get("/metrics").text
    assert 'palimpsest_model_waking_seconds_count{model="a"} 1' in metrics
    assert "palimpsest_parked_models 1" in metrics
    assert "palimpsest_worker_slow_starts_total 0" in metrics


def test_the_phases_of_a_load_are_told_once_its_first_answer_is_out(server: Server) -> None:
    sample = 'palimpsest_model_loading_seconds_count{model="a",phase="build"} 1'
    load(server, "a")
    assert sample not in server.http.get("/metrics").text
    picture = encoded(np.zeros((16, 16, 3), np.uint8)), encoded(np.full((16, 16), 255, np.uint8))
    server.ask("a", image=picture[0], mask_image=picture[1])
    until(lambda: sample in server.http.get("/metrics").text)
