"""Twelve archives, room for three, and every few seconds a worker is killed.

    python -m bench.churn [--seconds 180] [--every 5] [--clients 8]

Every client asks until it has an answer: after 429 and 503 it asks again when Retry-After says so. Reports what was
lost (an answer that is neither), what hung (longer than DEADLINE with all its tries), the time to an answer, and what
the server left behind when it was ended. Both lost and hung must be nothing.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.residency import quantiles
from tests.serving import Server, is_worker, serving
from tests.zoo import write_archive

ARCHIVES, ROOM = 12, 3
MEMORY_MIB = 100  # of each archive, by its own word: the ballast, and what a forked worker makes its own
BALLAST_MIB = 70
DEADLINE = 60.0  # seconds to an answer, all tries together
_NAMES = [f"m{number:02}" for number in range(ARCHIVES)]


class Tally:
    """What the clients saw. answers: by status and code, each try one."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.lost: list[str] = []
        self.seconds: list[float] = []
        self.lock = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--every", type=float, default=5)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), arguments.seconds, arguments.every, arguments.clients), indent=2))


def run(folder: Path, seconds: float, every: float, clients: int) -> dict[str, Any]:
    """Starts a server of its own in the folder. every: seconds between two kills."""
    store = folder / "store"
    for name in _NAMES:
        write_archive(store, name, memory_mib=MEMORY_MIB, ballast_mib=BALLAST_MIB, reply_bytes=4)
    os.environ["PALIMPSEST_MEMORY_BUDGET"] = str(ROOM * MEMORY_MIB + 50)
    tally = Tally()
    with serving(folder, store, "full", cpu_only=True) as server:
        end = time.monotonic() + seconds
        threads = [threading.Thread(target=_client, args=(server.port, seed, end, tally)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        kills = _kill_workers(server, every, end)
        for thread in threads:
            thread.join(2 * DEADLINE)
        hung = sum(thread.is_alive() for thread in threads) + sum(each > DEADLINE for each in tally.seconds)
        models = server.http.get("/v1/models").json()["models"]
        family = server.family()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
        left = [str(each) for each in server.leftovers(family)]
    return {
        "requests answered": len(tally.seconds),
        "answers": dict(tally.answers),
        "lost": tally.lost,
        "hung": hung,
        "workers killed": kills,
        "loads": sum(model["loads"] for model in models),
        "loads failed": sum(model["failures"] for model in models),
        "leases and waiting at the end": sum(model["leases"] + model["queue"] for model in models),
        "seconds to an answer": quantiles(tally.seconds),
        "longest": round(max(tally.seconds), 2),
        "exit code": code,
        "left behind": left,
    }


def _client(port: int, seed: int, end: float, tally: Tally) -> None:
    draw = random.Random(seed)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=DEADLINE) as http:
        while time.monotonic() < end:
            name, began = draw.choice(_NAMES), time.monotonic()
            while wait := _ask(http, name, tally):
                time.sleep(wait)
            with tally.lock:
                tally.seconds.append(time.monotonic() - began)


def _ask(http: httpx.Client, name: str, tally: Tally) -> float:
    """Seconds after which to ask again; 0: answered, or lost."""
    try:
        answer = http.post(f"/predictions/{name}", content=b"x")
    except httpx.HTTPError as error:
        with tally.lock:
            tally.lost.append(f"{name}: {type(error).__name__}")
        return 0
    code = "" if answer.is_success else answer.json().get("error", {}).get("code", "?")
    retry = answer.status_code in (429, 503) and "retry-after" in answer.headers
    with tally.lock:
        tally.answers[f"{answer.status_code} {code}".strip()] += 1
        if not retry and answer.content != bytes(4):
            tally.lost.append(f"{name}: {answer.status_code} {answer.text[:200]}")
    return float(answer.headers["retry-after"]) if retry else 0


def _kill_workers(server: Server, every: float, end: float) -> int:
    """One at a time, whatever it does: loading, working, idle or leaving."""
    draw, kills = random.Random(0), 0
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(every, left))
        workers = [process for process in server.family() if any(is_worker(process, name) for name in _NAMES)]
        with suppress(psutil.Error, IndexError):
            draw.choice(workers).kill()
            kills += 1
    return kills


if __name__ == "__main__":
    main()
