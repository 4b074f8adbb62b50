"""`palimpsest models`: the running server's models as a table, and reading one ahead."""

import json
import ssl
import time
from contextlib import suppress
from typing import TypeVar

import httpx
from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serve.errors import EngineUnavailable, PalimpsestError
from serve.gateway.models import ErrorReply, ModelList, ModelStatus, Warmed

Reply = TypeVar("Reply", bound=BaseModel)

REFRESH = 1.0  # seconds between two looks
_TIMEOUT = 5.0
_WARM_TIMEOUT = 600.0  # a large archive on a slow disk
_STYLES = {"ready": "green", "failed": "red", "absent": "dim"}


def connection(
    base_url: str,
    key: str = "",
    trust: ssl.SSLContext | bool = False,
    transport: httpx.BaseTransport | None = None,
) -> httpx.Client:
    """To the server. key: where it asks for one. trust: its certificate, where it speaks TLS. transport: stands in for
    the network in tests."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=base_url, headers=headers, transport=transport, verify=trust, trust_env=False)


def show(client: httpx.Client, once: bool, as_json: bool, console: Console) -> None:
    """Prints the table until Ctrl-C; once, also where the output is no terminal, or as JSON.

    Raises EngineUnavailable where no server answers.
    """
    if as_json:
        print(json.dumps(_fetch(client).model_dump(mode="json"), indent=2))
    elif once or not console.is_terminal:
        console.print(_view(_fetch(client)))
    else:
        _watch(client, console)


def _watch(client: httpx.Client, console: Console) -> None:
    with Live(_view(_fetch(client)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH)
            live.update(_view(_fetch(client)), refresh=True)


def warm(client: httpx.Client, name: str, console: Console) -> None:
    """Has the server read an archive into main memory. Raises as show, and PalimpsestError where it refuses."""
    with console.status(f"Reading {name}"):
        answer = _ask(client, "POST", f"/v1/models/{name}/warm", _WARM_TIMEOUT)
    warmed = _parsed(client, Warmed, answer)
    console.print(f"{warmed.name}: {_mib(warmed.bytes)} MiB read in {warmed.seconds:.1f} s")


def _fetch(client: httpx.Client) -> ModelList:
    """All pages as one."""
    shown = _parsed(client, ModelList, _ask(client, "GET", "/v1/models"))
    while shown.next_page_token:
        next_page = _ask(client, "GET", "/v1/models", limit="1000", next_page_token=shown.next_page_token)
        page = _parsed(client, ModelList, next_page)
        shown = page.model_copy(update={"models": shown.models + page.models})
    return shown


def _ask(client: httpx.Client, method: str, path: str, timeout: float = _TIMEOUT, **parameters: str) -> httpx.Response:
    try:
        return client.request(method, path, params=parameters, timeout=timeout)
    except httpx.TransportError:
        raise EngineUnavailable(
            f"no server answers at {client.base_url}: `make serve` starts one; PALIMPSEST_HOST and PALIMPSEST_PORT say"
            " where to look"
        ) from None


def _parsed(client: httpx.Client, kind: type[Reply], answer: httpx.Response) -> Reply:
    with suppress(ValueError):
        if answer.is_success:
            return kind.model_validate_json(answer.content)
        message = ErrorReply.model_validate_json(answer.content).error.message
        raise PalimpsestError("the server asks for a key: set PALIMPSEST_KEY" if answer.status_code == 401 else message)
    raise PalimpsestError(f"what answers at {client.base_url} is no Palimpsest of this version")


def _view(models: ModelList) -> RenderableType:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("model", overflow="fold")  # the one that makes way where the terminal is narrow
    for heading in ("place", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("MiB", "runs", "waits", "requests", "hits", "loads", "failed", "idle"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in models.models:
        table.add_row(*_cells(model))
    errors = [Text(f"{m.name}: {m.last_error}", style="red") for m in models.models if m.last_error]
    return Group(_memory_line(models), table, *errors)


def _memory_line(models: ModelList) -> Text:
    memory = models.memory
    return Text(
        f"{memory.device}: {_mib(memory.reserved_bytes)} of {_mib(memory.budget_bytes)} MiB held for models,"
        f" {_mib(memory.free_bytes)} MiB free"
    )


def _cells(model: ModelStatus) -> list[RenderableType]:
    return [
        model.name + (" (pinned)" if model.pinned else ""),
        model.place,
        Text(model.state.value, style=_STYLES.get(model.state.value, "yellow")),
        _mib(model.footprint.peak_bytes) if model.footprint else "",
        str(model.leases),
        str(model.queue),
        str(model.requests),
        str(model.hits),
        str(model.loads),
        str(model.failures),
        "" if model.idle_seconds is None else _duration(model.idle_seconds),
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"
