"""The real server on a loopback port, in a thread, in front of a TorchServe that is a function; and raw connections."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fakes import FakeTorchServe, application
from fastapi import FastAPI
from serving import free_port

from serve.gateway import server as servers
from serve.settings import Settings


class Reply(NamedTuple):
    """headers: by name in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


class Server:
    """What runs in the thread. `app` may be looked into from the test's thread."""

    def __init__(self, app: FastAPI, port: int) -> None:
        self.app, self.port = app, port
        self.running: servers.Server | None = None

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        line = socket.socket()
        if receive_buffer:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        line.settimeout(10)
        line.connect(("127.0.0.1", self.port))
        return line

    def send(self, *pieces: bytes, method: str = "GET") -> Reply:
        """Sends them one by one, then reads one reply."""
        with self.connect() as line:
            for piece in pieces:
                line.sendall(piece)
            return read(line, method)

    def ping(self) -> float:
        """Returns the seconds that it took."""
        began = time.perf_counter()
        assert self.send(PING).status == 200
        return time.perf_counter() - began


PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"


def post(path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def read(line: socket.socket, method: str = "GET") -> Reply:
    """The next reply on the connection; raises ConnectionError where it ends before that."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = line.recv(1)
        if not byte:
            raise ConnectionError(f"closed after {head!r}")
        head += byte
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in rest if each)}
    status = int(first.split()[1])
    if status == 100:
        return read(line, method)
    if method == "HEAD" or status == 204:
        return Reply(status, headers, b"")
    body = b""
    if "content-length" in headers:
        while missing := int(headers["content-length"]) - len(body):
            piece = line.recv(min(missing, 65536))
            if not piece:
                raise ConnectionError(f"closed with {missing} bytes missing")
            body += piece
    else:
        while piece := line.recv(65536):
            body += piece
    return Reply(status, headers, body)


def closed(line: socket.socket) -> bool:
    """Waits for the other side to end it."""
    with contextlib.suppress(ConnectionError):
        while line.recv(65536):
            continue
    return True


@contextlib.contextmanager
def serving(fake: FakeTorchServe, store: Path, app: FastAPI | None = None, **settings: Any) -> Iterator[Server]:
    """settings: fields of Settings."""
    port = free_port()
    app = app or application(fake, store, **settings)
    server = Server(app, port)
    ready = threading.Event()
    own = Settings(store=store, state=store / ".state", port=port, **settings)

    def run() -> None:
        server.running = servers.Server(app, own, ready.set)
        server.running.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(60)
        yield server
    finally:
        assert server.running is not None
        server.running.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)
