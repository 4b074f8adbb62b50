"""A collector of traces in tests: takes what OTLP sends over HTTP, and reads it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """bodies: as they came. status: of its answers."""

    def __init__(self, url: str) -> None:
        self.url, self.bodies, self.status = url, list[bytes](), 200

    def spans(self) -> list[Any]:
        parsed = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [
            span
            for each in parsed
            for resource in each.resource_spans
            for s in resource.scope_spans
            for span in s.spans
        ]

    def by_name(self) -> dict[str, Any]:
        found = self.spans()
        named = {span.name: span for span in found}
        assert len(named) == len(found)
        return named

    def as_text(self) -> str:
        return "".join(str(MessageToDict(ExportTraceServiceRequest.FromString(body))) for body in self.bodies)


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: each.value.string_value or each.value.int_value for each in span.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(collector.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
