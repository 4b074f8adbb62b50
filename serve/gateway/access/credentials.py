"""What a request shows of a key, in its headers."""

from collections.abc import Iterable
from typing import NamedTuple

from serve.errors import BadRequest
from serve.gateway.access import sigv4

COOKIE = "palimpsest_session"
_COOKIE = COOKIE.encode()


class Contradictory(BadRequest):
    """More than one, of which a proxy on the way may believe another than this server does."""

    code = "contradictory_keys"


class Shown(NamedTuple):
    """One of these, or none: what is malformed is as good as nothing."""

    key: bytes | None = None
    signature: sigv4.Authorization | None = None
    session: str | None = None


def shown(headers: Iterable[tuple[bytes, bytes]]) -> Shown:
    """headers: names in lower case. A session counts where there is nothing else. Raises Contradictory."""
    found, cookies = [], []
    for name, value in headers:
        if name in (b"authorization", b"x-api-key"):
            found.append((name, value))
        elif name == b"cookie":
            cookies.append(value)
    if len(found) > 1:
        raise Contradictory("there is more than one key in this request: send one, in Authorization or in x-api-key")
    if not found:
        return Shown(session=session_of(cookies))
    name, value = found[0]
    if name == b"x-api-key":
        return Shown(key=value.strip())
    scheme, _, rest = value.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return Shown(key=rest.strip())
    return Shown(signature=sigv4.parse(value.strip()))


def session_of(cookies: Iterable[bytes]) -> str | None:
    """The session that Cookie headers name; None where they name two."""
    pairs = (pair.strip().partition(b"=") for cookie in cookies for pair in cookie.split(b";"))
    named = [value for name, _, value in pairs if name == _COOKIE]
    return named[0].decode("latin-1") if len(named) == 1 else None
