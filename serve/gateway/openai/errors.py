"""Errors in the OpenAI API's shape. Its clients choose the exception by the status, and retry on their own."""

from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from serve.errors import PalimpsestError

PATH = "/v1/images/edits"

# Of the editing API -> of this call.
_PARAMS = {"variants": "n", "keep": "response_format"}


class ErrorObject(BaseModel):
    message: str = Field(description="For people: what is wrong, and what to do.")
    type: str = Field(description="invalid_request_error, rate_limit_error or server_error.")
    param: str | None = Field(description="The field that it is about.")
    code: str = Field(description="For programs.")


class ErrorReply(BaseModel):
    """What every answer of 400 or more carries."""

    error: ErrorObject


def reply(error: PalimpsestError) -> Response:
    """Tells clients not to repeat what would fail the same way: by themselves they do, at any status from 500 on."""
    once = {} if error.status in (429, 503) else {"x-should-retry": "false"}
    return JSONResponse(body(error), error.status, error.headers() | once)


def body(error: PalimpsestError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    told = ErrorObject(
        message=error.message,
        type="rate_limit_error" if error.status == 429 else kind,
        param=error.field and _PARAMS.get(error.field, error.field),
        code=error.code,
    )
    return ErrorReply(error=told).model_dump()
