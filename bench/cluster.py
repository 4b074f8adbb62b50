"""Two boxes of one machine behind one door: how many requests find their model, and what the door adds.

    python -m bench.cluster [--requests 600] [--clients 4] [--rounds 100]

Twenty archives, room for four in each box, Zipf-distributed requests, the same for each router: ours, Ray's consistent
hashing by the model's name, and Ray's default, the less busy of two. Then a small GET and a picture's worth of a body,
by turns to a box behind the door and to a server of its own on the same machine.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench.residency import ARCHIVES, BALLAST_MIB, BUDGET_MIB, MEMORY_MIB, ZIPF, quantiles
from tests.serving import ROOT, environment, free_port, name_full_set, serving, until
from tests.zoo import write_archive

BOXES = 2
BODY = os.urandom(2_400_000)
START_SECONDS = 240.0
ROUTERS = {
    "ours": "serve.cluster.router.ModelRouter",
    "Ray's consistent hashing": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter",
    "Ray's power of two": "ray.serve._private.request_router.pow_2_router.PowerOfTwoChoicesRequestRouter",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--up", help=argparse.SUPPRESS)  # this process is a cluster with that router
    arguments = parser.parse_args()
    if arguments.up:
        up(arguments.up)
        return
    with tempfile.TemporaryDirectory() as folder:
        report = {name: found_ready(Path(folder), each, arguments) for name, each in ROUTERS.items()}
        print(json.dumps(report | {"the door adds": added(Path(folder), arguments.rounds)}, indent=2))


def up(router: str) -> None:
    """`palimpsest cluster up` with another router."""
    from serve import preflight
    from serve.cluster import node

    settings = preflight.read_settings()
    preflight.check_machine(settings)
    token = settings.state / "cluster.token"
    node.new_token(token)
    environ = node.environment(settings, token)
    os.environ |= environ
    ended: list[int] = []
    with node.running(settings.state / "logs" / "ray.log", environ, None, free_port(), BOXES) as running:
        from serve.cluster.service import Service

        service = Service(settings, running.address, router)
        signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
        print("ready", flush=True)
        until(lambda: bool(ended), 3600)
        service.end()


@contextmanager
def cluster(folder: Path, router: str) -> Iterator[httpx.Client]:
    store = folder / "store"
    if not store.exists():
        for number in range(ARCHIVES):
            write_archive(store, f"m{number:02}", memory_mib=MEMORY_MIB, ballast_mib=BALLAST_MIB, reply_bytes=4)
        name_full_set(store)
    own = Path(tempfile.mkdtemp(dir=folder))
    port = free_port()
    more = {"CUDA_VISIBLE_DEVICES": "", "PALIMPSEST_MEMORY_BUDGET": str(BUDGET_MIB)}
    log = own / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.cluster", "--up", router],
            cwd=ROOT, env=environment(port, own, store, "full") | more, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        until(lambda: process.poll() is not None or "ready" in log.read_text(), START_SECONDS)
        assert process.poll() is None, log.read_text()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        process.terminate()
        process.wait(120)


def found_ready(folder: Path, router: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Requests that waited for no load; the first quarter, in which all is loaded first, is not counted."""
    draw = random.Random(1)
    models = [f"m{number:02}" for number in range(ARCHIVES)]
    trace = draw.choices(models, [1 / (rank + 1) ** ZIPF for rank in range(ARCHIVES)], k=arguments.requests)
    with cluster(folder, router) as client, ThreadPoolExecutor(arguments.clients) as pool:

        def ask(model: str) -> tuple[str, float]:
            began = time.monotonic()
            answer = client.post(f"/predictions/{model}", content=b"x")
            outcome = answer.headers.get("server-timing", "").partition(";")[0] if answer.is_success else "refused"
            return outcome, time.monotonic() - began

        counted = list(pool.map(ask, trace))[len(trace) // 4 :]
    outcomes = Counter(outcome for outcome, _ in counted)
    return {
        "ready": round(outcomes["queue"] / len(counted), 3),
        "refused": outcomes["refused"],
        "seconds": quantiles([seconds for _, seconds in counted]),
    }


def added(folder: Path, rounds: int) -> dict[str, Any]:
    """Medians in milliseconds, and of the differences in pairs."""
    alone = folder / "alone"
    alone.mkdir()
    calls: dict[str, Callable[[httpx.Client], httpx.Response]] = {
        "GET /v1/state": lambda client: client.get("/v1/state"),
        "POST of 2.4 MB": lambda client: client.post("/predictions/m00", content=BODY, headers=_BYTES),
    }
    with cluster(folder, ROUTERS["ours"]) as behind, serving(alone, folder / "store", "full", cpu_only=True) as server:
        report = {}
        for name, call in calls.items():
            pairs = [(_ms(call, behind), _ms(call, server.http)) for _ in range(rounds + 5)][5:]
            report[name] = {
                "behind the door": round(statistics.median(a for a, _ in pairs), 2),
                "alone": round(statistics.median(b for _, b in pairs), 2),
                "difference": round(statistics.median(a - b for a, b in pairs), 2),
            }
    return report


_BYTES = {"content-type": "application/octet-stream"}


def _ms(call: Callable[[httpx.Client], httpx.Response], client: httpx.Client) -> float:
    began = time.perf_counter()
    assert call(client).is_success
    return 1000 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
