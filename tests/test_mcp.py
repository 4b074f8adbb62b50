"""`palimpsest mcp` as the `mcp` package's client speaks to it: over stdio, over HTTP and in this process."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import door
import httpx
import numpy as np
import pytest
from conftest import encoded, pixels
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from palimpsest import AsyncClient
from palimpsest.cli import app
from palimpsest.events import Progress
from palimpsest.mcp import showing
from palimpsest.mcp.news import News
from palimpsest.mcp.places import Places
from palimpsest.mcp.server import MOST_AT_ONCE, create
from PIL import Image
from serving import free_port, until
from test_openai import fake, server
from typer.testing import CliRunner

from contract.ticket import File
from serve.engine.answer import Answer
from serve.engine.question import Question
from serve.memory_file import MemoryFile

__all__ = ["fake", "server"]

pytestmark = pytest.mark.anyio

PICTURE = np.random.default_rng(3).integers(0, 256, (48, 64, 3), np.uint8)
HOLE = np.zeros(PICTURE.shape[:2], bool)
HOLE[10:30, 20:50] = True
BOX = [20, 10, 50, 30]
COMMAND = [sys.executable, "-c", "from palimpsest.cli import run; run()", "mcp"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The allowed one, with a picture and its mask; what is beside it is not allowed."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "bench.png").write_bytes(encoded(PICTURE))
    (inside / "hole.png").write_bytes(encoded(HOLE.astype(np.uint8) * 255))
    (tmp_path / "secret.png").write_bytes(encoded(PICTURE))
    return inside


@pytest.fixture
def url(server: door.Server) -> str:
    return f"http://127.0.0.1:{server.port}"


@asynccontextmanager
async def inside(url: str, folder: Path, **options: Any) -> AsyncIterator[Client]:
    async with AsyncClient(url, **options) as client, Client(create(client, Places([folder]))) as session:
        yield session


@asynccontextmanager
async def over_stdio(url: str, folder: Path, mode: str = "auto") -> AsyncIterator[Client]:
    command, *arguments = [*COMMAND, "--server", url, "--folder", str(folder)]
    parameters = StdioServerParameters(command=command, args=arguments, env=dict(os.environ))
    async with Client(parameters, mode=mode) as session:
        yield session


@asynccontextmanager
async def over_http(url: str, folder: Path, mode: str = "auto") -> AsyncIterator[Client]:
    with serving_http(url, folder) as address:
        async with Client(address, mode=mode) as session:
            yield session


@contextmanager
def serving_http(url: str, folder: Path) -> Iterator[str]:
    command = [*COMMAND, "--server", url, "--folder", str(folder), "--http", str(free_port())]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield process.stderr.readline().strip()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            assert "Traceback" not in process.stderr.read()


SLOW_STDIO, SLOW_HTTP = (pytest.param(each, marks=pytest.mark.slow) for each in (over_stdio, over_http))


async def call(session: Client, tool: str, **arguments: Any) -> Any:
    result = await session.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert json.loads(result.content[0].text) == result.structured_content
    return result


async def refusal(session: Client, tool: str, **arguments: Any) -> str:
    result = await session.call_tool(tool, arguments)
    assert result.is_error
    return str(result.content[0].text)


def images(result: Any) -> list[np.ndarray]:
    return [pixels(base64.b64decode(each.data)) for each in result.content[1:]]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def kind_of(path: Path) -> str | None:
    with Image.open(path) as image:
        return image.format


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def session(url: str, folder: Path) -> Callable[..., Any]:
    return lambda **options: inside(url, folder, **options)


# What the tools do


@pytest.mark.slow
@pytest.mark.parametrize("connect", [inside, SLOW_STDIO, SLOW_HTTP])
async def test_a_picture_is_selected_erased_and_replaced(connect: Any, url: str, folder: Path) -> None:
    async with connect(url, folder) as session:
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        assert sorted(tools) == ["erase", "models", "replace", "segment"]
        assert "image" in tools["erase"].input_schema["properties"]
        assert "ctx" not in tools["erase"].input_schema["properties"]
        assert "pixels" in session.instructions
        found = (await call(session, "segment", image="bench.png", box=BOX)).structured_content
        assert found["path"] == str(folder / "bench-mask.png")
        assert found["score"] > 0
        selected = pixels((folder / "bench-mask.png").read_bytes()) > 127
        assert selected.sum() == found["area"]
        erased = await call(session, "erase", image="bench.png", mask=found["id"])
        (first,) = erased.structured_content["results"]
        assert (first["path"], first["seed"]) == (str(folder / "bench-erased.png"), None)
        assert len(erased.content) == 1
        told = await call(
            session, "replace", image=first["id"], mask="hole.png", prompt="a cat", seed=5, steps=2, variants=2
        )
        assert [each["seed"] for each in told.structured_content["results"]] == [5, 6]
        assert [each["path"] for each in told.structured_content["results"]] == [None, None]
        after = pixels((folder / "bench-erased.png").read_bytes())
        assert (after[~selected] == PICTURE[~selected]).all()
        for each in images(told):
            assert (each[~HOLE] == after[~HOLE]).all()
            assert (each[HOLE] != after[HOLE]).any()
        models = (await call(session, "models")).structured_content["models"]
        assert {"sam", "lama", "sd"} <= {each["name"] for each in models}


async def test_base64_comes_back_as_a_picture_and_no_file_is_written(session: Any, folder: Path) -> None:
    before = names(folder)
    async with session() as s:
        text = in_base64(encoded(PICTURE, "JPEG"))
        found = await call(s, "segment", image_data=f"data:image/jpeg;base64,{text}", box=BOX)
        (mask,) = images(found)
        assert (mask > 127).sum() == found.structured_content["area"]
        assert found.structured_content["path"] is None
        erased = await call(s, "erase", image_data=text, mask_data=in_base64((folder / "hole.png").read_bytes()))
        assert erased.content[1].mime_type == "image/jpeg"
        assert images(erased)[0].shape == PICTURE.shape
    assert names(folder) == before


@pytest.mark.slow
async def test_nothing_is_ever_overwritten(session: Any, folder: Path) -> None:
    async with session() as s:
        for name in ("bench-erased.png", "bench-erased-2.png", "bench-erased-3.png"):
            told = (await call(s, "erase", image="bench.png", mask="hole.png")).structured_content
            assert told["results"][0]["path"] == str(folder / name)
        words = await refusal(s, "erase", image="bench.png", mask="hole.png", output="hole.png")
        assert "nothing is overwritten" in words
        told = await call(
            s, "replace", image="bench.png", mask="hole.png", prompt="x", steps=2, variants=2, output="a.webp"
        )
        assert [Path(each["path"]).name for each in told.structured_content["results"]] == ["a.webp", "a-2.webp"]
    assert pixels((folder / "hole.png").read_bytes()).max() == 255
    assert kind_of(folder / "a-2.webp") == "WEBP"
    assert not [name for name in names(folder) if name.startswith(".")]


async def test_a_file_keeps_its_format_where_the_server_writes_it(session: Any, folder: Path) -> None:
    (folder / "a.JPG").write_bytes(encoded(PICTURE, "JPEG"))
    (folder / "b.bmp").write_bytes(encoded(PICTURE, "BMP"))
    async with session() as s:
        for name, made, kind in (("a.JPG", "a-erased.JPG", "JPEG"), ("b.bmp", "b-erased.png", "PNG")):
            told = (await call(s, "erase", image=name, mask="hole.png")).structured_content
            assert told["results"][0]["path"] == str(folder / made)
            assert kind_of(folder / made) == kind


async def test_a_preview_shows_what_is_selected_and_what_was_made(session: Any, folder: Path) -> None:
    async with session() as s:
        found = await call(s, "segment", image="bench.png", box=BOX, preview=True)
        selected = pixels((folder / "bench-mask.png").read_bytes()) > 127
        (shown,) = images(found)
        assert shown[selected].mean() > 2 * shown[~selected].mean()
        erased = await call(s, "erase", image="bench.png", mask="hole.png", preview=True)
        assert (images(erased)[0] == pixels((folder / "bench-erased.png").read_bytes())).all()
        erased = await call(s, "erase", image="bench.png", mask="hole.png", output="a.tif", preview=True)
        assert erased.content[1].mime_type == "image/webp"
        assert images(erased)[0].shape == PICTURE.shape
        assert erased.structured_content["warnings"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (900, 1800, 3), np.uint8)),
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (900, 1800, 4), np.uint8)),
        Image.fromarray(np.random.default_rng(1).integers(0, 2**16, (900, 1800), np.uint16)),
    ],
    ids=["colours", "alpha", "16 bits"],
)
@pytest.mark.parametrize("most", [showing.MOST_SHOWN, showing.MOST_SHOWN // 4])
def test_what_is_shown_is_bounded(image: Image.Image, most: int) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    content, warnings = showing.shown(buffer.getvalue(), most)
    assert len(content.data) <= most * 4 / 3 + 4
    with Image.open(io.BytesIO(base64.b64decode(content.data))) as small:
        assert small.width == 2 * small.height
        assert 100 < np.asarray(small.convert("L")).mean() < 150
        assert warnings == [
            f"shown smaller, {small.width}x{small.height} instead of 1800x900: output names a file for all of it"
        ]


# What they refuse


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": "../secret.png"}, "not below a folder that was allowed"),
        ({"image": "/etc/passwd"}, "not below a folder that was allowed"),
        ({"image": "../nowhere.png"}, "not below a folder that was allowed"),
        ({"image": "link.png"}, "not below a folder that was allowed"),
        ({"image": "way/secret.png"}, "not below a folder that was allowed"),
        ({"image": "~nobody-at-all/a.png"}, "no path"),
        ({"image": "a\0b"}, "null"),
        ({"image": "nowhere.png"}, "there is no file"),
        ({"image": "."}, "there is no file"),
        ({"image": "pipe.png"}, "there is no file"),
        ({"image": "large.png"}, "larger than 64 MiB"),
        ({"image": "hole.png", "image_data": "aGVsbG8="}, "either image"),
        ({}, "either image"),
        ({"image_data": "no base64!"}, "image_data is no base64"),
        ({"image": "img_0123"}, "image: the server has it no more"),
        ({"image_data": "aGVsbG8="}, "not a picture"),
        ({"image": "bench.png", "box": [1, 2, 3]}, "box"),
        ({"image": "bench.png", "points": [[1000, 2]], "box": None}, "64x48"),
        ({"image": "bench.png", "dilate": 999}, "less than or equal to 255"),
        ({"image": "bench.png", "model": "none"}, "none"),
        ({"image": "bench.png", "colour": "red"}, "colour"),
        ({"image": "bench.png", "box": "around the dog"}, "box"),
        ({"image": "bench.png", "mask": "../secret.png", "box": None}, "mask: ../secret.png is not below"),
        ({"image": "bench.png", "output": "../b.png"}, "output: ../b.png is not below"),
        ({"image": "bench.png", "output": "way/b.png"}, "output: way/b.png is not below"),
        ({"image": "bench.png", "output": "none/b.png"}, "there is no folder"),
        ({"image": "bench.png", "output": "b.gif"}, "ends on one of .png"),
        ({"image": "bench.png", "box": None}, "say what to change"),
    ],
)
async def test_what_is_wrong_is_an_error_in_the_callers_words(
    session: Any, folder: Path, arguments: dict[str, Any], words: str
) -> None:
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "way").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe.png")
    with (folder / "large.png").open("wb") as file:
        file.truncate(65 << 20)
    before = names(folder)
    async with session() as s:
        assert words in await refusal(s, "erase", **{"box": BOX} | arguments)
    assert names(folder) == before


async def test_without_a_server_it_is_said_how_to_start_it(folder: Path) -> None:
    async with inside(f"http://127.0.0.1:{free_port()}", folder) as session:
        assert "palimpsest serve" in await refusal(session, "models")


def test_the_command_names_what_is_wrong_with_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    wrong = run(app, ["mcp", "--server", "nowhere", "--folder", str(tmp_path)])
    assert (wrong.exit_code, "--server" in wrong.output) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = run(app, ["mcp", "--folder", str(tmp_path), "--http", str(other.getsockname()[1])])
    assert (taken.exit_code, "in use" in taken.output) == (2, True)
    monkeypatch.chdir("/")
    wrong = run(app, ["mcp"])
    assert (wrong.exit_code, "--folder" in wrong.output) == (2, True)


# While the server works


@pytest.fixture
def stopped(server: door.Server, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every model tells that it has done 2 of 40 steps, and does no more until it is told to stop; set by then."""
    done = threading.Event()

    async def work(name: str, question: Question, reply: MemoryFile, job: File) -> Answer:
        progress = job.open(writable=True)
        os.pwrite(progress, struct.pack("<II", 2, 40), 0)
        while struct.unpack("<III", os.pread(progress, 12, 0))[2] == 0:
            await asyncio.sleep(0.01)
        os.close(progress)
        reply.write(json.dumps({"error": {"code": "cancelled", "message": "the job was cancelled"}}).encode())
        done.set()
        return Answer(499, {}, reply)

    monkeypatch.setattr(server.app.state.services.host.engine, "answer", work)
    return done


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("connect", [SLOW_STDIO, SLOW_HTTP])
async def test_who_waits_is_told_how_far_it_is_and_who_leaves_stops_the_work(
    connect: Any, mode: str, url: str, folder: Path, stopped: threading.Event
) -> None:
    arguments = {"image": "bench.png", "mask": "hole.png", "prompt": "a cat"}
    told: list[tuple[float, float | None, str | None]] = []

    async def listen(progress: float, total: float | None, message: str | None) -> None:
        told.append((progress, total, message))
        if total is not None:
            enough.cancel()

    async with connect(url, folder, mode) as session:
        with anyio.CancelScope() as enough:
            await session.call_tool("replace", arguments, progress_callback=listen)
        assert enough.cancelled_caught
        assert await anyio.to_thread.run_sync(stopped.wait, 20)
        await call(session, "models")
    assert told[-1] == (2, 40, "sd: step 2 of 40")
    assert names(folder) == ["bench.png", "hole.png"]


