"""Twenty archives, room for four, Zipf-distributed requests from sixteen clients.

    python -m bench.residency [--seconds 120] [--clients 16]

Reports what was lost or hung (must be nothing), the hit rate beside that of an offline LRU cache on the same trace,
and what the gateway adds to a request with a 3 MB body, against calling TorchServe directly, alternating in one run.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import httpx

from tests.serving import Server, serving
from tests.zoo import write_archive

ARCHIVES, ROOM = 20, 4
MEMORY_MIB = 256  # of each archive, by its own word: more than a worker takes, so that the books decide
ZIPF = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        for number in range(ARCHIVES):
            write_archive(store, f"m{number:02}", memory_mib=MEMORY_MIB, reply_bytes=4)
        os.environ["PALIMPSEST_MEMORY_BUDGET"] = str(ROOM * MEMORY_MIB + MEMORY_MIB // 2)
        with serving(Path(folder), store, "full") as server:
            print(json.dumps(overhead(server), indent=2))
            print(json.dumps(asyncio.run(traffic(server, arguments.seconds, arguments.clients)), indent=2))


async def traffic(server: Server, seconds: float, clients: int) -> dict[str, Any]:
    """Every client asks for one model after another until the time is over."""
    weights = [1 / (rank + 1) ** ZIPF for rank in range(ARCHIVES)]
    statuses: Counter[int | str] = Counter()
    trace: list[str] = []
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client(seed: int) -> None:
        draw = random.Random(seed)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=90) as http:
            while time.monotonic() < end:
                model = f"m{draw.choices(range(ARCHIVES), weights)[0]:02}"
                began = time.monotonic()
                try:
                    answer = await http.post(f"/predictions/{model}", content=b"ping")
                    statuses[answer.status_code if answer.content == bytes(4) else "wrong answer"] += 1
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1
                latencies.append(time.monotonic() - began)
                trace.append(model)

    before = counters(server)
    await asyncio.gather(*(client(seed) for seed in range(clients)))
    hits, requests, loads = (after - earlier for after, earlier in zip(counters(server), before, strict=True))
    return {
        "requests": len(trace),
        "answers": {str(status): count for status, count in statuses.items()},
        "loads": loads,
        # A request that finds its model loaded; and one that starts no load of its own, as a cache counts.
        "hit rate, found loaded": round(hits / requests, 4),
        "hit rate, no load of its own": round(1 - loads / requests, 4),
        "offline LRU hit rate": round(lru_hit_rate(trace, ROOM), 4),
        "latency s": quantiles(latencies),
    }


def counters(server: Server) -> tuple[int, ...]:
    models = server.http.get("/v1/models").json()["models"]
    return tuple(sum(m[name] for m in models) for name in ("hits", "requests", "loads"))


def lru_hit_rate(trace: list[str], room: int) -> float:
    """A cache of `room` models that sees the requests one after another, in the order in which they were answered.

    Sixteen clients have sixteen requests under way, and those for one model wait together and are served together: in
    the order of sending, that would be another trace.
    """
    cache: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for model in trace:
        hits += model in cache
        cache[model] = None
        cache.move_to_end(model)
        if len(cache) > room:
            cache.popitem(last=False)
    return hits / len(trace)


def overhead(server: Server, rounds: int = 200) -> dict[str, Any]:
    """The same 3 MB to the same loaded model, through the gateway and past it, in turn."""
    body = os.urandom(3_000_000)
    server.http.post("/predictions/m00", content=body).raise_for_status()
    url, headers = torchserve_url(server)
    through, past = [], []
    with httpx.Client(timeout=30) as direct:
        for _ in range(rounds):
            began = time.perf_counter()
            server.http.post("/predictions/m00", content=body).raise_for_status()
            through.append(time.perf_counter() - began)
            began = time.perf_counter()
            direct.post(url, content=body, headers=headers).raise_for_status()
            past.append(time.perf_counter() - began)
    added = [a - b for a, b in zip(sorted(through), sorted(past), strict=True)]
    return {
        "body bytes": len(body),
        "through the gateway ms": quantiles(through, 1000),
        "TorchServe directly ms": quantiles(past, 1000),
        "added ms": {"p50": round(added[len(added) // 2] * 1000, 2), "p99": round(added[-len(added) // 100] * 1000, 2)},
    }


def torchserve_url(server: Server) -> tuple[str, dict[str, str]]:
    """Where the gateway's own TorchServe serves m00, found as the bench's owner may: in its folder and its log."""
    home = next((server.folder / "tmp").glob("palimpsest-*"))
    key = json.loads((home / "key_file.json").read_text())["inference"]["key"]
    log = (server.folder / "state" / "logs" / "ts_log.log").read_text()
    address = re.findall(r"Inference API bind to: (http://[\d.:]+)", log)[-1]
    name = re.findall(r"/predictions/(p\.m00[\w.-]*)", log)[-1]
    return f"{address}/predictions/{name}", {"authorization": f"Bearer {key}"}


def quantiles(values: list[float], scale: float = 1.0) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered) * scale, 2),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * scale, 2),
    }


if __name__ == "__main__":
    main()
