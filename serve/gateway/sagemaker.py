"""The runtime API of a SageMaker multi-model endpoint, as boto3 and the SageMaker SDK speak it.

Every endpoint name means this server; a header names the archive. Errors are SageMaker's own: the client picks its
exception class by `x-amzn-ErrorType`.
"""

import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any, Self
from uuid import uuid4

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, model_validator

from serve.engine.answer import Answer
from serve.errors import (
    UNEXPECTED,
    BadRequest,
    Busy,
    DeadlineExceeded,
    DiskFull,
    EngineUnavailable,
    Forbidden,
    ModelFailed,
    ModelLoadFailed,
    ModelNotReady,
    OutOfMemory,
    OverShare,
    PalimpsestError,
    Unauthenticated,
)
from serve.gateway import eventstream
from serve.gateway.predictions import invoke_as_sent
from serve.gateway.services import Injected, Services
from serve.gateway.transfer import Transfer, paced
from serve.logs import record

logger = logging.getLogger(__name__)

# The form of CloudWatch's name; the stream is the file of that name in the server's log folder.
LOG_STREAM = "arn:aws:logs:local:000000000000:log-group:palimpsest:log-stream:model_log.log"

_STATUS = {
    "ValidationError": 400,
    "UnrecognizedClientException": 401,
    "AccessDeniedException": 403,
    "UnknownOperationException": 404,
    "ModelError": 424,
    "ModelNotReadyException": 429,
    "ThrottlingException": 429,
    "InternalFailure": 500,
    "ServiceUnavailable": 503,
}
_MAX_MESSAGE = 2048

_NAME = r"^[a-zA-Z0-9](-*[a-zA-Z0-9])*$"
_PRINTABLE = r"^[!-~][ -~]*$"
EndpointName = Annotated[str, Path(max_length=63, pattern=_NAME, description="Any name: all mean this server.")]


class InvocationHeaders(BaseModel):
    """What a runtime client may say beside the payload, within the limits of SageMaker's service model."""

    target_model: str | None = Field(
        None,
        alias="X-Amzn-SageMaker-Target-Model",
        max_length=1024,
        pattern=_PRINTABLE,
        description="The archive: sam, sam.tar.gz, /sam.tar.gz, team/own.tar.gz.",
    )
    inference_component: str | None = Field(
        None,
        alias="X-Amzn-SageMaker-Inference-Component",
        max_length=63,
        pattern=_NAME,
        description="The archive, for calls in which the client cannot send Target-Model (boto3's response stream).",
    )
    target_variant: str = Field(
        "AllTraffic",
        alias="X-Amzn-SageMaker-Target-Variant",
        max_length=63,
        pattern=_NAME,
        description="Comes back as x-Amzn-Invoked-Production-Variant.",
    )
    custom_attributes: str | None = Field(
        None,
        alias="X-Amzn-SageMaker-Custom-Attributes",
        max_length=1024,
        pattern=r"^[\t -~]*$",
        description="Comes back as it is; the handler sees it, too.",
    )
    inference_id: str | None = Field(
        None,
        alias="X-Amzn-SageMaker-Inference-Id",
        max_length=64,
        pattern=_PRINTABLE,
        description="Accepted: the client's own name for the request.",
    )
    prefix_aware_id: str | None = Field(
        None,
        alias="X-Amzn-SageMaker-Prefix-Aware-Id",
        max_length=64,
        pattern=_PRINTABLE,
        description="Accepted: it chooses between instances, and there is one.",
    )
    session_id: str | None = Field(None, alias="X-Amzn-SageMaker-Session-Id", description="Refused: no sessions.")
    target_container: str | None = Field(
        None, alias="X-Amzn-SageMaker-Target-Container-Hostname", description="Refused: there is one container."
    )
    enable_explanations: str | None = Field(
        None, alias="X-Amzn-SageMaker-Enable-Explanations", description="Refused: there is no explainer."
    )

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        for name, value, why in (
            ("SessionId", self.session_id, "every request stands alone, the models keep no sessions"),
            (
                "TargetContainerHostname",
                self.target_container,
                "this is no multi-container endpoint; TargetModel names one",
            ),
            ("EnableExplanations", self.enable_explanations, "this endpoint has no explainer"),
        ):
            if value is not None:
                raise ValueError(f"{name} cannot be used here: {why}")
        return self

    def model(self) -> str:
        """The archive's name as the client spelt it; BadRequest where it sent none."""
        name = self.target_model or self.inference_component
        if name is None:
            raise BadRequest(
                "this is a multi-model endpoint: name the archive in X-Amzn-SageMaker-Target-Model "
                "(boto3: TargetModel='sam.tar.gz'; SageMaker SDK: target_model='sam.tar.gz')"
            )
        return name

    def reply(self) -> dict[str, str]:
        """The headers that every successful reply carries."""
        headers = {"x-Amzn-Invoked-Production-Variant": self.target_variant}
        if self.custom_attributes is not None:
            headers["X-Amzn-SageMaker-Custom-Attributes"] = self.custom_attributes
        return headers


class HandlerError(PalimpsestError):
    """The model's handler answered 4xx or 5xx; the message is its body."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.beginning(4 * _MAX_MESSAGE))
        self.status = answer.status


class RuntimeRoute(APIRoute):
    """Turns whatever goes wrong into SageMaker's errors, and numbers the replies as SageMaker does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except PalimpsestError as error:
                response = reply(error)
            except RequestValidationError as error:
                first = error.errors()[0]
                # Of a check over several headers the last place is "header", which says nothing.
                record.fails(BadRequest.code)
                where = f"{first['loc'][-1]}: " if first["type"] != "value_error" else ""
                response = _error("ValidationError", where + first["msg"].removeprefix("Value error, "))
            except Exception:
                logger.exception("an unexpected error")
                record.fails(PalimpsestError.code)
                response = _error("InternalFailure", UNEXPECTED)
            response.headers["x-amzn-RequestId"] = _request_id()
            return response

        return answer


