"""Which box a request goes to: bookkeeping and a choice without clock, I/O or log.

Whoever has the model ready comes first, then who has it parked, then the hash's choice: rendezvous hashing gives each
model an order of all boxes, of which a box that comes or goes changes only its own part, and the first free one in it
is taken, else the least busy one. So no request is refused.

Another copy is loaded where the model's own queue is long at each of its copies: what a box does for other models says
nothing of that, and where boxes are busy because they load too much, it would have them load even more. Of copies that
are free the first in the hash's order is used, so that the last ones fall idle when the queue shrinks, and are evicted.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import nsmallest
from typing import NamedTuple

# Seconds of work; who publishes cannot tell what a request takes, counts one for each.
FREE = 0.1  # a box that has less is free
QUEUE, ALONE = 0.6, 4.0  # another copy is wanted where each of many has so much, or one alone
LEARNED = 10  # updates of a box until what its own answers say is forgotten, should it not say so itself
WAKE = 8.0  # a box that has the model parked and less to do is better than a load elsewhere
ASKED = 3  # boxes of about the same worth, at most
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


_NOTHING = Published()


@dataclass(eq=False, slots=True)
class _Box:
    """seed: of its place in each model's order. own: seconds of work of the requests that this router has there, asked:
    how many for each model, seconds: how long these take. learned: models that have answered from there, and for
    how many updates more that counts as ready.
    """

    id: str
    seed: int
    routers: int
    published: Published = _NOTHING
    parked: frozenset[str] = frozenset()
    own: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    learned: dict[str, int] = field(default_factory=dict)

    @property
    def ready(self) -> set[str]:
        return self.published.ready.keys() | self.learned.keys()

    @property
    def load(self) -> float:
        """The mean of two estimates: what it said, perhaps long ago, and this router's own part, times all routers."""
        return (self.published.load + self.own * self.routers) / 2

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
        self._asked: dict[str, set[_Box]] = {}

    def count_routers(self, routers: int) -> None:
        """There are so many from now on."""
        self._routers = routers
        for box in self._boxes.values():
            box.routers = routers

    def update(self, id: str, published: Published) -> None:
        """The box has come, or says this now."""
        box = self._boxes.get(id) or self._boxes.setdefault(id, _Box(id, _number(id), self._routers))
        parked = frozenset(published.parked)
        before = box.ready
        box.learned = {model: n - 1 for model, n in box.learned.items() if n > 1 and model not in published.ready}
        _move(self._ready, box, before, published.ready.keys() | box.learned.keys())
        _move(self._loading, box, box.published.loading.keys(), published.loading.keys())
        _move(self._parked, box, box.parked, parked)
        box.published, box.parked = published, parked

    def leave(self, id: str) -> None:
        """The box is gone; one that is not known is no error."""
        if box := self._boxes.get(id):
            _move(self._ready, box, box.learned, ())
            _move(self._asked, box, box.asked, ())
            box.learned = {}
            self.update(id, _NOTHING)
            del self._boxes[id]

    def sent(self, id: str, model: str, seconds: float = 1.0) -> Sent:
        """A request is sent to the box; what is returned goes to `ended`."""
        if box := self._boxes.get(id):
            box.own += seconds
            box.asked[model] += 1
            box.seconds[model] = box.seconds.get(model, 0.0) + seconds
            self._asked.setdefault(model, set()).add(box)
        return Sent(id, model, seconds)

    def ended(self, sent: Sent, answered: bool = True) -> None:
        """It is over. answered: by the model, which is ready there, then, though the box may not have said so yet."""
        box = self._boxes.get(sent.box)
        if box is None or sent.model not in box.asked:
            return  # the box left meanwhile
        if answered and sent.model not in box.ready:
            box.learned[sent.model] = LEARNED
            _move(self._ready, box, (), {sent.model})
        box.own -= sent.seconds
        box.asked[sent.model] -= 1
        box.seconds[sent.model] -= sent.seconds
        if not box.asked[sent.model]:
            del box.asked[sent.model], box.seconds[sent.model]
            _move(self._asked, box, {sent.model}, ())
        if not box.asked:
            box.own = 0.0  # no sum of rounding errors

    def order(self, model: str) -> Iterator[list[str]]:
        """All boxes, each once, the best first; made as it is asked for.

        Those in one list are of about the same worth: that one of them is to be taken that has the fewest requests now,
        of equals the first.
        """
        given = set[str]()
        for boxes in self._preferred(model):
            if new := [box.id for box in boxes if box.id not in given]:
                given.update(new)
                yield new

    def _preferred(self, model: str) -> Iterator[list[_Box]]:
        number = _number(model)

        def rank(box: _Box) -> int:
            return _rank(number, box)

        def soonest(box: _Box) -> tuple[float, int]:
            # What is before it in the line, while the device works for others as well.
            return 2 * box.queue(model) + box.load, rank(box)

        def least_busy(box: _Box) -> tuple[float, int]:
            return box.load, rank(box)

        ready, parked = self._ready.get(model, set()), self._parked.get(model, set())
        loading = (self._loading.get(model, set()) | self._asked.get(model, set())) - ready
        if free := [box for box in ready if box.load < FREE]:
            yield nsmallest(ASKED, free, key=rank)
        if ready and not _is_long(min(box.queue(model) for box in ready), len(ready)):
            yield nsmallest(ASKED, ready, key=soonest)
        if awake := [box for box in parked - loading if box.load < WAKE]:
            yield nsmallest(ASKED, awake, key=least_busy)
        if len(loading) >= max(1, len(ready)):
            # They may double while a load lasts: more at a time would answer a queue that these are about to answer.
            yield nsmallest(ASKED, ready | loading, key=soonest)
        if anywhere := [box for box in self._boxes.values() if box.load < FREE]:
            yield nsmallest(ASKED, anywhere, key=rank)
        yield from ([box] for box in sorted(self._boxes.values(), key=least_busy))


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
