"""Who has to leave one box: the server's rules, LRFU and LRU, beside others on several traces.

    python -m bench.eviction [--requests 20000] [--seeds 5]

One request after another, each of which needs its model in memory. GDSF (Cherkasova 1998) keeps what is asked for
often, is small and takes long to load; W-TinyLFU (Einziger 2017) lets a newcomer stay only where it is asked for more
often than whom it would replace: here it must be loaded in any case, so it is the next to leave. LRFU (Lee
2001) counts requests, each half as much after a hundred others. Belady's rule knows the future, and is the optimum
where all sizes are equal. The table has the share of requests that find their model, the seconds of loading per 100
requests, and the longest row of requests for one model that all had to load it.
"""

import argparse
import math
import random
import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple, Protocol

from serve.residency.policy import Resident, choose_victims, heat_after

ARCHIVES, ROOM = 20, 4


class Item(NamedTuple):
    """size: of any unit. load: seconds."""

    name: str
    size: int
    load: float


class Trace(NamedTuple):
    requests: list[Item]
    budget: int


class Rule(Protocol):
    def asked(self, item: Item, at: int) -> None:
        """A request for it comes."""

    def victims(self, need: int, held: dict[str, Item], at: int) -> list[str]:
        """Those of the held that go, so that `need` comes free."""


class Ranked:
    """Whoever has the lowest value goes first."""

    def asked(self, item: Item, at: int) -> None: ...

    def value(self, item: Item, at: int) -> float:
        raise NotImplementedError

    def victims(self, need: int, held: dict[str, Item], at: int) -> list[str]:
        # choose_victims takes who was used longest ago: what the rule values least takes that place.
        residents = [Resident(n, i.size, False, False, 0.0, self.value(i, at)) for n, i in held.items()]
        return [victim.key for victim in choose_victims(need, residents, 0.0, 0.0) or []]


class Lru(Ranked):
    def __init__(self, trace: Trace) -> None:
        self._used: dict[str, int] = {}

    def asked(self, item: Item, at: int) -> None:
        self._used[item.name] = at

    def value(self, item: Item, at: int) -> float:
        return self._used[item.name]


class Gdsf(Ranked):
    """value: the clock when it was last used, and how often it was since it came, times its load, by its size."""

    def __init__(self, trace: Trace) -> None:
        self._clock = 0.0
        self._count: Counter[str] = Counter()
        self._value: dict[str, float] = {}

    def asked(self, item: Item, at: int) -> None:
        self._count[item.name] += 1
        self._value[item.name] = self._clock + self._count[item.name] * item.load / item.size

    def value(self, item: Item, at: int) -> float:
        return self._value[item.name]

    def victims(self, need: int, held: dict[str, Item], at: int) -> list[str]:
        gone = super().victims(need, held, at)
        self._clock = max([self._clock, *(self._value[name] for name in gone)])
        for name in gone:
            del self._count[name]
        return gone


