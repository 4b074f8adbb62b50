"""Other policies than serve/cluster/policy.py, for comparison: they know the boxes' loads as it does, but no models."""

import random
from bisect import bisect
from collections.abc import Collection, Iterator

from serve.cluster import policy
from serve.cluster.policy import Ask


class Loads(policy.View):
    """The loads, and a place in every order for each box."""

    def loads(self) -> dict[str, float]:
        return {id: box.load for id, box in self._boxes.items()}

    async def choose(self, model: str, ask: Ask) -> Iterator[str]:
        return self.order(model)


class PowerOfTwo(Loads):
    """The less busy of two at random, as Ray Serve does by default: it asks them how many requests they have."""

    def __init__(self, routers: int) -> None:
        super().__init__(routers)
        self._draw = random.Random(0)

    async def choose(self, model: str, ask: Ask) -> Iterator[str]:
        two = self._draw.sample(list(self._boxes), 2)
        silent = await ask(two)
        loads = {id: self._boxes[id].published.load for id in two if id not in silent}
        return iter(sorted(loads, key=lambda id: loads[id]) or list(self._boxes))


class Ring(Loads):
    """Plain consistent hashing on a ring with so many points for each box, whatever the load."""

    POINTS = 100

    def __init__(self, routers: int) -> None:
        super().__init__(routers)
        self._ring: list[tuple[int, str]] = []
        self._of: set[str] = set()

    def order(self, model: str, last: Collection[str] = ()) -> Iterator[str]:
        if self._of != self._boxes.keys():
            self._of = set(self._boxes)
            points = ((policy._number(f"{id}#{point}"), id) for id in self._of for point in range(self.POINTS))
            self._ring = sorted(points)
        first = bisect(self._ring, (policy._number(model), ""))
        for _, id in self._ring[first:] + self._ring[:first]:
            yield id


class Bounded(Loads):
    """Rendezvous hashing: the first box in the model's order whose load is below 1.25 times the mean."""

    def order(self, model: str, last: Collection[str] = ()) -> Iterator[str]:
        number = policy._number(model)
        loads = self.loads()
        bound = max(1.0, 1.25 * sum(loads.values()) / len(loads))
        if within := [box for box in self._boxes.values() if loads[box.id] < bound]:
            yield min(within, key=lambda box: policy._rank(number, box)).id
        yield from sorted(loads, key=lambda id: loads[id])
