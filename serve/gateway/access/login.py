"""Logging in at the page, which so need not know the key: a cookie stands for it that no script can read."""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contract.bodies import BodyError, read_body
from serve.errors import BadRequest, Unauthenticated, body_refused
from serve.gateway.access.credentials import COOKIE, session_of
from serve.gateway.access.keys import LONGEST
from serve.gateway.access.sessions import SECONDS
from serve.gateway.services import Injected

router = APIRouter(include_in_schema=False)


class _Login(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    key: Annotated[str, Field(max_length=LONGEST)]


@router.post("/login", status_code=204)
async def log_in(request: Request, services: Injected) -> Response:
    response = Response(status_code=204)
    session = services.guard.log_in(await _key_of(request))
    if session is not None:
        _set_cookie(request, response, session, int(SECONDS))
    return response


@router.post("/logout", status_code=204)
async def log_out(request: Request, services: Injected) -> Response:
    session = session_of(value for name, value in request.headers.raw if name == b"cookie")
    if session is not None:
        services.guard.log_out(session)
    response = Response(status_code=204)
    _set_cookie(request, response, "", 0)
    return response


async def _key_of(request: Request) -> str:
    """Raises BadRequest, which quotes nothing of the body, and Unauthenticated for what can be no key."""
    kind, coding = (request.headers.get(name, "") for name in ("content-type", "content-encoding"))
    try:
        return _Login.model_validate(read_body(kind, coding, await request.body())).key
    except BodyError as error:
        raise body_refused(error) from None
    except ValidationError as error:
        if error.errors(include_url=False, include_input=False)[0]["type"] == "string_too_long":
            raise Unauthenticated from None
        raise BadRequest('send {"key": KEY} as application/json', "key") from None


def _set_cookie(request: Request, response: Response, session: str, seconds: int) -> None:
    response.set_cookie(
        COOKIE, session, max_age=seconds, secure=request.url.scheme == "https", httponly=True, samesite="strict"
    )
