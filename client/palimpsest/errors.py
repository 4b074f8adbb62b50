"""What the server refuses or fails at, as exceptions: one tree, by the status of its reply.

PalimpsestError          any other: the server's fault (500, code internal, model_failed, load_failed, not_finite)
├── BadRequest           400 and other 4xx: the request must change; `field` names what is wrong with it
│   ├── NotAllowed       401, 403, code unauthorized, forbidden: the server asks for a key, or for another
│   ├── NotFound         404, code model_not_found, image_not_found, job_not_found
│   └── TooLarge         413, code too_large
├── Busy                 429, code queue_full, model_not_ready, over_share, busy: too many requests
├── Cancelled            499, code cancelled: the job was stopped, or the client was closed
├── Unavailable          503, code unavailable, worker_died, store_unreachable: the engine or the store is not there
├── DeadlineExceeded     504, code deadline_exceeded: the model did not answer in time
├── NoRoom               507, code out_of_memory, disk_full
└── Unreachable          nobody answers, or the connection broke
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

_SHOWN = 200  # characters of what is no reply of a Palimpsest's


class PalimpsestError(Exception):
    """code: a word for programs. message: for people; says what to do. field: of the request, where it is about one.

    status: of the reply; None where there was none. retry_after: seconds after which the server says that the same
    request may succeed; None where it has to change first.

    Example:
        try:
            client.segment(image, points=[(-1, 2)])
        except PalimpsestError as error:
            print(error.code, error.field, error.message)
    """

    def __init__(
        self,
        code: str,
        message: str,
        field: str | None = None,
        status: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.field = code, message, field
        self.status, self.retry_after = status, retry_after


class BadRequest(PalimpsestError):
    """The request must change."""


class NotAllowed(BadRequest):
    """The server asks for a key, or the key may not do this."""


class NotFound(BadRequest):
    """There is no such model, or no such picture any more."""


class TooLarge(BadRequest):
    """The picture or the request is past one of the server's limits."""


class Busy(PalimpsestError):
    """Too many requests wait, or there was no place in time. Raised once the client has waited for long enough."""


class Cancelled(PalimpsestError):
    """The work was stopped."""


class Unavailable(PalimpsestError):
    """The server's engine is starting or restarting. Raised once the client has waited for long enough."""


class DeadlineExceeded(PalimpsestError):
    """The model did not answer in time."""


class NoRoom(PalimpsestError):
    """The server's device has not enough memory for this, or its disk is full."""


class Unreachable(PalimpsestError):
    """Nobody answers there, or the connection broke."""

    def __init__(self, message: str) -> None:
        super().__init__("unreachable", message)


_KINDS: dict[int, type[PalimpsestError]] = {
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    413: TooLarge,
    429: Busy,
    499: Cancelled,
    503: Unavailable,
    504: DeadlineExceeded,
    507: NoRoom,
}


def error_in_event(data: Mapping[str, Any]) -> PalimpsestError:
    """Makes the error of what the last event of a stream says."""
    told = data["error"]
    return _error(data["status"], told["code"], told["message"], told.get("field"), data.get("retry_after"))


def check(answer: httpx.Response) -> None:
    """Raises what the reply says, unless it is a success. Its body has been read."""
    if answer.is_success:
        return
    retry_after = _seconds(answer.headers.get("retry-after", ""))
    try:
        told = json.loads(answer.content)["error"]
        error = _error(answer.status_code, told["code"], told["message"], told.get("field"), retry_after)
    except (ValueError, TypeError, KeyError, AttributeError):  # a proxy's own page, say
        text = answer.text[:_SHOWN] or answer.reason_phrase
        error = _error(answer.status_code, f"http_{answer.status_code}", text, None, retry_after)
    raise error


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Makes Unreachable of what goes wrong on the way."""
    try:
        yield
    except httpx.TransportError as error:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise Unreachable(f"no Palimpsest answers at {url} ({what})") from error


def _error(status: int, code: str, message: str, field: str | None, retry_after: float | None) -> PalimpsestError:
    kind = _KINDS.get(status, BadRequest if 400 <= status < 500 else PalimpsestError)
    return kind(code, message, field, status, retry_after)


def _seconds(retry_after: str) -> float | None:
    """What the header says: seconds, or a date."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
