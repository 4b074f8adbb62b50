"""A store on the web for tests: an HTTP server on loopback that can be as bad as real ones are."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from serve.store.remote import INDEX


class WebStore:
    """The archives of `files` by path, and their index, which publish() writes. asked: path and Range of each request.

    url: its address. ranges: whether it knows them. drop_after: bytes of an archive after which the line drops, for
    each time that it does. stall: whether it then says nothing instead, until the store is closed. excess: bytes that
    are sent after an archive's end. status: what it answers, if not 0, in place of everything.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.ranges, self.stall, self.status, self.excess = True, False, 0, 0
        self.drop_after: list[int] = []
        self.queries: set[str] = set()
        self.credentials: set[str] = set()
        self.closing = threading.Event()
        self.stalled = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/store"

    def put(self, name: str, content: bytes) -> None:
        self.files[name] = content
        self.publish()

    def publish(self, **more: dict[str, Any]) -> None:
        """more: what the index says instead of an archive, by name."""
        entries = {
            name: {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in self.files.items()
            if name != INDEX
        }
        for name, entry in more.items():
            entries[name] = entries.get(name, {}) | entry
        self.files[INDEX] = json.dumps({"archives": list(entries.values())}).encode()

    def ranges_of(self, name: str) -> list[str]:
        return [asked for path, asked in self.asked if path == name]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: WebStore
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        store, address = self.store, urlsplit(self.path)
        name = address.path.removeprefix("/store/")
        wanted = self.headers.get("Range", "")
        store.asked.append((name, wanted))
        store.queries.add(address.query)
        store.credentials.add(self.headers.get("Authorization", ""))
        content = store.files.get(name)
        if store.status or content is None:
            self._answer(store.status or 404, b"")
        elif name == INDEX:
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            same = self.headers.get("If-None-Match") == tag
            self._answer(304 if same else 200, b"" if same else content, ETag=tag)
        else:
            self._send(content, int(wanted[6:-1]) if wanted and store.ranges else 0, bool(wanted) and store.ranges)

    def _send(self, content: bytes, start: int, partial: bool) -> None:
        store, body = self.store, content[start:] + bytes(self.store.excess)
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if store.drop_after:
            self.wfile.write(body[: store.drop_after.pop(0)])
            self.wfile.flush()
            if store.stall:
                store.stalled.set()
                store.closing.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
