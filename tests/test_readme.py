"""Every block of the README does what it says, and so do those of docs/api.md: run as a reader runs them."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA, pixels
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from serving import ROOT, Server, blocks, serving

pytestmark = pytest.mark.torchserve

ADDRESS = "127.0.0.1:8080"
README = "README.md"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("readme"), demo_store) as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder that has of a checkout what readers' commands name."""
    (tmp_path / "tests").symlink_to(DATA.parent)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path


def addressed(page: str, language: str, server: Server) -> list[str]:
    """The page's blocks, which ask this server."""
    return [block.replace(ADDRESS, f"127.0.0.1:{server.port}") for block in blocks(page, language)]


def run(command: list[str], desk: Path, server: Server) -> None:
    environ = os.environ | {"PALIMPSEST_SERVER": f"http://127.0.0.1:{server.port}"}
    subprocess.run(command, cwd=desk, env=environ, check=True, timeout=120)


def run_shell(block: str, desk: Path, server: Server) -> None:
    run(["bash", "-euo", "pipefail", "-c", block], desk, server)


def changed(desk: Path, name: str) -> np.ndarray:
    """HxW bool: where the picture differs from the sample photograph."""
    before, after = pixels((DATA / "dog-on-bench.png").read_bytes()), pixels((desk / name).read_bytes())
    assert after.shape == before.shape
    return np.asarray((before != after).any(axis=2))


def is_within(changes: np.ndarray, mask: np.ndarray) -> bool:
    return bool(changes.any() and not changes[~mask].any())


def test_the_readmes_make_targets_are_there(server: Server) -> None:
    first, *_ = addressed(README, "sh", server)
    targets = re.findall(r"^make (\S+)", first, re.M)
    assert targets == ["serve", "test"]
    subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_the_readmes_shell_commands(server: Server, desk: Path) -> None:
    _, commands, curl = addressed(README, "sh", server)
    run_shell(commands, desk, server)
    mask = pixels((desk / "mask.png").read_bytes()) == 255
    assert is_within(changed(desk, "erased.png"), mask)
    assert is_within(changed(desk, "replaced.png"), mask)
    by_command = changed(desk, "erased.png")
    run_shell(curl, desk, server)
    assert (changed(desk, "erased.png") == by_command).all()


def test_the_readmes_python(server: Server, desk: Path) -> None:
    client, openai = addressed(README, "python", server)
    run([sys.executable, "-c", client], desk, server)
    assert pixels((desk / "empty-bench.jpg").read_bytes()).shape == (1041, 1499, 3)
    keep = "import base64\nopen('edited.png', 'wb').write(base64.b64decode(edited.data[0].b64_json))"
    run([sys.executable, "-c", f"{openai}\n{keep}"], desk, server)
    hole = pixels((DATA / "dog-on-bench-hole.png").read_bytes())[..., -1] == 0
    assert is_within(changed(desk, "edited.png"), hole)


def test_the_readmes_chat_program(server: Server, desk: Path) -> None:
    (block,) = addressed(README, "json", server)
    wanted = json.loads(block)["mcpServers"]["palimpsest"]
    environ = os.environ | {"PALIMPSEST_SERVER": f"http://127.0.0.1:{server.port}"}
    started = StdioServerParameters(
        command=str(desk / wanted["command"]), args=wanted["args"], env=environ, cwd=str(desk)
    )

    async def tools() -> set[str]:
        async with stdio_client(started) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            assert not (await session.call_tool("models", {})).is_error
            return {tool.name for tool in (await session.list_tools()).tools}

    assert asyncio.run(asyncio.wait_for(tools(), 60)) >= {"segment", "erase", "replace", "models"}


def test_the_apis_page(server: Server, desk: Path) -> None:
    for block in addressed("docs/api.md", "sh", server):
        run_shell(block, desk, server)
    mask = pixels((desk / "mask.png").read_bytes()) == 255
    assert pixels((desk / "selected.png").read_bytes()).shape == mask.shape
    for name in ("erased.png", "replaced.png"):
        assert changed(desk, name).any()
