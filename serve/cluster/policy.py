"""Which box a request goes to: bookkeeping and a choice without clock, I/O or log.

Whoever has the model ready comes first, then who has it parked, then the hash's choice: rendezvous hashing gives each
model an order of all boxes, of which a box that comes or goes changes only its own part, and the first free one in it
is taken, else the least busy one. So no request is refused.

Another copy is loaded where the model's own queue is long at each of its copies: what a box does for other models says
nothing of that, and where boxes are busy because they load too much, it would have them load even more. Of copies that
are free the first in the hash's order is used, so that the last ones fall idle when the queue shrinks, and are evicted.

What boxes published is old. So the first few are asked what they have now, and the choice is made anew with that, until
the first one is one that has just said so.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, islice
from typing import NamedTuple

# Seconds of work; who publishes cannot tell what a request takes, counts one for each.
FREE = 0.1  # a box that has less is free
QUEUE, ALONE = 0.6, 4.0  # another copy is wanted where each of many has so much, or one alone
LOAD = 2.0  # that a model which is being loaded keeps the next one waiting, about
WAKE = 8.0  # a box that has the model parked and less to do is better than a load elsewhere
ASKED, ROUNDS = 3, 4  # so many boxes are asked at a time, and so many times, at most
_MASK = 2**64 - 1


class Published(NamedTuple):
    """What a box says of itself. load: seconds of work that its requests will take, running or waiting. ready, loading:
    names of models (those that are being woken are loading, too) with their parts of that. parked: names.
    """

    load: float = 0.0
    ready: Mapping[str, float] = {}
    parked: Iterable[str] = ()
    loading: Mapping[str, float] = {}


class Sent(NamedTuple):
    """A request under way. seconds: of work that it is expected to take."""

    box: str
    model: str
    seconds: float


Ask = Callable[[list[str]], Awaitable[Collection[str]]]
_NOTHING = Published()


@dataclass(eq=False, slots=True)
class _Box:
    """seed: of its place in each model's order. own: seconds of work of the requests that this router has there. For
    each model, requests: how many these are, seconds: how long they take.
    """

    id: str
    seed: int
    routers: int
    published: Published = _NOTHING
    parked: frozenset[str] = frozenset()
    own: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def load(self) -> float:
        """The mean of two estimates: what it said, perhaps long ago, and this router's own part, times all routers."""
        return (self.published.load + self.own * self.routers) / 2

    @property
    def before_a_load(self) -> float:
        """That, and what it loads already: one after another."""
        return self.load + LOAD * len(self.published.loading)

    def queue(self, model: str) -> float:
        """The model's part of that."""
        said = self.published.ready.get(model) or self.published.loading.get(model) or 0.0
        return (said + self.seconds.get(model, 0.0) * self.routers) / 2


