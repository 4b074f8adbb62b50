"""Whatever one client does, others are answered meanwhile: /ping beside each, on a real server."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from door import post, read
from PIL import Image
from serving import Server, serving

pytestmark = pytest.mark.torchserve

STALL = 0.1  # seconds beyond the longest /ping while nothing happens
TRIES = 5  # of which one without a stall will do: clients, server and workers share the cores
MIB = 2**20
JSON = "Content-Type: application/json"
UPGRADES = (
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"),
    ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZQ=="),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("stalls"), demo_store) as running:
        for model in ("sam", "lama"):
            running.http.post(f"/v1/models/demo/{model}/load").raise_for_status()
        yield running


@contextlib.contextmanager
def connections(server: Server, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60)) for _ in range(count)
        ]


PINGER = """
import select, socket, sys, time
line, longest = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=60), 0.0
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    began = time.perf_counter()
    line.sendall(b"GET /ping HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    reply = b""
    while not reply.endswith(b"}"):
        reply += line.recv(65536)
    assert b" 200 " in reply
    longest = max(longest, time.perf_counter() - began)
print(longest)
"""


def longest_ping(server: Server, meanwhile: Callable[[], None]) -> float:
    """Seconds. Asked from a process of its own, which waits for nothing that this one computes."""
    command = [sys.executable, "-c", PINGER, str(server.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pinger:
        assert pinger.stdin is not None
        assert pinger.stdout is not None
        assert pinger.stdout.readline() == "begun\n"
        try:
            meanwhile()
        finally:
            pinger.stdin.close()
        return float(pinger.stdout.read())


def refused(server: Server, request: bytes) -> int:
    """The status that a request gets which may be refused before all of it was taken."""
    with connections(server, 1) as (line,):
        with contextlib.suppress(ConnectionError):
            line.sendall(request)
        return read(line).status


def noise(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def mask(width: int, height: int) -> bytes:
    marked = np.zeros((height, width), np.uint8)
    marked[10:20, 10:20] = 255
    buffer = io.BytesIO()
    Image.fromarray(marked).save(buffer, "PNG")
    return buffer.getvalue()


LARGE = {"image": noise(2000, 1500), "mask_image": mask(2000, 1500)}


def offers_upgrades(server: Server) -> None:
    """And does not send the body that it promises."""
    with connections(server, 6) as lines:
        for index, line in enumerate(lines):
            model = ("sam", "lama", "sd")[index // 2]
            line.sendall(post(f"/predictions/{model}", bytes(1000), *UPGRADES[index % 2])[:-500])
        # The models are free for others.
        for model in ("sam", "lama"):
            assert server.http.post(f"/predictions/{model}", json={}).status_code == 400


def sends_headers(server: Server) -> None:
    for count in (10_000, 100_000):
        assert refused(server, post("/predictions/lama", b"", *(f"a{number}: b" for number in range(count)))) == 431


def sends_keys_and_points(server: Server) -> None:
    keys = b"{" + b",".join(b'"k%d":1' % number for number in range(2_000_000)) + b"}"
    for body in (keys, b'{"points":[' + b"[]," * 5_000_000 + b"[]]}", b'{"points":[' + b"[1,2]," * 10**6 + b"[1,2]]}"):
        assert refused(server, post("/v1/segment", body, JSON)) in (400, 413)


def sends_large_bodies(server: Server) -> None:
    """Eight clients, 60 MiB each, which are no pictures."""
    body = os.urandom(60 * MIB)
    with ThreadPoolExecutor(8) as pool:
        statuses = pool.map(lambda _: refused(server, post("/predictions/lama", body)), range(8))
        assert set(statuses) <= {400, 413, 415, 429, 503}


def reads_no_replies(server: Server) -> None:
    request = httpx.Request("POST", "http://x/predictions/lama", files=LARGE)
    body, kind = request.read(), f"Content-Type: {request.headers['content-type']}"
    with connections(server, 4) as lines:
        for line in lines:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.sendall(post("/predictions/lama", body, kind))
        for line in lines:
            assert line.recv(12) == b"HTTP/1.1 200"


def is_another_sites_page(server: Server) -> None:
    foreign = ("Origin: http://evil.example", "Sec-Fetch-Site: cross-site", "Content-Type: text/plain")
    for _ in range(100):
        assert refused(server, post("/v1/models/demo/lama/unload", b"", *foreign)) == 403


def says_nothing(server: Server) -> None:
    with connections(server, 300):
        time.sleep(0.5)


def opens_event_streams(server: Server) -> None:
    points = json.dumps({"image": "/9j/", "points": [[1, 1]]}).encode()
    with connections(server, 200) as lines:
        for line in lines:
            line.sendall(post("/v1/segment", points, JSON, "Accept: text/event-stream"))
        for line in lines:
            assert read_status(line) in (200, 429, 503)


def read_status(line: socket.socket) -> int:
    return int(line.recv(12).split()[1])


def asks_for_large_replies(server: Server) -> None:
    files = {"image": LARGE["image"], "mask": LARGE["mask_image"]}
    for accept in ("application/json", "text/event-stream"):
        answer = server.http.post("/v1/erase", files=files, headers={"Accept": accept})
        assert answer.status_code == 200
        assert len(answer.content) > 10 * MIB


@pytest.mark.parametrize(
    "client",
    [
        offers_upgrades, sends_headers, sends_keys_and_points, sends_large_bodies, reads_no_replies,
        is_another_sites_page, says_nothing, opens_event_streams, asks_for_large_replies,
    ],
)  # fmt: skip
def test_nobody_waits_for_a_client_that(client: Callable[[Server], None], server: Server) -> None:
    idle = longest_ping(server, lambda: time.sleep(1))
    longest: list[float] = []
    while len(longest) < TRIES and not (longest and min(longest) < idle + STALL):
        longest.append(longest_ping(server, lambda: client(server)))
    assert min(longest) < idle + STALL, (idle, longest)