def _describe(kind: str, when: str, *fields: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: {} for name in ("Message", *fields)}, "required": ["Message"]}
    return {"description": f"{kind}: {when}", "content": {"application/json": {"schema": schema}}}


_BINARY = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
_OPENAPI: dict[str, Any] = {
    "requestBody": {"required": True, "description": "What /predictions/{model} takes.", "content": _BINARY},
    "responses": {
        "200": {"description": "What /predictions/{model} answers.", "content": _BINARY},
        "400": _describe("ValidationError", "the request is wrong, or the store holds no such archive."),
        "424": _describe(
            "ModelError",
            "the model answered 4xx or 5xx, could not be loaded or did not answer in time.",
            "OriginalStatusCode",
            "OriginalMessage",
            "LogStreamArn",
        ),
        "429": _describe("ModelNotReadyException", "still loading, which goes on; see Retry-After."),
        "500": _describe("InternalFailure", "the server failed."),
        "503": _describe("ServiceUnavailable", "the engine restarts, or too many requests wait: try again."),
    },
}
_EVENTS = {
    "description": "What /predictions/{model} answers, as PayloadPart events.",
    "content": {eventstream.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
}
_STREAM_OPENAPI = _OPENAPI | {"responses": _OPENAPI["responses"] | {"200": _EVENTS}}

router = APIRouter(tags=["SageMaker runtime"], route_class=RuntimeRoute)


@router.post("/endpoints/{name}/invocations", summary="InvokeEndpoint", openapi_extra=_OPENAPI)
async def invoke_endpoint(
    name: EndpointName, headers: Annotated[InvocationHeaders, Header()], request: Request, services: Injected
) -> Response:
    answer = await _ask(headers, request, services)
    return Transfer.of(answer, headers.reply())


@router.post(
    "/endpoints/{name}/invocations-response-stream",
    summary="InvokeEndpointWithResponseStream",
    openapi_extra=_STREAM_OPENAPI,
)
async def invoke_endpoint_with_response_stream(
    name: EndpointName, headers: Annotated[InvocationHeaders, Header()], request: Request, services: Injected
) -> Response:
    answer = await _ask(headers, request, services)
    own = {
        "content-type": eventstream.MEDIA_TYPE,
        "X-Amzn-SageMaker-Content-Type": answer.headers["content-type"],
    }
    parts = eventstream.payload_parts(paced(answer.pieces()))
    return Transfer(parts, answer.close, {**answer.headers, **headers.reply(), **own})


@router.post("/endpoints/{name}/async-invocations", summary="InvokeEndpointAsync", include_in_schema=False)
async def invoke_endpoint_async(name: EndpointName) -> Response:
    raise BadRequest(
        "this endpoint answers at once and keeps nothing in S3: call InvokeEndpoint (boto3: invoke_endpoint) or"
        " InvokeEndpointWithResponseStream"
    )


async def _ask(headers: InvocationHeaders, request: Request, services: Services) -> Answer:
    archive = await services.catalog.look_up(headers.model())
    answer = await invoke_as_sent(services, archive, _model_headers(request), request)
    if answer.status >= 400:
        with answer.file:
            raise HandlerError(answer)
    return answer


def _model_headers(request: Request) -> dict[str, str]:
    """What SageMaker lets through to a container; the stream call has an Accept header of its own."""
    passed = {
        name: value
        for name, value in request.headers.items()
        if name in ("content-type", "accept") or name.startswith("x-amzn-sagemaker-")
    }
    accept = passed.pop("x-amzn-sagemaker-accept", None)
    return passed | ({"accept": accept} if accept else {})


def reply(error: PalimpsestError) -> Response:
    """SageMaker's error for one of ours."""
    record.fails(error.code)
    match error:
        case Unauthenticated():
            return _error("UnrecognizedClientException", error.message, error.headers())
        case Forbidden():
            return _error("AccessDeniedException", error.message)
        case BadRequest():
            return _error("ValidationError", error.message)
        case OverShare():
            return _error("ThrottlingException", error.message, error.headers())
        case ModelNotReady():
            return _error("ModelNotReadyException", error.message, error.headers())
        case Busy() | EngineUnavailable():
            return _error("ServiceUnavailable", error.message, error.headers())
        case HandlerError() | ModelFailed() | ModelLoadFailed() | OutOfMemory() | DiskFull() | DeadlineExceeded():
            return _model_error(error.status, error.message)
    return _error("InternalFailure", error.message)


def _model_error(status: int, original: str) -> Response:
    side = "client" if status < 500 else "server"
    message = f'Received {side} error ({status}) from primary with message "{original[:1500]}". See {LOG_STREAM}'
    return _error(
        "ModelError",
        message,
        OriginalStatusCode=status,
        OriginalMessage=original[:_MAX_MESSAGE],
        LogStreamArn=LOG_STREAM,
    )


def unknown_operation(message: str, status: int, headers: Mapping[str, str]) -> Response:
    """Answers for paths below /endpoints/ and methods that the runtime API does not have."""
    response = _error("UnknownOperationException", message, headers)
    response.status_code = status
    return response


def _error(kind: str, message: str, headers: Mapping[str, str] | None = None, **fields: str | int) -> Response:
    own = {"x-amzn-ErrorType": kind, "x-amzn-RequestId": _request_id()}
    return JSONResponse({"Message": message[:_MAX_MESSAGE], **fields}, _STATUS[kind], own | dict(headers or {}))


def _request_id() -> str:
    """The id that every answer has, in SageMaker's own header as well."""
    request = record.current()
    return request.id if request else str(uuid4())