class TinyLfu(Ranked):
    """Counts of all that is asked for, halved every so many requests; the one that came last is the window."""

    SAMPLE = 10 * ARCHIVES

    def __init__(self, trace: Trace) -> None:
        self._count: Counter[str] = Counter()
        self._used: dict[str, int] = {}

    def asked(self, item: Item, at: int) -> None:
        self._used[item.name] = at
        self._count[item.name] += 1
        if at % self.SAMPLE == self.SAMPLE - 1:
            self._count = Counter({name: count // 2 for name, count in self._count.items() if count > 1})

    def value(self, item: Item, at: int) -> float:
        return self._count[item.name] + self._used[item.name] / (at + 1)  # the count, then who was used last


class Lrfu(Ranked):
    """Its requests, each of which counts half after a hundred others."""

    def __init__(self, trace: Trace) -> None:
        self._heat: dict[str, float] = {}

    def asked(self, item: Item, at: int) -> None:
        self._heat[item.name] = heat_after(self._heat.get(item.name, -math.inf), at)

    def value(self, item: Item, at: int) -> float:
        return self._heat[item.name]


class Belady(Ranked):
    """Whoever is asked for next goes last."""

    def __init__(self, trace: Trace) -> None:
        self._when: defaultdict[str, list[int]] = defaultdict(list)
        for at, item in enumerate(trace.requests):
            self._when[item.name].append(at)

    def value(self, item: Item, at: int) -> float:
        when = self._when[item.name]
        next_one = bisect_right(when, at)
        return -when[next_one] if next_one < len(when) else -float("inf")


RULES: dict[str, Callable[[Trace], Rule]] = {
    "LRU": Lru,
    "GDSF": Gdsf,
    "W-TinyLFU": TinyLfu,
    "LRFU": Lrfu,
    "Belady": Belady,
}


class Figures(NamedTuple):
    """found: share of requests. seconds: of loads, per 100 requests. row: the longest of loads for one model alone."""

    found: float
    seconds: float
    row: float


def play(trace: Trace, rule: Rule) -> Figures:
    held: dict[str, Item] = {}
    found, seconds = 0, 0.0
    rows: Counter[str] = Counter()
    longest = 0
    for at, item in enumerate(trace.requests):
        rule.asked(item, at)
        if item.name in held:
            found += 1
            rows[item.name] = 0
            continue
        need = item.size + sum(other.size for other in held.values()) - trace.budget
        for name in rule.victims(need, held, at) if need > 0 else []:
            del held[name]
        held[item.name] = item
        seconds += item.load
        rows[item.name] += 1
        longest = max(longest, rows[item.name])
    count = len(trace.requests)
    return Figures(found / count, 100 * seconds / count, longest)


EVEN = [Item(f"m{number:02}", 1, 2.0) for number in range(ARCHIVES)]
# As the kinds in bench/simulated_box.py: MiB, and seconds.
UNEVEN = [Item(f"m{number:02}", *[(2400, 1.6), (1300, 1.3), (4300, 2.7)][number % 3]) for number in range(ARCHIVES)]


def drawn(draw: random.Random, items: list[Item], zipf: float) -> Iterator[Item]:
    sums = list(accumulate((rank + 1) ** -zipf for rank in range(len(items))))
    while True:
        yield draw.choices(items, cum_weights=sums)[0]


def steady(count: int, seed: int, items: list[Item] = EVEN, zipf: float = 1.1) -> list[Item]:
    draw = random.Random(seed)
    source = drawn(draw, draw.sample(items, len(items)), zipf)
    return [next(source) for _ in range(count)]


def shifting(count: int, seed: int, every: int = 500) -> list[Item]:
    """Others are popular after so many requests."""
    return [item for part in range(0, count, every) for item in steady(every, seed * 1000 + part)]


def scanned(count: int, seed: int, every: int = 200) -> list[Item]:
    """After so many requests someone asks for each model once."""
    return [item for part in range(0, count, every) for item in [*steady(every, seed * 1000 + part % 7), *EVEN]]


def share(count: int, seed: int) -> list[Item]:
    """What a box of a thousand gets of 10,000 archives by a hash."""
    draw = random.Random(seed)
    ranks = draw.sample(range(1, 10_001), 10)
    names = [Item(f"m{rank}", 1, 2.0) for rank in ranks]
    return draw.choices(names, [rank**-1.1 for rank in ranks], k=count)


TRACES: dict[str, Callable[[int, int], Trace]] = {
    "Zipf 1.1": lambda count, seed: Trace(steady(count, seed), ROOM),
    "Zipf 0.7": lambda count, seed: Trace(steady(count, seed, zipf=0.7), ROOM),
    "shifting popularity": lambda count, seed: Trace(shifting(count, seed), ROOM),
    "scans": lambda count, seed: Trace(scanned(count, seed), ROOM),
    "a box's share of 10,000": lambda count, seed: Trace(share(count, seed), ROOM),
    "uneven sizes": lambda count, seed: Trace(steady(count, seed, UNEVEN), 10_700),
}


def compare(requests: int, seeds: int) -> dict[str, dict[str, Figures]]:
    """The means over the seeds, by trace and rule."""
    table: dict[str, dict[str, Figures]] = {}
    for name, make in TRACES.items():
        traces = [make(requests, seed) for seed in range(seeds)]
        table[name] = {
            rule: Figures(*map(statistics.mean, zip(*(play(t, start(t)) for t in traces), strict=True)))
            for rule, start in RULES.items()
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    print("| trace | rule | found | load s per 100 | longest row of loads |\n|---|---|--:|--:|--:|")
    for trace, rules in compare(arguments.requests, arguments.seeds).items():
        for rule, figures in rules.items():
            print(f"| {trace} | {rule} | {figures.found:.3f} | {figures.seconds:.1f} | {figures.row:.0f} |")


if __name__ == "__main__":
    main()
