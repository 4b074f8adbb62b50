"""What ten thousand known archives cost: no TorchServe, no model, only the scheduler and the gateway's own routes.

python -m bench.many_archives [--archives 10000]
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from serve.errors import ModelNotFound
from serve.residency.model import Taken
from serve.residency.scheduler import Scheduler, SchedulerLimits
from serve.store.catalog import Archive, Catalog
from tests.fakes import FakeTorchServe, gateway, make_store

ROOM = 4  # models in memory
ASKED = 300  # of the archives, through the gateway
ROUNDS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), arguments.archives), indent=2))


def run(folder: Path, archives: int) -> dict[str, Any]:
    """Makes a store of so many archives in the folder; they are named, never loaded."""
    store = make_store(folder / "store", *(f"m{number:05}" for number in range(archives)), memory_mib=1)
    return {
        "archives": archives,
        "scheduler ms per request": asyncio.run(scheduler(archives)),
        "unknown name ms": unknown_name(store),
        "gateway": routes(store),
    }


class Instant:
    """An engine and a memory in which every model takes one byte and every load no time."""

    budget, host_budget = ROOM, 0

    def free(self) -> int:
        return ROOM

    def predict(self, archive: Archive) -> int:
        return 1

    def is_measured(self, archive: Archive) -> bool:
        return True

    def predict_peak(self, archive: Archive) -> int:
        return 1

    def predict_parked(self, archive: Archive) -> Taken | None:
        return None

    predict_suspended = predict_parked

    async def load(self, archive: Archive) -> int:
        return 1

    async def unload(self, archive: Archive) -> None:
        return

    async def park(self, archive: Archive) -> Taken:
        raise NotImplementedError

    suspend = wake = park


async def scheduler(archives: int) -> dict[str, float]:
    """CPU time. ready: requests whose model is loaded; evicting: each of them has another model leave."""
    instant = Instant()
    residency = Scheduler(instant, instant, SchedulerLimits(minimum_stay=0))
    known = [Archive(f"m{number}", Path(f"/store/m{number}"), "0123456789ab") for number in range(archives)]

    async def ask(which: list[Archive]) -> float:
        began = time.process_time()
        for archive in which:
            async with residency.lease(archive):
                pass
        return round((time.process_time() - began) / len(which) * 1000, 4)

    first = await ask(known)
    ready = await ask([known[-1]] * ROUNDS)
    evicting = await ask([known[number % (2 * ROOM)] for number in range(ROUNDS // 10)])
    await residency.close(0)
    return {"each for the first time": first, "ready": ready, "evicting": evicting}


def unknown_name(store: Path) -> float:
    """Of one look-up on the event loop, once the store was listed as a server does at its start."""
    catalog = Catalog(store, store / ".cache", demo=False)
    catalog.names()

    def find() -> None:
        try:
            catalog.find("nobody")
        except ModelNotFound:
            return

    return _milliseconds(find, 20)


def routes(store: Path) -> dict[str, Any]:
    """After requests to ASKED models. Without the time to parse the answer; the first listing is the server's own."""
    fake = FakeTorchServe()
    fake.replies["GET /metrics"] = httpx.Response(200, text="")
    with gateway(fake, store, budget=ROOM << 20, minimum_stay=0) as client:
        for number in range(ASKED):
            client.post(f"/predictions/m{number:05}")
        return {
            "models asked": ASKED,
            "GET /v1/models ms": _milliseconds(lambda: client.get("/v1/models"), 10),
            "GET /v1/models bytes": len(client.get("/v1/models").content),
            "GET /metrics ms": _milliseconds(lambda: client.get("/metrics"), 10),
            "GET /metrics bytes": len(client.get("/metrics").content),
            "the same route for one model ms": _one_model(client),
        }


def _one_model(client: TestClient) -> float:
    """What any request costs here, of which the listing's figure has its share."""
    return _milliseconds(lambda: client.get("/v1/models/m00000"), 10)


def _milliseconds(do: Callable[[], object], rounds: int) -> float:
    """The median."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        do()
        times.append(time.perf_counter() - began)
    return round(sorted(times)[rounds // 2] * 1000, 2)


if __name__ == "__main__":
    main()
