"""A fleet of boxes in virtual time: the real scheduler in each, and the real routing policy in front.

    python -m bench.simulation [--boxes 100] [--archives 1000] [--seconds 240] [--seeds 1] [--stale 10] [--svg FILE]
    python -m bench.simulation --full

Requests come by Zipf's law for one of the archives, after a day's curve around a mean load of 70 %, the day
compressed into --seconds; in its first quarter the fleet starts with nothing loaded and gets more and more of them,
which is not counted. Boxes publish what they have once a second at most, and each of four routers hears of it up to
--stale seconds later; some boxes are lost and later replaced. What was inside a lost box is asked again after a second,
as its error says. Other policies (bench/rivals.py) and ours with views that are never old get the same requests.
"""

import argparse
import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from bench import rivals
from bench.chart import bars
from bench.simulated_box import KINDS, Box, Lost, Simulated, archive
from serve.cluster.policy import Published, View
from serve.errors import PalimpsestError
from tests.virtual_time import VirtualTimeLoop

ZIPF = 1.1
SWING = 0.2  # of the load by day and night
ROUTERS = 4
NOTICE = 5.0  # seconds until a router hears that a box is lost, at most; whom it sends there meanwhile, it sends on
TRIES = 5  # boxes that a request is sent to
# By the number of routers.
POLICIES: dict[str, Callable[[int], View]] = {
    "ours": View,
    "ours, views never old": View,
    "bounded hashing": rivals.Bounded,
    "consistent hashing": rivals.Ring,
    "power of two": rivals.PowerOfTwo,
}


@dataclass(frozen=True)
class Scene:
    """stale: seconds that a view is old, at most."""

    boxes: int = 100
    archives: int = 1000
    seconds: float = 240.0
    load: float = 0.7
    stale: float = 10.0
    seed: int = 0

    @property
    def start(self) -> float:
        """Seconds until the fleet has its full share of requests, and is measured."""
        return self.seconds / 4


class Asked(NamedTuple):
    """work: seconds that it takes a device that does nothing else."""

    at: float
    archive: Simulated
    work: float


def requests(scene: Scene) -> list[Asked]:
    draw = random.Random(scene.seed)
    kinds = list(KINDS)
    archives = [archive(f"m{draw.getrandbits(40):010x}", kinds[rank % len(kinds)]) for rank in range(scene.archives)]
    sums = list(accumulate((rank + 1) ** -ZIPF for rank in range(scene.archives)))
    weights = [sums[0], *(after - before for before, after in pairwise(sums))]
    mean = sum(weight * each.kind.answer for weight, each in zip(weights, archives, strict=True)) / sums[-1]
    most = scene.load * scene.boxes / mean * (1 + SWING)
    asked, now = list[Asked](), 0.0
    while (now := now + draw.expovariate(most)) < scene.seconds:
        day = 1 - SWING * math.cos(2 * math.pi * now / scene.seconds)
        if draw.random() * (1 + SWING) < day * min(1.0, now / scene.start):
            which = draw.choices(archives, cum_weights=sums)[0]
            asked.append(Asked(now, which, which.kind.answer * draw.uniform(0.5, 1.5)))
    return asked


