"""The HTTP server itself under clients that promise what they do not keep: everything is bounded, and answered."""

import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import door
import httpx
import psutil
import pytest
import uvicorn
from door import PING, Server, closed, post, read
from fakes import FakeTorchServe, make_store
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.gateway import connections, protocol, server
from serve.gateway import door as gateway_door
from serve.gateway import line as ends
from serve.gateway.connections import Doorkeeper, most_connections
from serve.gateway.protocol import HEAD_BYTES, HEADERS, PIPELINED, REQUEST_LINE

ROOT = Path(__file__).parent.parent
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA")
WEBSOCKET = ("Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
OTHER = ("Upgrade: foo/2", "Connection: upgrade")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("store"), "sam")


@pytest.fixture(scope="module")
def shared(store: Path) -> Iterator[tuple[Server, FakeTorchServe]]:
    fake = FakeTorchServe()
    with door.serving(fake, store, max_request_mib=1) as running:
        yield running, fake


@pytest.fixture
def running(shared: tuple[Server, FakeTorchServe]) -> Server:
    return shared[0]


@pytest.fixture
def fake(shared: tuple[Server, FakeTorchServe]) -> FakeTorchServe:
    return shared[1]


@contextlib.contextmanager
def nobody_waits(running: Server) -> Iterator[None]:
    """Pings on other connections meanwhile, none of which may take much longer than they do when nothing happens."""
    idle = statistics.median(running.ping() for _ in range(20))
    during: list[float] = []
    over = threading.Event()

    def ping() -> None:
        while not over.is_set() or len(during) < 3:
            during.append(running.ping())

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(60)
    assert max(during) < 100 * idle


def test_what_is_relied_on_of_uvicorn_is_there() -> None:
    """None of it is documented. Where this fails after an update, serve/gateway/protocol.py wants to be read again."""
    assert f"uvicorn=={uvicorn.__version__}" in (ROOT / "requirements.lock").read_text()
    methods = ("on_message_begin", "on_url", "on_header", "on_headers_complete", "on_body", "on_message_complete")
    for name in (*methods, "_start_asgi_task", "on_response_complete", "shutdown", "connection_lost"):
        assert name in vars(HttpToolsProtocol), name
    used = {*HttpToolsProtocol.__init__.__code__.co_names, *HttpToolsProtocol.on_message_begin.__code__.co_names}
    assert {"parser", "flow", "client", "pipeline", "scope", "headers", "url", "cycle", "server_state", "loop"} <= used
    own = set(RequestResponseCycle.__init__.__code__.co_names)
    assert {"keep_alive", "more_body", "disconnected", "message_event", "response_started"} <= own
    assert {"response_complete", "chunked_encoding", "expected_content_length"} <= own


# Upgrades


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("offer", [H2C, WEBSOCKET, OTHER])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("cut", [1, 7, 100, 10**6])
def test_an_upgrade_that_is_not_served_is_ignored(
    running: Server, fake: FakeTorchServe, offer: tuple[str, ...], framing: str, cut: int
) -> None:
    body = bytes(range(256)) * (2 if cut == 1 else 40)
    request = post("/predictions/sam", body, *offer)
    if framing == "chunked":
        head = post("/predictions/sam", b"", *offer).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        request = head + chunked(body, 100)
    with running.connect() as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Twice, the second time pipelined: the connection is as good as before.
        for start in range(0, 2 * len(request), cut):
            line.sendall((request * 2)[start : start + cut])
        assert [read(line).status, read(line).status] == [200, 200]
        line.sendall(PING)
        assert read(line).status == 200
    first, second = fake.calls[-3:-1]
    assert first.content == second.content == body
    assert not {"upgrade", "connection", "http2-settings"} & first.headers.keys() - {"connection"}


