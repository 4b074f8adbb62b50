"""The one exception tree and its one translation to HTTP.

PalimpsestError            500
├── ModelFailed            500  the archive's handler failed with this request
├── BadRequest             400  the client must change the request
│   ├── ModelNotFound      404  no archive of that name in the store
│   ├── Unauthenticated    401  no key, or none that is valid
│   ├── Forbidden          403  the key may not do this
│   ├── RequestTooLarge    413
│   ├── UnservedKind       415  a kind or an encoding of bodies that is not served
│   └── BodyTimeout        408  the request's body did not arrive in time
├── Busy                   429  try again later: Retry-After says when
│   ├── QueueFull               too many requests wait
│   ├── OverShare               too much of one key at a time, or within a minute
│   └── ModelNotReady           no place or turn in time
├── ModelLoadFailed        500  the archive's handler failed while loading
├── OutOfMemory            507  the device has no room for this model or request
├── DiskFull               507  nothing more can be written where it has to be
├── EngineUnavailable      503  TorchServe is starting, restarting or gone: Retry-After says when to try again
│   ├── NotReached              and no worker has seen the request: it may be sent again
│   └── WorkerDied
├── StoreUnreachable       503  the store on a URL does not answer, and what is wanted of it is not here
└── DeadlineExceeded       504  TorchServe did not answer in time
"""

from typing import Any

from contract.errors import BodyError, error_object

UNEXPECTED = "an unexpected error; the server's log says where"


class PalimpsestError(Exception):
    """Becomes contract.errors.error_object with `status`; the message says what to do.

    retry_after: seconds after which the same request may succeed; None where it has to change first.
    """

    status = 500
    code = "internal"
    retry_after: int | None = None

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message, self.field = message, field

    def body(self) -> dict[str, Any]:
        return error_object(self.code, self.message, self.field)

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class BadRequest(PalimpsestError):
    status, code = 400, "bad_request"


class ModelNotFound(BadRequest):
    status, code = 404, "model_not_found"


class Unauthenticated(BadRequest):
    """The same for every key that is not valid, whatever is wrong with it."""

    status, code = 401, "unauthorized"

    def __init__(self) -> None:
        super().__init__(
            "this needs a key: send it as Authorization: Bearer KEY, as x-api-key: KEY, or sign for AWS with a clock"
            " that is right; in a browser log in at /login. `palimpsest keys add NAME` on the server makes one"
        )

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": 'Bearer realm="palimpsest"'}


class Forbidden(BadRequest):
    status, code = 403, "forbidden"


class RequestTooLarge(BadRequest):
    status, code = 413, "too_large"


class UnservedKind(BadRequest):
    status, code = 415, "unsupported_media_type"


class BodyTimeout(BadRequest):
    status, code = 408, "body_timeout"


class Busy(PalimpsestError):
    status, code = 429, "busy"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFull(Busy):
    code = "queue_full"


class OverShare(Busy):
    code = "over_share"


class ModelNotReady(Busy):
    code = "model_not_ready"


class ModelFailed(PalimpsestError):
    code = "model_failed"


class ModelLoadFailed(PalimpsestError):
    status, code = 500, "load_failed"


class OutOfMemory(PalimpsestError):
    status, code = 507, "out_of_memory"


class DiskFull(PalimpsestError):
    status, code = 507, "disk_full"


class EngineUnavailable(PalimpsestError):
    status, code = 503, "unavailable"
    retry_after = 5


class NotReached(EngineUnavailable):
    pass


class WorkerDied(EngineUnavailable):
    code = "worker_died"
    retry_after = 1


class StoreUnreachable(PalimpsestError):
    status, code = 503, "store_unreachable"
    retry_after = 5


class DeadlineExceeded(PalimpsestError):
    status, code = 504, "deadline_exceeded"


def body_refused(error: BodyError) -> BadRequest:
    """What the reader of bodies says, as an error of the server's."""
    kind = {413: RequestTooLarge, 415: UnservedKind}.get(error.status, BadRequest)
    return kind(error.message, error.field)
