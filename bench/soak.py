"""A studio's day in twenty minutes: a batch and a person, each with a key, at 80 % of what the machine can do.

    python -m bench.soak [--minutes 20] [--load 0.8]

The store has the demo SAM and LaMa and eight small archives, of which memory holds three, so that models load and leave
all the time. First the batch alone says how many requests per second the machine can do (closed loop, a minute); then
its requests come at random moments, in bursts, at the given share of that rate, while a person clicks every two
seconds. Reports what was lost (must be nothing), how long either waited, and what every process held, as medians of the
first and of the last quarter of the time: memory, threads, descriptors, processes, files.
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import signal
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.residency import quantiles
from bench.stores import build_demo
from tests.serving import ROOT, Server, is_worker, serving
from tests.zoo import write_archive

SMALL, ROOM = 8, 3  # archives, and how many of them there is room for beside SAM and LaMa
MEMORY_MIB, BALLAST_MIB = 100, 70  # of each small one, as in bench/churn.py
DEMO_MIB = 180  # what the demo SAM and LaMa take together while they work: 75 and 101
BURST = 12  # requests that the batch sends at one moment
CLICK_EVERY = 2.0  # seconds
SAMPLE_EVERY = 5.0  # seconds
DEADLINE = 120.0  # seconds to an answer, all tries together
PICTURE = (ROOT / "tests" / "data" / "dog-on-bench.png").read_bytes()
MASK = (ROOT / "tests" / "data" / "dog-on-bench-mask.jpg").read_bytes()


class Key:
    """One key's requests. Each try's answer is counted; 429 and 503 are asked again when Retry-After says so."""

    def __init__(self, http: httpx.AsyncClient, text: str) -> None:
        self.answers: Counter[str] = Counter()
        self.lost: list[str] = []
        self.seconds: list[float] = []
        self._http, self._headers = http, {"authorization": f"Bearer {text}"}

    async def ask(self, model: str) -> None:
        began = time.monotonic()
        while wait := await self._try(model):
            if time.monotonic() - began > DEADLINE:
                self.lost.append(f"{model}: no answer within {DEADLINE:g} s")
                return
            await asyncio.sleep(wait)
        self.seconds.append(time.monotonic() - began)

    async def _try(self, model: str) -> float:
        """Seconds after which to ask again; 0: answered, or lost."""
        try:
            answer = await self._http.post(f"/predictions/{model}", headers=self._headers, **_request(model))
        except httpx.HTTPError as error:
            self.lost.append(f"{model}: {type(error).__name__}")
            return 0
        code = "" if answer.is_success else answer.json().get("error", {}).get("code", "?")
        self.answers[f"{answer.status_code} {code}".strip()] += 1
        if answer.status_code in (429, 503) and "retry-after" in answer.headers:
            return float(answer.headers["retry-after"])
        if not answer.is_success:
            self.lost.append(f"{model}: {answer.status_code} {answer.text[:200]}")
        return 0

    def report(self) -> dict[str, Any]:
        return {"answers": dict(self.answers), "lost": self.lost, "seconds": quantiles(self.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--load", type=float, default=0.8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), arguments.minutes * 60, arguments.load), indent=2))


def run(folder: Path, seconds: float, load: float) -> dict[str, Any]:
    """Starts a server of its own in the folder."""
    store = folder / "store"
    build_demo(store)
    for number in range(SMALL):
        write_archive(store, f"m{number}", memory_mib=MEMORY_MIB, ballast_mib=BALLAST_MIB, reply_bytes=4)
    texts = {name: secrets.token_hex(24) for name in ("batch", "person")}
    os.environ["PALIMPSEST_KEYS"] = ",".join(f"{name}:edit+operate:{text}" for name, text in texts.items())
    os.environ["PALIMPSEST_MEMORY_BUDGET"] = str(DEMO_MIB + ROOM * MEMORY_MIB)
    with serving(folder, store, "demo", cpu_only=True) as server:
        server.http.headers["authorization"] = f"Bearer {texts['batch']}"
        report = asyncio.run(_watched(server, texts, seconds, load))
        family = server.family()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
        left = [str(each) for each in server.leftovers(family)]
    return report | {"exit code": code, "left behind": left}


async def _watched(server: Server, texts: dict[str, str], seconds: float, load: float) -> dict[str, Any]:
    samples: list[dict[str, float]] = []
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=server.http.base_url, timeout=DEADLINE, limits=limits) as http:
        first, alone = Key(http, texts["batch"]), Key(http, texts["person"])
        batch, person = Key(http, texts["batch"]), Key(http, texts["person"])
        capacity = await _capacity(first, min(60.0, seconds / 4))
        await _clicks(alone, time.monotonic() + min(20.0, seconds / 8))
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(_bursts(batch, capacity * load, end))
            group.create_task(_clicks(person, end))
            group.create_task(_sample(server, samples, end))
    models = server.http.get("/v1/models").json()["models"]
    quarter = max(1, len(samples) // 4)
    return {
        "requests per second that the machine can do": round(capacity, 2),
        "batch": batch.report(),
        "person": person.report(),
        "person alone": alone.report(),
        "loads": sum(model["loads"] for model in models),
        "loads failed": sum(model["failures"] for model in models),
        "leases and waiting at the end": sum(model["leases"] + model["queue"] for model in models),
        "held, first and last quarter": {
            name: [_median(samples[:quarter], name), _median(samples[-quarter:], name)] for name in samples[0]
        },
    }


async def _capacity(key: Key, seconds: float) -> float:
    """Requests per second, of which eight are always under way."""
    end = time.monotonic() + seconds

    async def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            await key.ask(_any_model(draw))

    began = time.monotonic()
    await asyncio.gather(*(client(seed) for seed in range(8)))
    return len(key.seconds) / (time.monotonic() - began)


async def _bursts(key: Key, rate: float, end: float) -> None:
    """Poisson's moments, each with a burst; every request is awaited at the end."""
    draw = random.Random(1)
    async with asyncio.TaskGroup() as group:
        while time.monotonic() < end:
            for _ in range(BURST):
                group.create_task(key.ask(_any_model(draw)))
            await asyncio.sleep(draw.expovariate(rate / BURST))


