"""Traces, as a collector gets them; and that they cost nothing where there is none, or where it is dead."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from collecting import Collector, attributes, collecting
from fakes import FakeTorchServe, gateway, make_store
from logged import lines, logged, requests

from serve.engine.supervisor import inherited
from serve.gateway import traces

TRACE, ABOVE = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = {"traceparent": f"00-{TRACE}-{ABOVE}-01"}
OURS = {"written": {"decode": 0.002, "model": 0.005, "encode": 0.001}}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collecting() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, "sam", "lama", "sd", "ours", ours=True)


def written(request: httpx.Request) -> httpx.Response:
    """What a worker of ours tells of the answer that it wrote."""
    time.sleep(0.02)
    timings = {"decode": 0.002, "model": 0.005, "encode": 0.001}
    told = {
        "content_type": "image/png",
        "headers": {},
        "fields": None,
        "spans": {},
        "timings": timings,
        "end": 0,
        "kept": {},
    }
    return httpx.Response(200, content=json.dumps(told))


def inside(span: Any, outer: Any) -> bool:
    return (
        span.parent_span_id == outer.span_id
        and outer.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        and span.end_time_unix_nano <= outer.end_time_unix_nano
    )


def test_a_request_is_a_trace_from_the_gateway_to_the_workers_stages(
    collector: Collector, fake: FakeTorchServe, store: Path
) -> None:
    fake.replies["POST /predictions/p.sam"] = written
    with logged(store / ".state"), gateway(fake, store) as client:
        client.post("/predictions/sam?q=SECRET", headers=PARENT | {"x-request-id": "mine", "tracestate": "a=SECRET"})
    spans = collector.by_name()
    root, queue, worker = spans["POST /predictions/{model:path}"], spans["queue"], spans["worker"]
    assert spans.keys() == {root.name, "queue", "load", "worker", "decode", "model", "encode"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert root.parent_span_id.hex() == ABOVE
    assert inside(queue, root)
    assert inside(spans["load"], queue)
    assert inside(worker, root)
    assert all(inside(spans[name], worker) for name in ("decode", "model", "encode"))
    assert spans["decode"].end_time_unix_nano <= spans["model"].start_time_unix_nano
    assert attributes(root) == {
        "palimpsest.request_id": "mine", "http.request.method": "POST", "http.route": "/predictions/{model:path}",
        "http.response.status_code": 200, "palimpsest.outcome": "ok",
    }  # fmt: skip
    assert attributes(worker) == {"palimpsest.model": "sam"}
    [asked] = [call for call in fake.calls if "/predictions/" in call.url.path]
    assert asked.headers["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    assert requests(store / ".state")[0]["trace"] == TRACE
    assert "SECRET" not in collector.as_text() + str(asked.headers)


def test_who_waits_for_no_load_has_none_and_errors_say_what_they_are(
    collector: Collector, fake: FakeTorchServe, store: Path
) -> None:
    fake.replies["POST /predictions/p.sam"] = written
    with gateway(fake, store) as client:
        client.post("/predictions/sam")
        fake.replies["POST /predictions/p.sam"] = httpx.Response(
            500, json={"error": {"code": "x", "message": "SECRET"}}
        )
        client.post("/predictions/sam")
    spans = collector.spans()
    assert [span.name for span in spans].count("load") == 1
    failed = [span for span in spans if attributes(span).get("http.response.status_code") == 500]
    assert [(attributes(span)["error.type"], span.status.code) for span in failed] == [("x", 2)]
    assert len({span.trace_id for span in spans}) == 2
    assert "SECRET" not in collector.as_text()


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", f"00-{TRACE}-{ABOVE}-01x")], [("traceparent", f"00-{'0' * 32}-{ABOVE}-01")],
        [("traceparent", f"ff-{TRACE}-{ABOVE}-01")], [("traceparent", f"00-{TRACE.upper()}-{ABOVE}-01")],
        [("traceparent", f"00-{TRACE}-{ABOVE}-01"), ("traceparent", f"00-{TRACE}-{ABOVE}-01")],
        [("traceparent", "x" * 8000)],
    ],
)  # fmt: skip
def test_what_is_no_parent_begins_a_trace_of_its_own(
    collector: Collector, fake: FakeTorchServe, store: Path, headers: list[tuple[str, str]]
) -> None:
    with gateway(fake, store) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200
    [span] = collector.spans()
    assert (span.parent_span_id, span.trace_id.hex() == TRACE) == (b"", False)


def test_a_client_that_samples_nothing_is_not_sent(collector: Collector, fake: FakeTorchServe, store: Path) -> None:
    with gateway(fake, store) as client:
        client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{ABOVE}-00"})
    assert collector.bodies == []


@pytest.mark.slow
def test_without_a_collector_nothing_is_imported() -> None:
    code = """
import os, sys
from serve.gateway import app, traces
assert traces.of_environment() is None
os.environ |= {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
assert traces.of_environment() is None
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "google."))])
"""
    ran = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


class Dead:
    """Listens, and never answers: worse than one that is not there."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"


def test_a_dead_collector_costs_nothing_visible_and_holds_no_end_up(
    fake: FakeTorchServe, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = Dead()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", dead.url)
    monkeypatch.setattr(traces, "QUEUE", 20)
    monkeypatch.setattr(traces, "END_SECONDS", 0.2)
    before = set(threading.enumerate())
    with logged(store / ".state"), gateway(fake, store) as client:
        for _ in range(50):
            assert client.get("/ping").status_code == 200
        processor = client.app.state.watcher._traces._processor
        assert len(processor._batch_processor._queue) <= 20
        began = time.perf_counter()
    assert time.perf_counter() - began < traces.SEND_SECONDS
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    assert not [line for line in lines(store / ".state") if line["level"] == "error"]
    dead.listener.close()


def test_a_collector_that_refuses_is_complained_of_once_and_without_its_address(
    collector: Collector, fake: FakeTorchServe, store: Path
) -> None:
    collector.status = 400
    with logged(store / ".state"), gateway(fake, store) as client:
        for _ in range(3):
            client.get("/ping")
            client.app.state.watcher._traces._processor.force_flush()
    assert len(collector.bodies) == 3
    told = [(line["source"], line["text"]) for line in lines(store / ".state")]
    assert told == [("serve.gateway.traces", "traces cannot be sent to the collector, and are lost")]


def test_what_the_collector_is_told_as_a_secret_goes_to_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=SECRET")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=SECRET")
    assert "SECRET" not in str(inherited())
