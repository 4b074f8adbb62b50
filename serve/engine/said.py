"""What TorchServe says over HTTP, and what its own errors mean."""

import json
from dataclasses import dataclass
from typing import Any

from serve.errors import BadRequest, EngineUnavailable, ModelFailed, NotReached, OutOfMemory

# What TorchServe's multipart parser throws at a body that is none; it answers 500.
_UNREADABLE = {
    "ErrorDataDecoderException",
    "EndOfDataDecoderException",
    "NotEnoughDataDecoderException",
    "TooManyFormFieldsException",
    "TooLongFormFieldException",
}


@dataclass(frozen=True)
class Said:
    """What TorchServe itself replied, or a handler to a command; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        """Parses the body where it is a JSON object."""
        try:
            body = json.loads(self.body)
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}

    @property
    def message(self) -> str:
        """One line of 300 characters at most."""
        lines = str(self.fields.get("message", "")).splitlines()
        return lines[0][:300] if lines else f"TorchServe answered {self.status}"

    def raise_own_error(self, name: str) -> None:
        """Raises for an error that TorchServe itself made: it has the fields code, type and message.

        name: the model's, for the error's words.
        """
        if self.status < 400 or not {"code", "type", "message"} <= self.fields.keys():
            return
        kind, message = str(self.fields["type"]), self.message
        died = message == "Worker died."
        if self.status == 507 and not died:
            raise OutOfMemory("not enough memory for this request")
        if kind == "InternalServerException" and not died:
            # What a worker reported: that its handler raised, or the handler's own words and status.
            if 400 <= self.status < 500:
                raise BadRequest(message)
            raise ModelFailed(f"the handler of {name!r} failed: {message}; model_log.log has its words")
        if self.status == 400 or kind in _UNREADABLE:
            raise BadRequest(f"the body cannot be read: {message.rpartition('Exception: ')[2]}")
        if self.status == 404:
            raise NotReached(f"{name!r} is not loaded any more: try again")
        raise EngineUnavailable(f"the worker of {name!r} could not answer: try again")
