"""The container API of a SageMaker multi-model endpoint: the platform says what is loaded and what goes.

TorchServe's own version of it lists and unloads differently, so it stays behind this one. A model that a request
loaded is known by its archive's name; one that `POST /models` loaded, by the name given there.
"""

from contextlib import suppress
from dataclasses import replace
from pathlib import PurePath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contract.bodies import BodyError, read_body
from serve.errors import BadRequest, ModelNotFound, PalimpsestError
from serve.gateway.given_names import LoadedModel
from serve.gateway.predictions import headers_of, invoke_as_sent
from serve.gateway.services import Injected, Services
from serve.gateway.transfer import Transfer
from serve.residency.model import AWAY, State
from serve.store.catalog import Archive

router = APIRouter(tags=["SageMaker container"])


class AlreadyLoaded(PalimpsestError):
    status, code = 409, "already_loaded"


class LoadRequest(BaseModel):
    """What the platform sends to have a model loaded."""

    model_config = ConfigDict(json_schema_extra={"example": {"model_name": "0f3a", "url": "/opt/ml/models/0f3a/model"}})

    model_name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$",
        max_length=200,
        description="Any name; SageMaker sends an opaque hash.",
    )
    url: str = Field(description="The archive: its absolute path inside the store, or its name.")


class Entry(BaseModel):
    """One loaded model."""

    modelName: str
    modelUrl: str


class Page(BaseModel):
    """Loaded models in the order of their names; without a token it was the last page."""

    models: list[Entry]
    nextPageToken: str | None = None


class Done(BaseModel):
    status: str


def _entry(model: LoadedModel) -> Entry:
    return Entry(modelName=model.name, modelUrl=model.url)


def _describe(text: str) -> dict[str, Any]:
    return {"description": text}


# A parked or suspended model answers, too: it comes back to the device by itself.
_LOADED = {State.READY, *AWAY}
_NOT_LOADED: dict[int | str, dict[str, Any]] = {404: _describe("No model of that name is loaded.")}
_BINARY = {"*/*": {"schema": {"type": "string", "format": "binary"}}}


@router.post(
    "/models",
    summary="Load a model",
    responses={
        400: _describe("The store holds no such archive, or the path is outside of it."),
        409: _describe("A model of that name is loaded."),
        413: _describe("The body is too large."),
        415: _describe("The body is no JSON."),
        429: _describe("Still loading after PALIMPSEST_LOAD_TIMEOUT, or too many requests wait; see Retry-After."),
        500: _describe("The archive's handler failed."),
        507: _describe("Not enough memory, or a disk is full."),
    },
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": LoadRequest.model_json_schema()}}}
    },
)
async def load(request: Request, services: Injected) -> Done:
    model = await _load_request(request)
    archive = await _archive_at(services, model.url)
    if _loaded_model(services, model.model_name) is not None:
        raise AlreadyLoaded(f"{model.model_name!r} is loaded: DELETE /models/{model.model_name} first", "model_name")
    await services.scheduler.load(await services.catalog.prepare(archive), services.settings.load_timeout)
    services.given_names.give(LoadedModel(model.model_name, model.url, archive))
    return Done(status=f"{model.model_name} is loaded")


@router.get("/models", summary="Loaded models", response_model_exclude_none=True)
async def models(
    services: Injected,
    next_page_token: Annotated[str, Query(description="The token of the page before.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page:
    # The token is the last name shown: models that come and go between two pages shift nothing.
    rest = sorted((m for m in _loaded(services) if m.name > next_page_token), key=lambda m: m.name)
    page = rest[:limit]
    token = page[-1].name if len(rest) > limit else None
    return Page(models=[_entry(m) for m in page], nextPageToken=token)


@router.get("/models/{name:path}", summary="Whether a model is loaded", responses=_NOT_LOADED)
async def model(name: str, services: Injected) -> Entry:
    return _entry(_require(services, name))


@router.delete(
    "/models/{name:path}", summary="Unload a model; its memory is back with the answer", responses=_NOT_LOADED
)
async def unload(name: str, services: Injected) -> Done:
    loaded = _require(services, name)
    try:
        await services.scheduler.unload(loaded.archive.name)
    except KeyError:
        raise _not_loaded(name) from None
    services.given_names.take_back(loaded.name)
    return Done(status=f"{name} is unloaded")


@router.post(
    "/models/{name:path}/invoke",
    summary="Ask a loaded model",
    responses={**_NOT_LOADED, 200: _describe("What /predictions/{model} answers.") | {"content": _BINARY}},
    openapi_extra={"requestBody": {"description": "What /predictions/{model} takes.", "content": _BINARY}},
)
async def invoke_loaded(name: str, request: Request, services: Injected) -> Response:
    archive = _require(services, name).archive
    return Transfer.of(await invoke_as_sent(services, archive, headers_of(request), request))


async def _load_request(request: Request) -> LoadRequest:
    """Raises BadRequest, which says what to send."""
    wanted = 'send {"model_name": "any-name", "url": "sam"} as application/json'
    kind, coding = (request.headers.get(name, "") for name in ("content-type", "content-encoding"))
    try:
        return LoadRequest.model_validate(read_body(kind, coding, await request.body()))
    except BodyError as error:
        refusal = BadRequest(f"{error}; {wanted}", error.field)
        refusal.status = error.status
        raise refusal from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0])
        raise BadRequest(f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}; {wanted}", field) from None


async def _archive_at(services: Services, url: str) -> Archive:
    """Raises BadRequest, also where the store holds no such archive; the catalog refuses ".." in any form."""
    path, store = PurePath(url), services.catalog.folder
    if path.is_absolute() and not path.is_relative_to(store):
        raise BadRequest(f"url must be a path inside the store {store}, or the name of an archive in it", "url")
    name = str(path.relative_to(store)) if path.is_absolute() else url
    try:
        archive = await services.catalog.look_up(name)
    except BadRequest as error:
        raise BadRequest(error.message, "url") from None
    # The catalog may prefer the demo set for a bare name; a path means the archive that lies there.
    if path.is_absolute() and not name.startswith(archive.name):
        raise BadRequest(f"there is no archive at {url}", "url")
    return archive


def _require(services: Services, name: str) -> LoadedModel:
    loaded = _loaded_model(services, name)
    if loaded is None:
        raise _not_loaded(name)
    return loaded


def _not_loaded(name: str) -> ModelNotFound:
    return ModelNotFound(f"{name[:80]!r} is not loaded: POST /models loads it, GET /models lists what is", "model")


def _loaded_model(services: Services, name: str) -> LoadedModel | None:
    """Finds a model by the name under which it is listed, or by any spelling of its archive's name."""
    loaded = _loaded(services)
    by_name = next((m for m in loaded if m.name == name), None)
    if by_name is not None:
        return by_name
    with suppress(BadRequest):
        archive = services.catalog.find(name)
        return next((m for m in loaded if m.archive.name == archive.name), None)
    return None


def _loaded(services: Services) -> list[LoadedModel]:
    """What is ready to serve: under the names that the platform gave, else under the archive's own."""
    ready = {m.archive.name: m.archive for m in services.scheduler.active() if m.state in _LOADED}
    # The version that is loaded, which may not be the one that lies in the store by now.
    given = [replace(m, archive=ready[m.archive.name]) for m in services.given_names if m.archive.name in ready]
    hidden = {m.archive.name for m in given} | {m.name for m in given}
    own = [
        LoadedModel(name, str(archive.file or archive.path), archive)
        for name, archive in ready.items()
        if name not in hidden
    ]
    return given + own