class View:
    """What one router knows of all boxes: what they published, which may be old, and its own requests under way.

    routers: how many there are, each of which sends about as much as this one.
    """

    def __init__(self, routers: int = 1) -> None:
        self._routers = routers
        self._boxes: dict[str, _Box] = {}
        self._ready: dict[str, set[_Box]] = {}
        self._parked: dict[str, set[_Box]] = {}
        self._loading: dict[str, set[_Box]] = {}
        self._requested: dict[str, set[_Box]] = {}

    def count_routers(self, routers: int) -> None:
        """There are so many from now on."""
        self._routers = routers
        for box in self._boxes.values():
            box.routers = routers

    def update(self, id: str, published: Published) -> None:
        """The box has come, or says this now."""
        box = self._boxes.get(id) or self._boxes.setdefault(id, _Box(id, _number(id), self._routers))
        parked = frozenset(published.parked)
        _move(self._ready, box, box.published.ready.keys(), published.ready.keys())
        _move(self._loading, box, box.published.loading.keys(), published.loading.keys())
        _move(self._parked, box, box.parked, parked)
        box.published, box.parked = published, parked

    def leave(self, id: str) -> None:
        """The box is gone; one that is not known is no error."""
        if box := self._boxes.get(id):
            _move(self._requested, box, box.requests, ())
            self.update(id, _NOTHING)
            del self._boxes[id]

    def sent(self, id: str, model: str, seconds: float = 1.0) -> Sent:
        """A request is sent to the box; what is returned goes to `ended`."""
        if box := self._boxes.get(id):
            box.own += seconds
            box.requests[model] += 1
            box.seconds[model] = box.seconds.get(model, 0.0) + seconds
            self._requested.setdefault(model, set()).add(box)
        return Sent(id, model, seconds)

    def ended(self, sent: Sent) -> None:
        """It is over: answered, or not."""
        box = self._boxes.get(sent.box)
        if box is None or sent.model not in box.requests:
            return  # the box left meanwhile
        box.own -= sent.seconds
        box.requests[sent.model] -= 1
        box.seconds[sent.model] -= sent.seconds
        if not box.requests[sent.model]:
            del box.requests[sent.model], box.seconds[sent.model]
            _move(self._requested, box, {sent.model}, ())
        if not box.requests:
            box.own = 0.0  # no sum of rounding errors

    async def choose(self, model: str, ask: Ask) -> Iterator[str]:
        """All boxes, as by `order`, once the first ones have been asked.

        ask: has boxes say what they would publish now, and gives that to `update`; returns those that say nothing. They
        come last.
        """
        asked, silent = set[str](), set[str]()
        for _ in range(ROUNDS if len(self._boxes) > 1 else 0):
            order = self.order(model, silent)
            first = list(islice(order, ASKED))
            if asked.issuperset(first[:1]):
                return chain(first, order)
            new = [id for id in first if id not in asked]
            asked.update(new)
            silent.update(await ask(new))
        return self.order(model, silent)

    def order(self, model: str, last: Collection[str] = ()) -> Iterator[str]:
        """All boxes, each once, the best first; made as it is asked for."""
        given = set(last)
        for box in self._preferred(model):
            if box.id not in given:
                given.add(box.id)
                yield box.id
        yield from (id for id in last if id in self._boxes)

    def _preferred(self, model: str) -> Iterator[_Box]:
        number = _number(model)

        def rank(box: _Box) -> int:
            return _rank(number, box)

        def soonest(box: _Box) -> tuple[float, int]:
            # What is before it in the line, while the device works for others as well.
            return 2 * box.queue(model) + box.load, rank(box)

        def least_busy(box: _Box) -> tuple[float, int]:
            return box.before_a_load, rank(box)

        ready, parked = self._ready.get(model, set()), self._parked.get(model, set())
        loading = (self._loading.get(model, set()) | self._requested.get(model, set())) - ready
        yield from sorted((box for box in ready if box.load < FREE), key=rank)
        if ready and not _is_long(min(box.queue(model) for box in ready), len(ready)):
            yield from sorted(ready, key=soonest)
        yield from sorted((box for box in parked - loading if box.before_a_load < WAKE), key=least_busy)
        if len(loading) >= max(1, len(ready)):
            # They may double while a load lasts: more at a time would answer a queue that these are about to answer.
            yield from sorted(ready | loading, key=soonest)
        yield from sorted((box for box in self._boxes.values() if box.before_a_load < FREE), key=rank)
        yield from sorted(self._boxes.values(), key=least_busy)


def _is_long(queue: float, copies: int) -> bool:
    """Whether another copy is worth its load and what is evicted for it, where each of so many has this queue or more:
    one of many is soon in use, a second where one nearly suffices is not.
    """
    return queue >= QUEUE + (ALONE - QUEUE) / copies


def _move(index: dict[str, set[_Box]], box: _Box, before: Iterable[str], now: Iterable[str]) -> None:
    """Notes the box under the models that it has `now`, and no longer under those that it had before."""
    before, now = set(before), set(now)
    for model in before - now:
        index[model].discard(box)
        if not index[model]:
            del index[model]
    for model in now - before:
        index.setdefault(model, set()).add(box)


def _rank(number: int, box: _Box) -> int:
    """The box's place in the model's order; less is earlier. Fibonacci hashing of two hashes that are mixed already."""
    return ((number ^ box.seed) * 0x9E3779B97F4A7C15) & _MASK


def _number(name: str) -> int:
    """The same in each process, unlike hash()."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")