async def _clicks(key: Key, end: float) -> None:
    while (began := time.monotonic()) < end:
        await key.ask("sam")
        await asyncio.sleep(max(0.0, began + CLICK_EVERY - time.monotonic()))


def _any_model(draw: random.Random) -> str:
    """Half of the requests are for the small ones, the first of them most often."""
    small = [f"m{number}" for number in range(SMALL)]
    weights = [1 / (rank + 1) for rank in range(SMALL)]
    return draw.choice(["sam", "lama", *draw.choices(small, weights, k=2)])


def _request(model: str) -> dict[str, Any]:
    if model == "sam":
        return {"files": {"image": PICTURE}, "data": {"gen_args": '{"point_coords": [750, 500]}'}}
    if model == "lama":
        return {"files": {"image": PICTURE, "mask_image": MASK}}
    return {"content": b"x"}


async def _sample(server: Server, samples: list[dict[str, float]], end: float) -> None:
    while (left := end - time.monotonic()) > 0:
        with suppress(psutil.Error):  # a worker that ended meanwhile
            samples.append(await asyncio.to_thread(_held, server))
        await asyncio.sleep(min(SAMPLE_EVERY, left))


def _held(server: Server) -> dict[str, float]:
    """What is held at this moment: of the gateway, of TorchServe's Java, and of all processes together."""
    gateway = psutil.Process(server.process.pid)
    family = server.family()
    java = next(process for process in family if process.name() == "java")
    steady = [process for process in family if not any(is_worker(process, f"m{n}") for n in range(SMALL))]
    held: dict[str, float] = {}
    for name, process in (("gateway", gateway), ("Java", java)):
        held[f"{name}: private MB"] = process.memory_full_info().uss / 1e6
        held[f"{name}: threads"] = process.num_threads()
        held[f"{name}: descriptors"] = process.num_fds()
    held["processes without the small archives' workers"] = len(steady) + 1
    for place in ("state", "tmp"):
        files = [path for path in (server.folder / place).rglob("*") if path.is_file()]
        held[f"{place}: files"] = len(files)
        held[f"{place}: MB"] = sum(path.stat().st_size for path in files if path.exists()) / 1e6
    return held


def _median(samples: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(sample[name] for sample in samples), 1)


if __name__ == "__main__":
    main()