def test_an_offered_upgrade_may_wait_for_the_body_to_be_wanted(running: Server, fake: FakeTorchServe) -> None:
    request = post("/predictions/sam", b"body", *H2C, "Expect: 100-continue")
    with running.connect() as line:
        line.sendall(request[:-4])
        assert line.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(b"body")
        assert read(line).status == 200
    assert fake.calls[-1].content == b"body"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_with_http2_gets_its_answer(running: Server, fake: FakeTorchServe, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(bytes(300_000))
    for version in ("--http2", "--http1.0", "--http1.1"):
        command = ["curl", "-s", "-m", "20", version, "-H", "Expect:", "-F", "image=@picture"]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{running.port}/predictions/sam"],
            cwd=tmp_path, capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout == b"png"
        assert len(fake.calls[-1].content) > 300_000
    command = ["curl", "-s", "-m", "20", "--http2-prior-knowledge", f"http://127.0.0.1:{running.port}/ping"]
    assert subprocess.run(command, capture_output=True).returncode not in (0, 28)  # an error, at once


# Heads

HOST = b"Host: localhost\r\n"
GET, POST = b"GET /ping HTTP/1.1\r\n" + HOST, b"POST /predictions/sam HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HEADS = {
    "an address of a megabyte": (b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "an address a byte too long": (b"GET /ping?" + b"a" * (REQUEST_LINE - 5) + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "10,000 headers": (GET + b"a: b\r\n" * 10_000 + b"\r\n", 431),
    "100,000 headers": (GET + b"a: b\r\n" * 100_000 + b"\r\n", 431),
    "one header too many": (GET + b"a: b\r\n" * HEADERS + b"\r\n", 431),
    "a header of a megabyte": (GET + b"a: " + b"b" * 2**20 + b"\r\n\r\n", 431),
    "a header's name of a megabyte": (GET + b"a" * 2**20 + b": b\r\n\r\n", 431),
    "headers of a megabyte": (GET + (b"a: " + b"b" * 11_000 + b"\r\n") * 95 + b"\r\n", 431),
    "a megabyte of empty lines": (b"\r\n" * 2**19, 431),
    "a folded line": (GET + b"a: b\r\n c\r\n\r\n", 400),
    "a NUL": (GET + b"a: b\0c\r\n\r\n", 400),
    "a NUL in the address": (b"GET /pi\0ng HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a name with a space": (GET + b"a : b\r\n\r\n", 400),
    "no name": (GET + b": b\r\n\r\n", 400),
    "no colon": (GET + b"ab\r\n\r\n", 400),
    "a lone CR": (GET + b"a: b\rc: d\r\n\r\n", 400),
    "lone LFs": (b"GET /ping HTTP/1.1\nHost: localhost\n\n", 400),
    "no Host": (b"GET /ping HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET /ping HTTP/1.1\r\n" + HOST * 2 + b"\r\n", 400),
    "two lengths": (post("/predictions/sam", b"hello", "Content-Length: 5"), 400),
    "two other lengths": (post("/predictions/sam", b"hello", "Content-Length: 6"), 400),
    "a list of lengths": (post("/predictions/sam", b"", "Content-Length: 5, 5"), 400),
    "length and chunks": (post("/predictions/sam", b"0\r\n\r\n", "Transfer-Encoding: chunked"), 400),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "a signed length": (POST + b"Content-Length: +1\r\n\r\nx", 400),
    "an endless length": (POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "another coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    "chunks twice": (
        POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400
    ),
    "a chunk that is no number": (
        CHUNKED + b"xyz\r\n", 400
    ),
    "trailers of a megabyte": (
        CHUNKED + b"1\r\nx\r\n0\r\na: " + b"b" * 2**20,
        431,
    ),
    "a thousand trailers": (
        CHUNKED + b"0\r\n" + b"a: b\r\n" * 1000, 431
    ),
    "a chunk's extension of a megabyte": (
        CHUNKED + b"1;" + b"a" * 2**20, 431
    ),
    "zeros before a chunk's size": (
        CHUNKED + b"0" * 2**20, 431
    ),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/2 by a name of ours": (b"GET /ping HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "HTTP/0.9": (b"GET /ping\r\n\r\n", 505),
    "HTTP/3.0": (b"GET /ping HTTP/3.0\r\n" + HOST + b"\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(100), 400),
    "an unknown method": (b"HACK /ping HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "CONNECT": (b"CONNECT localhost:22 HTTP/1.1\r\n" + HOST + b"\r\n", 501),
    "a space in the address": (b"GET /pi ng HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "letters in the address": ("GET /äöü HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 400),
    "an address without a path": (b"GET http://localhost HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "a star": (b"GET * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_what_is_no_request_gets_an_error_of_ours_and_the_connection_ends(running: Server, name: str) -> None:
    sent, status = HEADS[name]
    with nobody_waits(running) if len(sent) > 2**19 else contextlib.nullcontext(), running.connect() as line:
        line.sendall(sent)
        reply = read(line)
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert reply.headers["content-type"] == "application/json"
        assert json.loads(reply.body)["error"].keys() == {"code", "message"}
        line.shutdown(socket.SHUT_WR)
        assert closed(line)


def test_what_is_within_the_bounds_is_served(running: Server, fake: FakeTorchServe) -> None:
    full = [f"X-{i}: y" for i in range(HEADERS - 2)]
    assert running.send(post("/predictions/sam", b"", *full)).status == 200
    size = len(post("/predictions/sam")) + len("X: \r\n")
    largest = post("/predictions/sam", b"", "X: " + "y" * (HEAD_BYTES - size - 10))
    for cut in (len(largest), 1000):
        assert running.send(*(largest[i : i + cut] for i in range(0, len(largest), cut))).status == 200
    longest = b"GET /ping?" + b"a" * (REQUEST_LINE - len("/ping?")) + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    assert running.send(longest).status == 200
    body = bytes(range(256)) * 400
    for size in (1, 3, 1000):
        assert running.send(CHUNKED + chunked(body, size)).status == 200
        assert fake.calls[-1].content == body
    assert running.send(CHUNKED + b"1;a=b\r\nx\r\n0\r\nTrailer: a\r\nX-Palimpsest-Command: park\r\n\r\n").status == 200
    assert "trailer" not in fake.calls[-1].headers
    assert running.send(b"GET /ping HTTP/1.0\r\n\r\n").status == 200
    assert running.send(b"GET http://localhost/ping HTTP/1.1\r\n" + HOST + b"\r\n").status == 200


# Pipelining


@pytest.mark.parametrize("size", [1, HEAD_BYTES, 3 * HEAD_BYTES + 1, 400_000])
def test_pipelined_requests_are_answered_in_turn(running: Server, fake: FakeTorchServe, size: int) -> None:
    """Wherever the end of a body and the next head lie in what comes in at once."""
    fake.replies["POST /predictions/p.sam"] = lambda request: httpx.Response(200, content=request.content)
    bodies = [b"%d" % i * size for i in range(10)]
    try:
        with running.connect() as line:
            everything = b"".join(post("/predictions/sam", body) for body in bodies)
            sender = threading.Thread(target=line.sendall, args=(everything,))
            sender.start()
            assert [read(line).body for _ in bodies] == bodies
            sender.join()
    finally:
        del fake.replies["POST /predictions/p.sam"]


def test_a_head_behind_a_large_body_is_bounded_as_any_other(running: Server) -> None:
    with running.connect() as line:
        line.sendall(post("/predictions/sam", bytes(100_000)) + post("/predictions/sam", b"", "X: " + "y" * HEAD_BYTES))
        assert [read(line).status for _ in range(2)] == [200, 431]


@pytest.mark.parametrize("request_", [PING, post("/predictions/sam", b"x"), post("/predictions/sam", b"x", *H2C)])
def test_of_too_many_pipelined_requests_the_first_are_answered(running: Server, request_: bytes) -> None:
    with nobody_waits(running), running.connect() as line:
        sender = threading.Thread(target=_send_what_is_taken, args=(line, request_ * 20_000))
        sender.start()
        replies = [read(line) for _ in range(PIPELINED + 2)]
        assert [reply.status for reply in replies] == [200] * (PIPELINED + 1) + [400]
        assert replies[-1].code == "too_many_requests"
        line.shutdown(socket.SHUT_RDWR)
        sender.join(10)


def test_an_error_waits_for_the_answers_before_it(running: Server) -> None:
    for broken in (
        b"no request\r\n\r\n",
        b"POST /predictions/sam HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx",
    ):
        with running.connect() as line:
            line.sendall(PING + PING + broken)
            assert [read(line).status for _ in range(3)] == [200, 200, 400]
            assert closed(line)


def test_whoever_leaves_amid_pipelined_requests_leaves_no_lease(running: Server) -> None:
    scheduler = running.app.state.services.scheduler
    for _ in range(3):
        with running.connect() as line:
            line.sendall(post("/predictions/sam", b"x" * 1000)[:-10])
        with running.connect() as line:
            line.sendall(post("/predictions/sam", b"x") * 5 + post("/predictions/sam", b"x" * 1000)[:-10])
    door.until(lambda: not running.running.server_state.tasks)
    assert not any(model.leases or model.waiters for model in scheduler.models())


# Time


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((protocol, "HEAD_SECONDS"), (protocol, "IDLE_SECONDS"), (ends, "SILENCE_SECONDS")):
        monkeypatch.setattr(module, name, 0.3)
    monkeypatch.setattr(gateway_door, "SMALL_BODY_SECONDS", 0.3)


@pytest.mark.usefixtures("quick")
def test_silence_and_dawdling_end(running: Server) -> None:
    with running.connect() as silent, running.connect() as slow, running.connect() as idle, running.connect() as empty:
        slow.sendall(b"GET /ping HT")
        idle.sendall(PING)
        assert read(idle).status == 200
        empty.sendall(b"\r\n")
        reply = read(slow)
        assert (reply.status, reply.code) == (408, "request_timeout")
        assert silent.recv(100) == b""
        assert idle.recv(100) == b""
        assert read(empty).status == 408
        assert closed(slow)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("drop", [b"a: b\r\n", b"\r\n"])
def test_a_head_that_trickles_in_gets_no_more_time(running: Server, drop: bytes) -> None:
    with running.connect() as line:
        line.settimeout(0.05)
        line.sendall(b"" if drop == b"\r\n" else b"GET /ping HTTP/1.1\r\n")
        for _ in range(100):
            with contextlib.suppress(TimeoutError):
                assert line.recv(4096).startswith(b"HTTP/1.1 408 ")
                return
            line.sendall(drop)
    pytest.fail("it had five seconds")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_small_body_that_does_not_come_is_no_longer_waited_for(running: Server) -> None:
    for path in ("/models", "/v1/models/sam/pin", "/nowhere", "/ping"):
        reply = running.send(post(path, b"x" * 100, "Content-Type: application/json")[:-50])
        assert (reply.status, reply.code, reply.headers["connection"]) == (408, "body_timeout", "close")


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_reply_that_nobody_reads_does_not_keep_its_connection(
    running: Server, fake: FakeTorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.transfer.STALLED", 0.5)
    fake.replies["POST /predictions/p.sam"] = httpx.Response(200, content=bytes(20 << 20))
    try:
        with running.connect(receive_buffer=4096) as line:
            line.sendall(post("/predictions/sam"))
            door.until(lambda: len(fake.calls) and not running.running.server_state.tasks)
            door.until(lambda: not running.running.server_state.connections)
    finally:
        del fake.replies["POST /predictions/p.sam"]


@pytest.mark.slow
def test_a_slow_reader_gets_all_of_the_last_reply(
    running: Server, fake: FakeTorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "SILENCE_SECONDS", 0.2)
    fake.replies["POST /predictions/p.sam"] = httpx.Response(200, content=bytes(12 << 20))
    try:
        with running.connect(receive_buffer=65536) as line:
            line.sendall(post("/predictions/sam", b"", "Connection: close"))
            size = 0
            while piece := line.recv(65536):
                size += len(piece)
                time.sleep(0.005)  # it is slow
            assert size > 12 << 20
    finally:
        del fake.replies["POST /predictions/p.sam"]


# Bodies that are refused


def _send_what_is_taken(line: socket.socket, data: bytes, times: int = 1) -> None:
    with contextlib.suppress(OSError):
        for _ in range(times):
            line.sendall(data)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/models", "/v1/models/sam/pin", "/predictions/sam", "/v1/images", "/nowhere"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_refused_body_is_not_read_and_its_sender_sees_the_answer(running: Server, path: str, framing: str) -> None:
    """400 MiB of it, by a sender that goes on until it is told."""
    own = psutil.Process()
    before = own.memory_info().rss
    coding = b"Transfer-Encoding: chunked" if framing == "chunked" else b"Content-Length: %d" % (400 << 20)
    head = post(path, b"", "Content-Type: application/octet-stream").replace(b"Content-Length: 0", coding)
    piece = bytes(2**20) if framing == "length" else b"100000\r\n" + bytes(2**20) + b"\r\n"
    with nobody_waits(running), running.connect() as line:
        line.sendall(head)
        sender = threading.Thread(target=_send_what_is_taken, args=(line, piece, 400))
        sender.start()
        reply = read(line)
        assert own.memory_info().rss - before < 100 << 20
        line.shutdown(socket.SHUT_RDWR)
        sender.join(20)
    assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert reply.code == "too_large"


# Connections


@contextlib.contextmanager
def with_room_for(most: int, store: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[Server]:
    monkeypatch.setattr(server, "most_connections", lambda descriptors: most)
    with door.serving(FakeTorchServe(), store, **settings) as running:
        yield running


def test_silent_connections_keep_nobody_out(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with with_room_for(8, store, monkeypatch) as running, contextlib.ExitStack() as stack:
        half = b"GET /ping HTTP/1.1\r\nHo"
        for i in range(400):
            stack.enter_context(running.connect()).sendall(half if i % 2 else b"")
        with nobody_waits(running):
            running.ping()
        assert len(running.running.server_state.connections) <= 8


@pytest.mark.slow
def test_where_all_are_busy_a_new_one_is_told_so(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one address has only its share."""
    unfinished = post("/predictions/sam", b"x" * 100)[:-1]
    with with_room_for(8, store, monkeypatch) as running, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(running.connect()) for _ in range(4)]
        for line in busy:
            line.sendall(unfinished)
        door.until(lambda: len(running.running.server_state.tasks) == 4)
        reply = running.send(PING)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "too_many_connections", "5")
        elsewhere = stack.enter_context(
            socket.create_connection(("127.0.0.1", running.port), 10, source_address=("127.0.0.2", 0))
        )
        elsewhere.sendall(PING)
        assert read(elsewhere).status == 200
        crowd = [stack.enter_context(running.connect()) for _ in range(3 * connections.FAREWELLS)]
        for line in crowd:
            assert closed(line)
        elsewhere.sendall(PING)
        assert read(elsewhere).status == 200
        for line in busy:
            line.sendall(b"x")
            assert read(line).status == 200
        assert running.ping()


class Guest:
    """A connection for the doorkeeper."""

    def __init__(self) -> None:
        self.dropped, self.left = False, 0

    def unsent(self) -> int:
        return self.left

    def drop(self) -> None:
        self.dropped = True


def test_the_longest_wait_ends_first() -> None:
    keeper = Doorkeeper(4)
    guests = [Guest() for _ in range(4)]
    for i, guest in enumerate(guests):
        assert keeper.admit(guest, f"10.0.0.{i}")
    keeper.busy(guests[0])
    keeper.waits(guests[1])
    guests[2].left = 1
    assert keeper.admit(Guest(), "10.0.0.9")
    assert [guest.dropped for guest in guests] == [False, False, False, True]
    assert keeper.admit(Guest(), "10.0.0.10")
    assert guests[1].dropped


@pytest.mark.parametrize(
    ("addresses", "admitted"),
    [
        (["10.0.0.1", "10.0.0.1", "10.0.0.1"], [True, True, False]),
        (["10.0.0.1", "10.0.0.1", "10.0.0.2"], [True, True, True]),
        (["fd00::1", "fd00::2", "fd00::3"], [True, True, False]),
        (["fd00::1", "fd00:0:0:1::1", "fd00:0:0:2::1"], [True, True, True]),
        (["::ffff:10.0.0.1", "::ffff:10.0.0.2", "::ffff:10.0.0.3"], [True, True, True]),
        (["fe80::1%eth0", "fe80::2%eth0", "fe80::3%eth0"], [True, True, False]),
    ],
)
def test_one_household_has_its_share(addresses: list[str], admitted: list[bool]) -> None:
    keeper = Doorkeeper(4)
    guests = [Guest() for _ in addresses]
    for guest, address, expected in zip(guests, addresses, admitted, strict=True):
        assert keeper.admit(guest, address) == expected
        keeper.busy(guest)
    for guest in guests:
        keeper.gone(guest)
    again = Guest()
    assert keeper.admit(again, addresses[0])


def test_connections_stay_below_the_descriptors() -> None:
    for descriptors in (256, 1024, 4096, 65_536, 10**6):
        most = most_connections(descriptors)
        assert most == 1000 or descriptors - 8 < most * 4 + 96 <= descriptors
    assert most_connections(64) == 8


# What leaves


def test_a_stream_to_an_old_client_has_no_chunks(running: Server, fake: FakeTorchServe) -> None:
    headers = ("X-Amzn-SageMaker-Target-Model: sam", "Connection: close")
    request = post("/endpoints/x/invocations-response-stream", b"", *headers)
    new, old = running.send(request), running.send(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert new.headers["transfer-encoding"] == "chunked"
    assert "transfer-encoding" not in old.headers
    assert chunked(old.body, len(old.body)) == new.body


def test_a_head_request_has_no_body_and_the_connection_goes_on(running: Server) -> None:
    with running.connect() as line:
        for path in ("/ping", "/v1/models", "/docs", "/docs/files/swagger-ui.css", "/nowhere", "/metrics"):
            line.sendall(f"HEAD {path} HTTP/1.1\r\nHost: a\r\n\r\nGET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            head, get = read(line, "HEAD"), read(line)
            assert head.status == get.status
            if path not in ("/v1/models", "/nowhere", "/metrics"):
                assert head.headers["content-length"] == get.headers["content-length"]