class Fleet:
    """The boxes, and the routers with what each knows of them."""

    def __init__(self, scene: Scene, policy: str) -> None:
        self._scene, self._draw = scene, random.Random(scene.seed + 1)
        self._loop = asyncio.get_running_loop()
        self._always_fresh = policy == "ours, views never old"
        count = 1 if self._always_fresh else ROUTERS
        self.routers = [POLICIES[policy](count) for _ in range(count)]
        self.boxes: dict[str, Box] = {}
        self.lost: list[Box] = []
        self._delays: dict[str, list[float]] = {}
        self._said: dict[str, float] = {}  # when each box last published something
        self._will_say: set[str] = set()
        self._heard: dict[tuple[View, Box], float] = {}  # when that was so which the router knows of the box
        self._names = (f"box{number}" for number in range(10**9))
        # What happened to the requests: by the state in which they found their model, by how they ended; and seconds.
        self.found: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.asked = 0  # boxes, by the routers
        self.waits: list[float] = []
        self.choices: list[float] = []
        for _ in range(scene.boxes):
            self.add()

    def add(self) -> None:
        box = Box(next(self._names), self._on_change)
        self.boxes[box.id] = box
        self._delays[box.id] = [self._draw.uniform(0, self._scene.stale) for _ in self.routers]
        for router in self.routers:
            router.update(box.id, box.published())

    def lose(self, count: int) -> None:
        for id in self._draw.sample(sorted(self.boxes), count):
            box = self.boxes.pop(id)
            self.lost.append(box)
            self._loop.create_task(box.lose())
            for router in self.routers:
                self._loop.call_later(self._draw.uniform(0, NOTICE), router.leave, id)

    async def ask(self, asked: Asked) -> None:
        """Until it is answered, by one box or another."""
        came = self._loop.time()
        router = self._draw.choice(self.routers)
        for _ in range(TRIES):
            box = await self._choose(router, asked.archive.name)
            sent = router.sent(box.id, asked.archive.name, asked.archive.kind.answer)
            if came >= self._scene.start:
                self.found[box.place(asked.archive)] += 1
            try:
                began = await box.serve(asked.archive, asked.work)
            except Lost:
                router.ended(sent)
                self.ends["lost with its box"] += 1
                await asyncio.sleep(1)
            except PalimpsestError as error:
                router.ended(sent)
                self.ends[f"refused: {type(error).__name__}"] += 1
                return
            else:
                router.ended(sent)
                self.ends["answered"] += 1
                if came >= self._scene.start:
                    self.waits.append(began - came)
                return
        self.ends["refused: too many tries"] += 1

    async def _choose(self, router: View, model: str) -> Box:
        """The first in the router's order that can be reached."""

        async def ask(boxes: list[str]) -> list[str]:
            self.asked += len(boxes)
            for box in boxes:
                if box in self.boxes:
                    self._tell(router, self.boxes[box], self.boxes[box].published(), self._loop.time())
            return [box for box in boxes if box not in self.boxes]

        began = time.thread_time()
        order = await router.choose(model, ask)
        box = next(self.boxes[id] for id in order if id in self.boxes)
        self.choices.append(time.thread_time() - began)
        return box

    def _on_change(self, box: Box) -> None:
        if not box.alive:
            return
        if self._always_fresh:
            for router in self.routers:
                router.update(box.id, box.published())
        elif box.id not in self._will_say:
            self._will_say.add(box.id)
            self._loop.call_at(max(self._loop.time(), self._said.get(box.id, 0.0) + 1), self._publish, box)

    def _publish(self, box: Box) -> None:
        self._will_say.discard(box.id)
        self._said[box.id] = self._loop.time()
        published = box.published()
        for router, delay in zip(self.routers, self._delays[box.id], strict=True):
            self._loop.call_later(delay, self._tell, router, box, published, self._loop.time())

    def _tell(self, router: View, box: Box, published: Published, at: float) -> None:
        """What it published may be older than what it has said meanwhile."""
        if box.alive and at >= self._heard.get((router, box), 0.0):
            self._heard[router, box] = at
            router.update(box.id, published)


