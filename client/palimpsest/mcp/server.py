"""The server: the tools, over standard input and output or HTTP."""

import inspect
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.tools import Tool
from mcp.types import ToolAnnotations

from palimpsest import __version__
from palimpsest.async_client import AsyncClient
from palimpsest.mcp.places import MOST_BYTES, Places
from palimpsest.mcp.tools import Tools

HOST = "127.0.0.1"
PATH = "/mcp"
MOST_REQUEST = 2 * MOST_BYTES * 4 // 3 + 2**20
"""Bytes: a picture and its mask as base64, and all else."""
MOST_AT_ONCE = 32
"""Calls and connections over HTTP; above it the answer is 503."""
_STOPPING = 3  # seconds that answers may still take

_INSTRUCTIONS = """\
Edits pictures: segment selects an object, erase removes it, replace paints something else there. Coordinates are pixels
of the upright picture, from its upper left corner. Select first and look at the preview; then erase or replace with the
mask's id. Results have ids, too, and further edits of these lose nothing. Files are written beside their pictures under
new names. Relative paths are below {folder}."""


def create(client: AsyncClient, places: Places) -> MCPServer:
    """The tools without a transport."""
    tools = Tools(client, places)
    making = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
    looking = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    return MCPServer(
        "palimpsest",
        title="Palimpsest",
        instructions=_INSTRUCTIONS.format(folder=places.folders[0]),
        version=__version__,
        log_level="WARNING",
        subscriptions=False,
        tools=[
            *(_strict(each, making) for each in (tools.segment, tools.erase, tools.replace)),
            _strict(tools.models, looking),
        ],
    )


def _strict(function: Callable[..., Any], annotations: ToolAnnotations) -> Tool:
    """A tool that refuses arguments which it does not know, instead of doing without them."""
    tool = Tool.from_function(function, description=inspect.getdoc(function), annotations=annotations)
    model = tool.fn_metadata.arg_model
    model.model_config["extra"] = "forbid"
    model.model_rebuild(force=True)
    tool.parameters = model.model_json_schema()
    return tool


def listening(port: int) -> socket.socket:
    """On this machine's loopback only. Raises OSError where the port is taken."""
    return socket.create_server((HOST, port))


def run(client: AsyncClient, folders: list[Path], listener: socket.socket | None) -> None:
    """Serves until standard input ends, or over HTTP where there is a listener, until Ctrl-C."""
    if listener is None:
        # Nothing interrupts a read of standard input. What the server still does ends with the connection.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    anyio.run(_serve, client, Places(folders), listener)


async def _serve(client: AsyncClient, places: Places, listener: socket.socket | None) -> None:
    server = create(client, places)
    async with client:
        if listener is None:
            await server.run_stdio_async()
            return
        # For the loopback's own names alone: pages of the web reach it by no trick.
        app = server.streamable_http_app(streamable_http_path=PATH, host=HOST, max_request_body_size=MOST_REQUEST)
        config = uvicorn.Config(
            app,
            ws="none",
            log_level="warning",
            timeout_graceful_shutdown=_STOPPING,
            limit_concurrency=MOST_AT_ONCE,
        )
        print(f"http://{HOST}:{listener.getsockname()[1]}{PATH}", file=sys.stderr, flush=True)
        await uvicorn.Server(config).serve(sockets=[listener])
