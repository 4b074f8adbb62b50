"""What a handler may answer instead of a reply; base.py turns each into its status and contract.errors' shape.

RequestError
├── BadRequest    400, or 413 where a limit is passed: the client's fault, names the field
├── Cancelled     499: the client left or cancelled its job
└── NotFinite     500: the model's numbers overflowed, in float32 too
"""


class RequestError(Exception):
    """status: of the reply. code: a word for programs. message: for people, free of what the client sent."""

    status = 500
    code = "internal"

    def __init__(self, message: str, field: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.message, self.field = message, field
        self.status = status or self.status


class BadRequest(RequestError):
    """The client's fault: the message names the field and says what is allowed."""

    status = 400
    code = "bad_request"


class Cancelled(RequestError):
    """Nobody waits for the answer any more."""

    status = 499
    code = "cancelled"

    def __init__(self) -> None:
        super().__init__("the job was cancelled")


class NotFinite(RequestError):
    """An answer with infinities or NaNs is never sent as a black picture."""

    code = "not_finite"

    def __init__(self) -> None:
        super().__init__("the model's output is not finite, in float32 either: change the prompt, seed or picture")
