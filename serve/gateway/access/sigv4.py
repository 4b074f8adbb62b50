"""AWS Signature Version 4, as boto3 signs its requests: nothing of the key travels, and the body is signed, too.

A signature holds for SKEW seconds around its date: so long a copy of the very same request is answered again, as at
AWS. Remembering those seen would refuse honest ones, too: equal requests of the same second are signed equally.
"""

import hashlib
import hmac
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import quote

from starlette.types import Scope

SKEW = 300.0  # seconds
UNSIGNED = "UNSIGNED-PAYLOAD"

_ALGORITHM = "AWS4-HMAC-SHA256"
_AUTHORIZATION = re.compile(
    rf"{_ALGORITHM} +Credential=([A-Z0-9]{{20}})/([0-9]{{8}})/([a-z0-9-]{{1,64}})/([a-z0-9-]{{1,64}})/aws4_request"
    r", *SignedHeaders=([a-z0-9;_-]{4,4096}), *Signature=([0-9a-f]{64})",
    re.ASCII,
)
_DATE = re.compile(rb"[0-9]{8}T[0-9]{6}Z")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What changes the request's meaning: nobody on the way may add one.
_ALWAYS_SIGNED = re.compile(rb"host|content-type|x-amz-.*|x-amzn-sagemaker-.*")
_ONCE = (b"host", b"x-amz-date", b"x-amz-content-sha256")


class Authorization(NamedTuple):
    """The header's parts. scope: what of the credential follows the key's id."""

    access_key_id: str
    scope: tuple[str, str, str]
    signed: tuple[str, ...]
    signature: str


class Claim(NamedTuple):
    """A request's signature, to be checked once its body's hash is known.

    head: the canonical request up to that hash. declared: the hash that the client says, which is signed with the rest.
    """

    authorization: Authorization
    date: str
    head: str
    declared: str | None

    def holds(self, secret: str, payload: str) -> bool:
        """payload: SHA-256 of the body, or UNSIGNED."""
        request = hashlib.sha256(f"{self.head}\n{payload}".encode("latin-1")).hexdigest()
        scope = "/".join((*self.authorization.scope, "aws4_request"))
        expected = _hmac(
            _signing_key(secret, self.authorization.scope), f"{_ALGORITHM}\n{self.date}\n{scope}\n{request}"
        )
        return hmac.compare_digest(expected.hex(), self.authorization.signature)


def parse(value: bytes) -> Authorization | None:
    match = _AUTHORIZATION.fullmatch(value.decode("latin-1"))
    if match is None:
        return None
    signed = tuple(match[5].split(";"))
    return Authorization(match[1], (match[2], match[3], match[4]), signed, match[6])


def claim(scope: Scope, authorization: Authorization) -> Claim | None:
    """scope: the request as it was sent. None where it is not signed as it has to be, or not now."""
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, []).append(value)
    signed = [name.encode() for name in authorization.signed]
    if signed != sorted(set(signed)) or any(name not in headers for name in signed):
        return None
    if any(len(headers.get(name, ())) > 1 for name in _ONCE):
        return None
    if any(_ALWAYS_SIGNED.fullmatch(name) and name not in signed for name in headers):
        return None
    date = headers.get(b"x-amz-date", [b""])[0]
    if b"host" not in signed or not _is_now(date, authorization):
        return None
    declared = headers[b"x-amz-content-sha256"][0].decode("latin-1") if b"x-amz-content-sha256" in headers else None
    if declared is not None and declared != UNSIGNED and not _SHA256.fullmatch(declared):
        return None
    head = "\n".join(
        (
            scope["method"],
            quote(scope["raw_path"], safe="/~"),
            _query(scope["query_string"]),
            *(f"{name.decode()}:{_value(headers[name])}" for name in signed),
            "",
            ";".join(authorization.signed),
        )
    )
    return Claim(authorization, date.decode(), head, declared)


def _is_now(date: bytes, authorization: Authorization) -> bool:
    if not _DATE.fullmatch(date) or date[:8].decode() != authorization.scope[0]:
        return False
    try:
        signed_at = datetime.strptime(date.decode(), "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        return False
    return abs(time.time() - signed_at) <= SKEW


def _query(query: bytes) -> str:
    """As it was sent, in the order of names, then values."""
    pairs = [pair.partition("=") for pair in query.decode("latin-1").split("&") if pair]
    return "&".join(f"{name}={value}" for name, value in sorted((name, value) for name, _, value in pairs))


def _value(values: Sequence[bytes]) -> str:
    return b",".join(b" ".join(value.split()) for value in values).decode("latin-1")


def _signing_key(secret: str, scope: Sequence[str]) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (*scope, "aws4_request"):
        key = _hmac(key, part)
    return key


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
