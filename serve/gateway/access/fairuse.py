"""How much of the server one key may have at a time, and how often it may ask; without keys, one address.

Counted is what costs a worker or memory: predictions, edits, uploads. Lists of models and ending a job are free.
"""

import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fastapi import Request
from starlette.types import Scope

from serve.errors import OverShare
from serve.gateway.access.declared import pixels
from serve.gateway.access.guard import KEY
from serve.gateway.connections import household
from serve.memory_file import Part

_COUNTED = re.compile(
    r"/(predictions|endpoints)/|/models/.+/invoke$|/v1/(images(/[^/]*)?|images/edits|segment|erase|replace)$"
)
SHARE = "palimpsest.share"
"""In the scope of a request that counts: its Share."""
MOST_RESTING = 1024  # that have nothing under way, and whose last requests still count
_RETRY_AFTER = 2  # seconds, where it is not known when one of its requests ends


class Limits(NamedTuple):
    """Of one key. requests, pixels: under way. rate: requests a second. burst: of them at once."""

    requests: int
    pixels: float
    rate: float
    burst: float


class _Account:
    """What one has under way. used_up_to: the time at which all its requests so far will have been paid, at `rate`."""

    def __init__(self, used_up_to: float) -> None:
        self.used_up_to = used_up_to
        self.requests = 0
        self.pixels = 0.0


class FairUse:
    """Remembers those that have something under way and, of the others, the last MOST_RESTING.

    now: seconds on any clock that does not go back.
    """

    def __init__(self, limits: Limits, now: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._now = limits, now
        self._busy: dict[str, _Account] = {}
        self._resting: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._busy) + len(self._resting)

    @contextmanager
    def request(self, client: str) -> Iterator["Share"]:
        """One request, from its head to the end of its answer. Raises OverShare."""
        account = self._busy.get(client) or _Account(self._resting.get(client, 0.0))
        if account.requests >= self._limits.requests:
            raise OverShare(
                f"{account.requests} requests of {client} are under way, as many as one may have"
                " (PALIMPSEST_KEY_REQUESTS): wait for their answers",
                _RETRY_AFTER,
            )
        self._pay(client, account)
        self._resting.pop(client, None)
        self._busy[client] = account
        account.requests += 1
        share = Share(client, account, self._limits.pixels)
        try:
            yield share
        finally:
            share.give_back()
            account.requests -= 1
            if not account.requests:
                self._rest(client, account)

    def _pay(self, client: str, account: _Account) -> None:
        """Raises OverShare where it has asked too often."""
        now, rate = self._now(), self._limits.rate
        earliest = max(account.used_up_to, now) - (self._limits.burst - 1) / rate
        if earliest > now:
            raise OverShare(
                f"{client} asks more often than {rate * 60:g} times a minute (PALIMPSEST_KEY_RATE): ask less often",
                math.ceil(earliest - now),
            )
        account.used_up_to = max(account.used_up_to, now) + 1 / rate

    def _rest(self, client: str, account: _Account) -> None:
        del self._busy[client]
        if account.used_up_to > self._now():
            self._resting[client] = account.used_up_to
            if len(self._resting) > MOST_RESTING:
                self._resting.popitem(last=False)


class Share:
    """What one request has of its client's."""

    def __init__(self, client: str, account: _Account, most: float) -> None:
        self.client, self._account, self._most, self._pixels = client, account, most, 0.0

    def take(self, picture: Part | str) -> None:
        """Counts a picture's pixels. Raises OverShare; but whoever has nothing else under way may have any picture."""
        amount = pixels(picture)
        others = self._account.pixels - self._pixels
        if others and self._account.pixels + amount > self._most:
            raise OverShare(
                f"{self.client} has pictures of {others / 1e6:.0f} megapixels under way; with {amount / 1e6:.1f} more"
                f" it would have over {self._most / 1e6:g} (PALIMPSEST_KEY_MEGAPIXELS): wait for their answers",
                _RETRY_AFTER,
            )
        self._pixels += amount
        self._account.pixels += amount

    def give_back(self) -> None:
        self._account.pixels -= self._pixels
        self._pixels = 0.0


def counts(path: str) -> bool:
    """path: as it is routed."""
    return _COUNTED.match(path) is not None


def client_of(scope: Scope) -> str:
    """Whose request it is: its key's name; without keys, its address as people know it. Empty: nobody can tell."""
    key: str | None = scope.get(KEY)
    if key is not None:
        return key
    return household(scope["client"][0]) if scope.get("client") else ""


def share_of(request: Request) -> Share:
    """That of a request to a path that counts."""
    share: Share = request.scope[SHARE]
    return share
