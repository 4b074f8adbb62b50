"""Which models must go so that another fits: pure functions, no clock, no log, no I/O."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Resident:
    """A model in memory, as eviction sees it.

    size: bytes that come back when it goes. in_use: it serves requests or has some waiting.
    stale: its archive was replaced or removed. ready_since, last_used: seconds on one clock.
    heat: how much it was in demand of late, on any scale.
    """

    key: str
    size: int
    in_use: bool
    stale: bool
    ready_since: float
    last_used: float
    heat: float = -math.inf


def choose_victims(need: int, residents: Sequence[Resident], now: float, minimum_stay: float) -> list[Resident] | None:
    """The residents whose going frees at least `need` bytes, in the order in which they should go.

    Stale ones go first, then idle ones, the coldest first and of equals the longest unused. If those are not enough,
    models in use go as well, the one that has stayed longest first, so that no model starves behind busy ones; but none
    before it has stayed `minimum_stay` seconds, or two of them would chase each other out without ever working. The
    caller lets requests that run finish. None: not possible now. Pinned models are not given to this function.
    """
    idle = sorted((r for r in residents if not r.in_use), key=lambda r: (not r.stale, r.heat, r.last_used))
    in_use = sorted(
        (r for r in residents if r.in_use and (r.stale or now >= r.ready_since + minimum_stay)),
        key=lambda r: (not r.stale, r.ready_since),
    )
    victims: list[Resident] = []
    freed = 0
    for resident in [*idle, *in_use]:
        if freed >= need:
            break
        victims.append(resident)
        freed += resident.size
    return _without_spare(victims, need) if freed >= need else None


def _without_spare(victims: list[Resident], need: int) -> list[Resident]:
    """Lets those stay, most recently chosen first, whose bytes the others make up for."""
    spare = sum(r.size for r in victims) - need
    needed: list[Resident] = []
    for victim in reversed(victims):
        if victim.size <= spare:
            spare -= victim.size
        else:
            needed.append(victim)
    return needed[::-1]


# Requests, of all models, after which one counts half as much: enough to tell often from seldom, and few enough that
# what was popular an hour ago leaves (bench/eviction.py).
_HALF_LIFE = 100


def heat_after(heat: float, request: int) -> float:
    """The heat of a model that is asked for by the server's so-manieth request; -inf: it never was before.

    The sum over its requests of 2 ** (request / half-life), which orders models as decayed counts would at any time
    (LRFU: Lee et al. 2001); its logarithm, for it grows beyond all numbers.
    """
    new = request / _HALF_LIFE
    return new + math.log2(1 + 2 ** (heat - new))