async def play(scene: Scene, policy: str, asked: Sequence[Asked]) -> dict[str, Any]:
    fleet, loop = Fleet(scene, policy), asyncio.get_running_loop()
    some = max(1, scene.boxes // 50)
    loop.call_at(scene.seconds * 0.5, fleet.lose, some)
    for _ in range(some):
        loop.call_at(scene.seconds * 0.65, fleet.add)
    under_way = set[asyncio.Task[None]]()
    for each in asked:
        await asyncio.sleep(max(0.0, each.at - loop.time()))
        task = loop.create_task(fleet.ask(each))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    await asyncio.gather(*under_way)
    boxes = [*fleet.boxes.values(), *fleet.lost]
    ready = sum(model.state.value == "ready" for box in fleet.boxes.values() for model in box.scheduler.active())
    for box in fleet.boxes.values():
        await box.scheduler.close(0)
    return report(fleet, boxes) | {"ready models per box": round(ready / len(fleet.boxes), 2)}


def report(fleet: Fleet, boxes: Sequence[Box]) -> dict[str, Any]:
    events = sum((box.events for box in boxes), Counter[str]())
    found = sum(fleet.found.values())
    return {
        "ready share": round(fleet.found["ready"] / found, 4),
        "parked share": round(fleet.found["parked"] / found, 4),
        "wait s": quantiles(fleet.waits),
        "ends": dict(fleet.ends),
        "loads": events["loaded"],
        "wakes": events["woken"],
        "evictions": events["evicted"],
        "read from disk GiB": round(sum(box.engine.moved["disk"] for box in boxes) / 1024),
        "copied from host GiB": round(sum(box.engine.moved["host"] for box in boxes) / 1024),
        "boxes asked": round(fleet.asked / len(fleet.choices), 2),
        "choice us": quantiles([seconds * 1e6 for seconds in fleet.choices]),
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": round(ordered[len(ordered) * p // 100], 2) for p in (50, 95, 99)}


def run(scene: Scene, policy: str) -> dict[str, Any]:
    asked = requests(scene)
    loop = VirtualTimeLoop()
    began = time.process_time()
    try:
        result = loop.run_until_complete(play(scene, policy, asked))
    finally:
        loop.close()
    speed = round(len(asked) / (time.process_time() - began))
    return {"policy": policy, "requests": len(asked)} | result | {"requests per CPU second": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("boxes", 100), ("archives", 1000), ("seeds", 1), ("seconds", 240.0), ("stale", 10.0)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--full", action="store_true", help="1,000 boxes, 10,000 archives, three seeds: an hour")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    if arguments.full:
        arguments.boxes, arguments.archives, arguments.seeds = 1000, 10_000, 3
    scenes = [
        Scene(arguments.boxes, arguments.archives, arguments.seconds, stale=arguments.stale, seed=seed)
        for seed in range(arguments.seeds)
    ]
    results = list[dict[str, Any]]()
    with ProcessPoolExecutor(arguments.processes) as pool:
        runs = [(scene, pool.submit(run, scene, policy)) for scene, policy in product(scenes, arguments.policies)]
        for scene, each in runs:
            results.append(asdict(scene) | each.result())
            print(json.dumps(results[-1]), flush=True)
    if arguments.svg:
        arguments.svg.write_text(chart(results))


def chart(results: Sequence[dict[str, Any]]) -> str:
    """The means over the seeds."""

    def mean(policy: str, figure: Callable[[dict[str, Any]], float]) -> float:
        figures = [figure(result) for result in results if result["policy"] == policy]
        return sum(figures) / len(figures)

    policies = list(dict.fromkeys(result["policy"] for result in results))
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "not found ready, %": lambda result: 100 * (1 - result["ready share"]),
        "wait s, p50": lambda result: max(result["wait s"]["p50"], 0.01),
        "wait s, p95": lambda result: result["wait s"]["p95"],
        "wait s, p99": lambda result: result["wait s"]["p99"],
        "loads per 100": lambda result: 100 * result["loads"] / result["requests"],
    }
    groups = {name: {policy: mean(policy, figure) for policy in policies} for name, figure in figures.items()}
    scene = results[0]
    title = f"{scene['boxes']:,} boxes, {scene['archives']:,} archives, load 70 %, views up to {scene['stale']:g} s old"
    return bars(groups, title)


if __name__ == "__main__":
    main()
