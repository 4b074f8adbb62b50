"""`palimpsest mcp` as docs/mcp.md sets it up, with the demo models in a real TorchServe."""

import base64
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, pixels
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from serving import Server, blocks, serving

pytestmark = [pytest.mark.torchserve, pytest.mark.anyio]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Any:
    with serving(tmp_path_factory.mktemp("mcp"), demo_store) as running:
        yield running


def documented(server: Server, folder: Path) -> StdioServerParameters:
    """How the documentation has a chat program start it."""
    (block,) = blocks("docs/mcp.md", "json")
    told = json.loads(block)["mcpServers"]["palimpsest"]
    assert told["command"] == "palimpsest"
    own = {"/home/me/Pictures": str(folder), "http://127.0.0.1:8080": f"http://127.0.0.1:{server.port}"}
    arguments = ["-c", "from palimpsest.cli import run; run()", *(own.get(each, each) for each in told["args"])]
    return StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))


async def test_a_model_selects_erases_and_replaces(server: Server, dog: bytes, tmp_path: Path) -> None:
    shutil.copy(DATA / "dog-on-bench.png", tmp_path)
    told: list[tuple[float, float | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total))

    async with Client(documented(server, tmp_path)) as session:

        async def call(tool: str, **arguments: Any) -> Any:
            result = await session.call_tool(tool, arguments, progress_callback=listen)
            assert not result.is_error, result.content
            return result

        found = await call("segment", image="dog-on-bench.png", points=[[750, 500]], dilate=8, preview=True)
        assert found.structured_content["score"] > 0.2
        selected = pixels((tmp_path / "dog-on-bench-mask.png").read_bytes()) > 127
        shown = pixels(base64.b64decode(found.content[1].data))
        assert shown.shape == (1041, 1499, 3)
        assert shown[selected].mean() > 2 * shown[~selected].mean()
        erased = (await call("erase", image="dog-on-bench.png", mask=found.structured_content["id"])).structured_content
        del told[:]
        more = {"prompt": "a hamster", "seed": 7, "steps": 4, "output": "hamster.png"}
        image, mask = erased["results"][0]["id"], "dog-on-bench-mask.png"
        replaced = (await call("replace", image=image, mask=mask, **more)).structured_content
        models = (await call("models")).structured_content["models"]
    assert replaced["results"][0]["seed"] == 7
    assert {"demo/sam", "demo/lama", "demo/sd"} <= {each["name"] for each in models}
    assert [progress for progress, _ in told] == sorted({progress for progress, _ in told})
    assert told[-1] == (4, 4)
    before = pixels(dog)
    for name in ("dog-on-bench-erased.png", "hamster.png"):
        after = pixels((tmp_path / name).read_bytes())
        assert (after[~selected] == before[~selected]).all()
        assert (after[selected] != before[selected]).any()
