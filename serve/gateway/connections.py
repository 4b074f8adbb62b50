"""How many connections there are, and which one goes where there would be too many."""

import ipaddress
import resource
from collections import Counter
from typing import Protocol

from serve.gateway.proxies import Networks, among

MOST = 1000
SHARE = 2  # one address gets so many-th part of all
DESCRIPTORS = 65_536  # as many as are asked of the system
OWN_DESCRIPTORS = 96  # listeners, logs, the engine's pipes, folders being read; and FAREWELLS
DESCRIPTORS_EACH = 4  # the connection, the request's body, the engine's connection, the job's file
FAREWELLS = 32  # refused connections that are still being told so


class Guest(Protocol):
    """A connection, as the doorkeeper sees it."""

    def unsent(self) -> int:
        """Bytes of replies that the client has not taken yet."""

    def drop(self) -> None:
        """Ends it at once."""


class Doorkeeper:
    """Keeps connections within `most`, and those of one address within a share of it, by closing one that waits.

    One waits that has no request running: fresh, between two requests, or amid a request's head. The longest wait ends
    first, so that silent connections, however many, keep nobody out. Where all are busy, the new one is refused.
    """

    def __init__(self, most: int, proxies: Networks = ()) -> None:
        """proxies: behind each is more than one household, so that all connections may come from there."""
        self.most, self.share, self._proxies = most, max(1, most // SHARE), proxies
        self._homes: dict[Guest, str] = {}
        self._counts: Counter[str] = Counter()
        self._waiting: dict[Guest, None] = {}
        self._refused: set[Guest] = set()

    def admit(self, guest: Guest, address: str) -> bool:
        """False where it has to be refused; gone() must follow in any case."""
        home = household(address)
        crowded = self._counts[home] >= self.share and not among(address, self._proxies)
        if (crowded or len(self._homes) >= self.most) and not self._make_room(home if crowded else None):
            return False
        self._homes[guest] = home
        self._counts[home] += 1
        self.waits(guest)
        return True

    def may_say_no(self, guest: Guest) -> bool:
        """Whether there is a descriptor to spare for telling a refused one why."""
        if len(self._refused) >= FAREWELLS:
            return False
        self._refused.add(guest)
        return True

    def waits(self, guest: Guest) -> None:
        """Puts the guest behind all that wait already."""
        self._waiting.pop(guest, None)
        if guest in self._homes:
            self._waiting[guest] = None

    def busy(self, guest: Guest) -> None:
        self._waiting.pop(guest, None)

    def gone(self, guest: Guest) -> None:
        self._refused.discard(guest)
        self._waiting.pop(guest, None)
        home = self._homes.pop(guest, None)
        if home is not None:
            self._counts[home] -= 1
            if not self._counts[home]:
                del self._counts[home]

    def _make_room(self, home: str | None) -> bool:
        for guest in self._waiting:
            if (home is None or self._homes[guest] == home) and not guest.unsent():
                self.gone(guest)
                guest.drop()
                return True
        return False


def raise_descriptor_limit() -> int:
    """Lets this process have as many descriptors as the system grants it, and returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = descriptors_granted()
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


def descriptors_granted() -> int:
    """How many raise_descriptor_limit can get."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)


def most_connections(descriptors: int) -> int:
    """Returns how many connections fit into `descriptors` descriptors."""
    return max(8, min(MOST, (descriptors - OWN_DESCRIPTORS) // DESCRIPTORS_EACH))


def household(address: str) -> str:
    """What counts as one client: an IPv4 address, or the /64 that one household has of IPv6.

    What is no address, as a proxy may tell one, counts as it is.
    """
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    return str(parsed.ipv4_mapped or f"{ipaddress.IPv6Address(int(parsed) >> 64 << 64)}/64")
