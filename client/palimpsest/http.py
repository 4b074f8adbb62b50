"""How both clients use httpx."""

import ipaddress
import os
from typing import Any

import httpx

DEFAULT_URL = "http://127.0.0.1:8080"
TIMEOUT = 60.0
"""Seconds; while a job runs, the server says every 15 that it is there."""
PATIENCE = 120.0
"""Seconds."""
CLOSED = "the client was closed"
LOOK = 0.5
"""Seconds until a call that waits for its turn sees that its client was closed."""
CONNECT_TIMEOUT = 10.0
CANCEL_TIMEOUT = 5.0
_CONNECTIONS = 32


def options(url: str, key: str | None, timeout: float) -> dict[str, Any]:
    """The arguments of httpx.Client and AsyncClient. key: of the server; if None, PALIMPSEST_KEY of the environment.

    Raises ValueError for what is no address.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        address = httpx.URL()
    if address.scheme not in ("http", "https") or not address.host:
        raise ValueError(f"{url!r} is no address of a server, such as {DEFAULT_URL} is")
    key = os.environ.get("PALIMPSEST_KEY") if key is None else key
    return {
        "base_url": address,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": httpx.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT), pool=None),
        "limits": httpx.Limits(max_connections=_CONNECTIONS),
        # A proxy leads out, not back to this machine; SSL_CERT_FILE counts for both.
        "trust_env": not _is_local(address.host),
        "verify": httpx.create_ssl_context() if address.scheme == "https" else True,
    }


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
