"""Whether a request may go on: by the key that it shows, before anything of its body is read."""

import hashlib
from typing import NamedTuple

from fastapi import Request
from starlette.types import Receive, Scope

from serve.errors import Forbidden, Unauthenticated
from serve.gateway.access import scopes, sigv4
from serve.gateway.access.credentials import shown
from serve.gateway.access.keys import Key, Keys, KeySet
from serve.gateway.access.sessions import Sessions
from serve.gateway.body import RECEIVED, Bodies, Received

KEY = "palimpsest.key"
"""In the scope of a request that showed a key: its name."""


class Unproven(NamedTuple):
    """A request that is signed together with its body."""

    key: Key
    claim: sigv4.Claim
    needed: scopes.Needed


class Guard:
    """keys: None where whoever reaches the server may use it. metrics: what /metrics needs."""

    def __init__(self, keys: Keys | None, bodies: Bodies, metrics: scopes.Needed) -> None:
        self._keys, self._bodies, self._metrics = keys, bodies, metrics
        self._sessions = Sessions()

    def admit(self, sent: Scope, inner: Scope) -> Unproven | None:
        """sent: the request as it came. inner: as it is routed; gets the key's name.

        Returns what is still to be proven of it. Raises Unauthenticated, Forbidden, Contradictory.
        """
        keys = self._keys.current() if self._keys else None
        if keys is None:
            return None
        needed = self.needed(inner["method"], inner["path"])
        if needed is scopes.OPEN:
            return None
        credentials = shown(sent["headers"])
        if credentials.signature is not None:
            return self._signed(keys, credentials.signature, sent, inner, needed)
        key = keys.find(credentials.key) if credentials.key is not None else None
        if credentials.session is not None:
            key = self._logged_in(keys, credentials.session)
        if key is None:
            raise Unauthenticated
        _allow(key, needed, inner)
        return None

    def needed(self, method: str, path: str) -> scopes.Needed:
        """path: as it is routed."""
        needed = scopes.needed(method, path, self._metrics)
        return scopes.ANY if needed is None else needed

    async def prove(self, unproven: Unproven, inner: Scope, receive: Receive) -> Receive:
        """Receives the body, which then is the route's, and checks the signature. Raises as admit, and as Bodies."""
        body = await self._bodies.receive(Request(inner, receive))
        received = inner[RECEIVED] = Received(body, receive)
        payload = await body.examined(lambda content: hashlib.sha256(content).hexdigest())
        claim = unproven.claim
        if not claim.holds(str(unproven.key.secret), payload) or claim.declared not in (None, payload):
            raise Unauthenticated
        _allow(unproven.key, unproven.needed, inner)
        return received.receive

    def log_in(self, presented: str) -> str | None:
        """The name of a new session; None where no keys are asked for. Raises Unauthenticated."""
        keys = self._keys.current() if self._keys else None
        if keys is None:
            return None
        key = keys.find(presented.strip().encode())
        if key is None:
            raise Unauthenticated
        return self._sessions.begin(key)

    def log_out(self, session: str) -> None:
        self._sessions.end(session)

    def _logged_in(self, keys: KeySet, session: str) -> Key | None:
        key = self._sessions.key_of(session)
        return None if key is None else keys.still(key)

    def _signed(
        self, keys: KeySet, signature: sigv4.Authorization, sent: Scope, inner: Scope, needed: scopes.Needed
    ) -> Unproven | None:
        key, claim = keys.by_access_key_id(signature.access_key_id), sigv4.claim(sent, signature)
        if key is None or claim is None:
            raise Unauthenticated
        if claim.declared is not None and not claim.holds(str(key.secret), claim.declared):
            raise Unauthenticated
        if claim.declared != sigv4.UNSIGNED:
            return Unproven(key, claim, needed)
        _allow(key, needed, inner)
        return None


def _allow(key: Key, needed: scopes.Needed, inner: Scope) -> None:
    """Raises Forbidden."""
    if needed.isdisjoint(key.scopes):
        scope = ", ".join(sorted(needed))
        raise Forbidden(f"this needs a key with the scope {scope}: {key.name} has {', '.join(key.scopes)}")
    inner[KEY] = key.name
