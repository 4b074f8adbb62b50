"""The rest of TorchServe's inference API: its description, and what of it is not served."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serve.errors import PalimpsestError
from serve.gateway.services import Injected

router = APIRouter(include_in_schema=False)


class NotServed(PalimpsestError):
    status, code = 501, "not_implemented"


@router.options("/")
@router.get("/api-description")
async def description(request: Request) -> Response:
    methods = ", ".join(request.app.methods(request.scope["path"]))
    return JSONResponse(request.app.openapi(), headers={"Allow": methods} if request.method == "OPTIONS" else None)


@router.options("/predictions/{model:path}")
async def options(model: str, request: Request, services: Injected) -> Response:
    """What TorchServe's clients ask before they send; raises ModelNotFound as they expect it."""
    await services.catalog.look_up(model)
    return JSONResponse(request.app.openapi(), headers={"Allow": ", ".join(request.app.methods(request.scope["path"]))})


@router.post("/explanations/{model:path}")
async def explain(model: str) -> Response:
    raise NotServed("explanations are not served: POST /predictions/{model} asks a model")


@router.post("/v1/models/{model:path}:{verb}")
@router.post("/v2/models/{model:path}/{verb}")
async def kserve(model: str, verb: str) -> Response:
    raise NotServed(
        "KServe's protocol is not served: POST /predictions/{model} asks a model, and takes pictures as such"
    )
