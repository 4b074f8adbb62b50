"""Errors as everybody says them, and what is wrong with a request's body, whoever reads it."""

import json
from typing import Any


def error_object(code: str, message: str, field: str | None = None) -> dict[str, Any]:
    """The one shape of every error: {"error": {"code", "message", "field"?}}.

    code: a word for programs. message: for people. field: of the request, where it is about one.
    """
    return {"error": {"code": code, "message": message} | ({"field": field} if field else {})}


def read_error(text: str | bytes) -> tuple[str, str, str | None]:
    """Code, message and field of an error as JSON; raises ValueError where it is none."""
    try:
        error = json.loads(text)["error"]
        return error["code"], error["message"], error.get("field")
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not an error in our shape") from None


class BodyError(ValueError):
    """The client's fault; serve.errors and handlers.requests.errors have a class of their own for each.

    status: 400; 413 where a limit is passed; 415 where the kind of body is not served. message: for people, quotes no
    more than a few words of the body. field: the one it is about, if it is about one.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.field, self.status = message, field, status
