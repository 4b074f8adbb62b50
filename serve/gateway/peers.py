"""Other servers behind the same address: they keep pictures that a client may name here."""

import re
from typing import Protocol

_NAME = re.compile(r"(.+?)(?:\.([a-z0-9]+))?", re.ASCII | re.DOTALL)


class Peers(Protocol):
    """box: this server's name among them, of small letters and digits; empty where there are no others."""

    box: str

    async def picture(self, box: str, name: str) -> bytes | None:
        """What the box keeps under the name; None where it has nothing of that name, or is gone."""


class _Alone:
    box = ""

    async def picture(self, box: str, name: str) -> bytes | None:
        return None


ALONE: Peers = _Alone()
"""There are no others."""


def marked(name: str, box: str) -> str:
    """A name that says which box knows it."""
    return f"{name}.{box}" if box else name


def unmarked(name: str) -> tuple[str, str]:
    """The name alone, and the box; empty where it says none."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2] or "") if match else (name, "")
