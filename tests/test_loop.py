"""The event loop while large bodies are read beside it: no request's size holds it."""

import asyncio
import base64
import contextlib
import os
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import Request
from test_transport import longest_gap

from contract.bodies import Slice, read_body
from serve import startup
from serve.errors import BadRequest
from serve.gateway.access.fairuse import FairUse, Limits
from serve.gateway.edit.asking import picture_of
from serve.gateway.edit.fields import SegmentFields
from serve.gateway.edit.form import read_fields
from serve.gateway.edit.images import Images
from serve.memory_file import MemoryFile, whole

pytestmark = pytest.mark.anyio

MIB = 2**20
# Seconds of computing: 1 to 7 on a machine that does five other things; one call for all bytes of a body takes 40.
HELD = 0.02
JSON, MULTIPART, URLENCODED = (
    "application/json",
    "multipart/form-data; boundary=XX",
    "application/x-www-form-urlencoded",
)
POINTS = b'"points": [[1, 2]]'


def multipart(name: str, content: bytes, times: int = 1) -> bytes:
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n\r\n'.encode()
    points = b'--XX\r\nContent-Disposition: form-data; name="points"\r\n\r\n[[1, 2]]\r\n--XX--\r\n'
    return (head + content + b"\r\n") * times + points


BODIES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "a picture in JSON": lambda: (JSON, b'{"image": "' + base64.b64encode(bytes(70 * MIB)) + b'", ' + POINTS + b"}"),
    "JSON in UTF-16": lambda: (JSON, ('{"image": "' + "A" * (3 * MIB) + '", "points": [[1, 2]]}').encode("utf-16")),
    "a file": lambda: (MULTIPART, multipart("image", os.urandom(90 * MIB))),
    "a file of line ends": lambda: (MULTIPART, multipart("image", b"\n" * (60 * MIB))),
    "a file of almost boundaries": lambda: (MULTIPART, multipart("image", b"\n--X" * (15 * MIB))),
    "many parts": lambda: (MULTIPART, multipart("x", bytes(1000), 990)),
    "a form of escapes": lambda: (URLENCODED, b"points=[[1,2]]&image=" + b"%41" * (MIB // 2)),
}


@pytest.fixture(autouse=True)
def turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(startup.TURN)
    yield
    sys.setswitchinterval(before)


async def held(work: Callable[[], Awaitable[Any]]) -> float:
    """Seconds for which it holds the loop at most, beyond what nothing does: the least of five, for what else the
    machine does adds to some of them, and what holds the loop to all.
    """

    async def once(work: Callable[[], Awaitable[Any]]) -> float:
        return await longest_gap(asyncio.ensure_future(work()))

    idle = statistics.median([await once(lambda: asyncio.sleep(0.05)) for _ in range(3)])
    return min([await once(work) for _ in range(5)]) - idle


def file_of(content: bytes) -> MemoryFile:
    file = MemoryFile()
    file.write(content)
    file.seal()
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
async def test_reading_a_body(name: str) -> None:
    kind, content = BODIES[name]()
    request = Request({"type": "http", "headers": [(b"content-type", kind.encode())]})
    with file_of(content) as body:

        async def read() -> None:
            with contextlib.suppress(BadRequest) if name == "many parts" else contextlib.nullcontext():
                assert (await read_fields(request, SegmentFields, body)).points

        assert await held(read) < HELD


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a picture in JSON", "JSON in UTF-16", "a file", "a form of escapes"])
async def test_refusing_a_body(name: str) -> None:
    kind, content = BODIES[name]()
    request = Request({"type": "http", "headers": [(b"content-type", kind.encode())]})
    for points in (b"[[1, 2]]", b"[[1,2]]", "[[1, 2]]".encode("utf-16-le")):
        content = content.replace(points, points.replace(b"2", b"x"))
    with file_of(content) as body:

        async def read() -> None:
            with pytest.raises(BadRequest):
                await read_fields(request, SegmentFields, body)

        assert await held(read) < HELD


@pytest.mark.slow
async def test_taking_escapes_out_of_a_picture() -> None:
    with file_of(b'{"image": "' + (b"ab\\/d" + b"A" * 55) * MIB + b'"}') as body:
        image = (await body.examined(lambda content: read_body(JSON, "", content)))["image"]
        assert isinstance(image, Slice)
        assert image.escaped

        async def take() -> None:
            with ExitStack() as files, FairUse(Limits(1, 1, 1, 1)).request("somebody") as share:
                services: Any = None
                part = await picture_of(services, share, files, body, image, "image")
                assert not isinstance(part, str)
                assert part.size == 59 * MIB

        assert await held(take) < HELD


@pytest.mark.slow
async def test_keeping_an_upload() -> None:
    images = Images(200 * MIB, 60)
    with file_of(os.urandom(90 * MIB)) as body:
        assert await held(lambda: images.put(whole(body))) < HELD
    images.close()


@pytest.mark.slow
async def test_giving_memory_back() -> None:
    content = bytes(90 * MIB)
    files = [file_of(content) for _ in range(5)]

    async def give() -> None:
        files.pop().close()

    assert await held(give) < HELD
    assert not files
