"""The answer to what never reaches the application."""

import http
import json
from collections.abc import Iterable

from serve.errors import PalimpsestError
from serve.logs.record import HEADER


class Refused(PalimpsestError):
    """What came in is no request that can be answered; the connection ends with the reply."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after

    def reply(self, headers: Iterable[tuple[bytes, bytes]], request_id: str) -> bytes:
        """Makes the reply. headers: those that every reply has."""
        body = json.dumps(self.body()).encode()
        own = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-content-type-options": "nosniff",
            HEADER: request_id,
            **self.headers(),
        }
        lines = [
            f"HTTP/1.1 {self.status} {http.HTTPStatus(self.status).phrase}".encode(),
            *(name + b": " + value for name, value in headers),
            *(f"{name}: {value}".encode() for name, value in own.items()),
        ]
        return b"\r\n".join([*lines, b"", body])
