"""Whether the server of this machine answers: `python -m serve.ping`, for health checks.

Exit code 0 where it does, else 1. Standard library only: it runs every few seconds. It goes by PALIMPSEST_HOST, _PORT
and _TLS_CERT of the environment.
"""

import http.client
import os
import re
import ssl
import sys
from pathlib import Path

SECONDS = 8.0
_FIRST = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


def main() -> int:
    host, port = os.environ.get("PALIMPSEST_HOST", "127.0.0.1"), int(os.environ.get("PALIMPSEST_PORT", "8080"))
    certificate = os.environ.get("PALIMPSEST_TLS_CERT")
    try:
        return 0 if answers(reachable(host), port, Path(certificate) if certificate else None) else 1
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"no answer from {host}:{port}: {error}", file=sys.stderr)
        return 1


def answers(host: str, port: int, certificate: Path | None) -> bool:
    """Whether /ping is answered 200. certificate: the server's file, where it speaks TLS.

    Raises OSError and http.client.HTTPException where nobody answers.
    """
    if certificate is None:
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=trusting(certificate))
    try:
        connection.request("GET", "/ping", headers={"Host": "localhost"})
        return connection.getresponse().status == 200
    finally:
        connection.close()


def reachable(host: str) -> str:
    """The address at which this machine reaches a server that listens there."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def trusting(certificate: Path) -> ssl.SSLContext:
    """Trusts the server's own certificate and no other, by whatever name it is called: its own machine has the file.

    Raises OSError and ValueError where it can't be read.
    """
    found = _FIRST.search(certificate.read_text("latin-1"))
    if found is None:
        raise ValueError(f"{certificate} has no certificate in PEM form")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=found[0])
    return context


if __name__ == "__main__":
    raise SystemExit(main())
