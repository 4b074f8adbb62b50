"""Whether the server of this machine is well, as an exit code: the image's HEALTHCHECK, and for other supervisors.

The standard library alone, since it runs twice a minute."""

import http.client
import os
import ssl
from collections.abc import Mapping
from contextlib import closing

TIMEOUT = 8  # seconds


def healthy(environ: Mapping[str, str]) -> bool:
    """environ: with the server's settings."""
    host, port = environ.get("PALIMPSEST_HOST", "127.0.0.1"), int(environ.get("PALIMPSEST_PORT", "8080"))
    try:
        with closing(_connection(reached_at(host), port, encrypted=bool(environ.get("PALIMPSEST_TLS_CERT")))) as server:
            server.request("GET", "/ping")
            return server.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def reached_at(host: str) -> str:
    """Returns the address at which this machine reaches what listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _connection(host: str, port: int, encrypted: bool) -> http.client.HTTPConnection:
    if not encrypted:
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    # Its certificate is for the name by which others call it; nothing secret is sent.
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=unverified)


if __name__ == "__main__":
    raise SystemExit(not healthy(os.environ))