@pytest.mark.slow
async def test_a_program_that_ends_stops_the_work(url: str, folder: Path, stopped: threading.Event) -> None:
    arguments = {"image": "bench.png", "mask": "hole.png", "prompt": "a cat"}

    async def leave(progress: float, total: float | None, message: str | None) -> None:
        if total is not None:
            enough.cancel()

    with anyio.CancelScope() as enough:
        async with over_stdio(url, folder) as session:
            await session.call_tool("replace", arguments, progress_callback=leave)
    assert await anyio.to_thread.run_sync(stopped.wait, 20)


def test_the_numbers_rise_and_begin_anew_with_no_model() -> None:
    news = News()
    told = [
        Progress("queued", 0, 0, "sam"), Progress("loading", 0, 0, "sam"), Progress("running", 1, 1, "sam"),
        Progress("loading", 0, 0, "sd"), Progress("running", 0, 30, "sd"), Progress("running", 29, 30, "sd"),
        Progress("running", 30, 30, "sd"),
    ]  # fmt: skip
    numbers = [news.of(each) for each in told]
    values = [progress for progress, _, _ in numbers]
    assert values == sorted(set(values))
    assert [total for _, total, _ in numbers] == [None, None, 1, None, 31, 31, 31]
    assert values[-1] == 31
    assert [words for _, _, words in numbers][-2:] == ["sd: step 29 of 30", "sd: step 30 of 30"]


@pytest.mark.slow
def test_control_c_ends_it(url: str, folder: Path) -> None:
    command = [*COMMAND, "--server", url, "--folder", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "ping"}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == -signal.SIGINT


@pytest.mark.slow
def test_pages_of_the_web_do_not_reach_it(url: str, folder: Path) -> None:
    with serving_http(url, folder) as address, httpx.Client() as plain:
        asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}
        accept = {"accept": "application/json, text/event-stream"}
        for headers, status in (({"origin": "http://evil.example"}, 403), ({"host": "evil.example:80"}, 421)):
            assert plain.post(address, json=asked, headers=accept | headers).status_code == status
        assert plain.post(address, content=json.dumps(asked), headers=accept).status_code == 400
        port = httpx.URL(address).port
        with ExitStack() as stack:
            for _ in range(MOST_AT_ONCE):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            until(lambda: plain.post(address, json={}).status_code == 503)
        until(lambda: plain.post(address, json={}).status_code < 500)
