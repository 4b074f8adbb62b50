"""Which models have a series of their own in the metrics."""

from collections import Counter
from collections.abc import Callable

OTHER = "(other)"  # no archive can have this name
_ROOM = 100  # names at the start
_MOST_COUNTED = 2000
_FEW = 4  # requests that move nobody


class Busiest:
    """The busiest, by name; the rest is one series.

    What happens is counted in the series that its model has at that moment, and stays there: a series never falls. A
    model that gives its own up has none of what it was, and begins at zero where it gets one again.
    """

    def __init__(self, on_leave: Callable[[str], None]) -> None:
        """on_leave: told of a name whose series are to go."""
        self._on_leave = on_leave
        self._room = _ROOM
        self._uses: Counter[str] = Counter()
        self._named: set[str] = set()

    def label(self, name: str) -> str:
        """Returns the series under which something about the model is counted now."""
        if name in self._named:
            return name
        if len(self._named) < self._room:
            self._named.add(name)
            return name
        return OTHER

    def use(self, name: str) -> str:
        """The same, of a request. One asked for twice as often as the rarest of those with a series takes its place."""
        self._uses[name] += 1
        if len(self._uses) > _MOST_COUNTED:
            self._forget_half()
        if name not in self._named and len(self._named) >= self._room:
            rarest = self._rarest()
            if self._uses[name] > 2 * self._uses[rarest] + _FEW:
                self._leave(rarest)
        return self.label(name)

    def shrink(self) -> bool:
        """Makes room for a tenth fewer names from now on; False where only one is left."""
        if len(self._named) <= 1:
            return False
        self._room = len(self._named) * 9 // 10
        while len(self._named) > self._room:
            self._leave(self._rarest())
        return True

    def _rarest(self) -> str:
        return min(self._named, key=lambda name: (self._uses[name], name))

    def _leave(self, name: str) -> None:
        self._named.remove(name)
        self._on_leave(name)

    def _forget_half(self) -> None:
        """Halves every count, and drops those that were asked for once."""
        self._uses = Counter({name: count // 2 for name, count in self._uses.items() if count > 1})
