"""Twenty archives, room for four, Zipf-distributed requests from sixteen clients.

    python -m bench.residency [--seconds 120] [--clients 16] [--archives 10000]

Reports what was lost or hung (must be nothing), the hit rate beside that of an offline LRU cache on the same trace,
and what the gateway adds to a request with a 3 MB body, against calling TorchServe directly and through a relay that
does nothing but copy (what any process in between costs on this machine), alternating in one run: for an archive of
ours, whose handler reads the body where the gateway put it, and for one of another make, which gets it by TorchServe.
And, by bench/many_archives.py, what thousands of archives cost that are merely known.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import socket
import statistics
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from bench import many_archives
from bench.stores import build_demo, copy_code
from tests.serving import Server, serving
from tests.zoo import write_archive

ARCHIVES, ROOM = 20, 4
BALLAST_MIB = 150  # that each model holds
# Of each archive, by its own word: the ballast, and what a forked worker makes its own (measured: 16 to 24).
MEMORY_MIB = 180
# For ROOM models of the most that they may be measured to take, and not for one more of the least.
BUDGET_MIB = ROOM * MEMORY_MIB + 20
ZIPF = 1.1
BODY_BYTES = 3_000_000
# As clients send a picture to each: handlers of another make often read the body as it is.
BODIES: dict[str, dict[str, Any]] = {
    "ours": {"files": {"image": os.urandom(BODY_BYTES)}},
    "m00": {"content": os.urandom(BODY_BYTES)},
}
HANDLER = """
import numpy as np
from handlers.requests.reply import Reply
from handlers.worker.base import Handler


class Quick(Handler):
    def load(self, folder):
        pass

    def predict(self, request):
        return Reply(np.ones((1, 1), bool))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--archives", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        known = many_archives.run(Path(folder) / "many", arguments.archives)
        served = run(Path(folder), arguments.seconds, arguments.clients)
        print(json.dumps({"many archives known": known} | served, indent=2))


def run(folder: Path, seconds: float, clients: int, rounds: int = 200) -> dict[str, Any]:
    """Starts a server of its own in the folder. rounds: of the comparison that says what the gateway adds."""
    store = folder / "store"
    for number in range(ARCHIVES):
        write_archive(store, f"m{number:02}", memory_mib=MEMORY_MIB, ballast_mib=BALLAST_MIB, reply_bytes=4)
    (store / "ours").mkdir()
    copy_code(build_demo(folder / "code") / "lama", store / "ours")
    (store / "ours" / "handler.py").write_text(HANDLER)
    os.environ["PALIMPSEST_MEMORY_BUDGET"] = str(BUDGET_MIB)
    with serving(folder, store, "full", cpu_only=True) as server:
        return {
            "overhead": {"ours": overhead(server, "ours", rounds), "another make": overhead(server, "m00", rounds)},
            "traffic": asyncio.run(traffic(server, seconds, clients)),
        }


async def traffic(server: Server, seconds: float, clients: int) -> dict[str, Any]:
    """Every client asks for one model after another until the time is over."""
    asked = [f"m{number:02}" for number in range(ARCHIVES)]
    weights = [1 / (rank + 1) ** ZIPF for rank in range(ARCHIVES)]
    statuses: Counter[int | str] = Counter()
    trace: list[str] = []
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client(seed: int) -> None:
        draw = random.Random(seed)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=90) as http:
            while time.monotonic() < end:
                model = draw.choices(asked, weights)[0]
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
        "loaded at the end": sum(
            m["state"] == "ready" and m["name"] in asked for m in server.http.get("/v1/models").json()["models"]
        ),
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


def overhead(server: Server, model: str, rounds: int) -> dict[str, Any]:
    """The same body to the same loaded model: through the gateway, directly, and through a bare relay, in turn."""
    body = BODIES[model]
    server.http.post(f"/predictions/{model}", **body).raise_for_status()
    url, headers = torchserve_url(server, model)
    port = int(url.split(":")[2].split("/")[0])
    with relay(port) as relay_port, httpx.Client(timeout=30) as direct, httpx.Client(timeout=30) as relayed:
        relay_url = url.replace(f":{port}/", f":{relay_port}/")
        ways: dict[str, Callable[[], httpx.Response]] = {
            "gateway": lambda: server.http.post(f"/predictions/{model}", **body),
            "directly": lambda: direct.post(url, **body, headers=headers),
            "bare relay": lambda: relayed.post(relay_url, **body, headers=headers),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, ask in ways.items():
                began = time.perf_counter()
                ask().raise_for_status()
                times[name].append(time.perf_counter() - began)
    return {
        "ms": {name: quantiles(values, 1000) for name, values in times.items()},
        "gateway adds ms": added(times["gateway"], times["directly"]),
        "a bare relay adds ms": added(times["bare relay"], times["directly"]),
    }


def added(more: list[float], less: list[float]) -> dict[str, float]:
    """Of the distributions: what the slower way's quantile has more than the faster way's, in ms."""
    a, b = quantiles(more, 1000), quantiles(less, 1000)
    return {name: round(a[name] - b[name], 2) for name in a}


@contextmanager
def relay(target: int) -> Iterator[int]:
    """A process that copies bytes between its port, which is yielded, and the target's, and looks at none of them."""
    listener = socket.create_server(("127.0.0.1", 0))
    process = multiprocessing.get_context("fork").Process(target=_relay, args=(listener, target), daemon=True)
    process.start()
    try:
        yield listener.getsockname()[1]
    finally:
        process.terminate()
        process.join()
        listener.close()


def _relay(listener: socket.socket, target: int) -> None:
    client, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", target))
    for each in (client, server):
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    back = threading.Thread(target=_copy, args=(server, client), daemon=True)
    back.start()
    _copy(client, server)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    block = bytearray(2**18)
    while count := source.recv_into(block):
        sink.sendall(memoryview(block)[:count])


def torchserve_url(server: Server, model: str) -> tuple[str, dict[str, str]]:
    """Where the gateway's own TorchServe serves the model, found as its owner may: in its folder and its log."""
    home = next((server.folder / "tmp").glob("palimpsest-*"))
    key = json.loads((home / "key_file.json").read_text())["inference"]["key"]
    log = (server.folder / "state" / "logs" / "ts_log.log").read_text()
    address = re.findall(r"Inference API bind to: (http://[\d.:]+)", log)[-1]
    name = re.findall(rf"Model (p\.{model}[\w.-]*) loaded", log)[-1]
    return f"{address}/predictions/{name}", {"authorization": f"Bearer {key}"}


def quantiles(values: list[float], scale: float = 1.0) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered) * scale, 2),
        "p99": round(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * scale, 2),
    }


if __name__ == "__main__":
    main()
