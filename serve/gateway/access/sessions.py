"""Who is logged in at the page. Restarting the server ends all sessions; nothing of an edit is lost by that."""

import hashlib
import secrets
import time
from typing import NamedTuple

from serve.gateway.access.keys import Key

SECONDS = 12 * 3600.0
MOST = 50  # of one key; of more the oldest ends


class _Session(NamedTuple):
    key: Key
    ends: float


class Sessions:
    """Known by the hash of a random name, so that looking one up tells nothing about the others."""

    def __init__(self) -> None:
        self._sessions: dict[bytes, _Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, key: Key) -> str:
        """Returns its name."""
        now = time.monotonic()
        self._sessions = {name: each for name, each in self._sessions.items() if each.ends > now}
        own = [name for name, each in self._sessions.items() if each.key.sha256 == key.sha256]
        for name in own[: max(0, len(own) - MOST + 1)]:
            del self._sessions[name]
        token = secrets.token_urlsafe(32)
        self._sessions[_digest(token)] = _Session(key, now + SECONDS)
        return token

    def key_of(self, token: str) -> Key | None:
        """The key that somebody logged in with, which may have been revoked since."""
        found = self._sessions.get(_digest(token))
        return found.key if found is not None and found.ends > time.monotonic() else None

    def end(self, token: str) -> None:
        self._sessions.pop(_digest(token), None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("latin-1", "replace")).digest()
