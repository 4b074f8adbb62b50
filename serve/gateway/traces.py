"""Traces in OpenTelemetry's form: request → queue → load, worker → its stages; sent in the background, or lost.

The SDK is imported only where its own variables name a collector; they also say how much is sampled, and how it is
sent. A request's spans are made when it is over, but for the outermost, which workers are told of.
"""

import logging
import os
import re
import threading
import time
from typing import TYPE_CHECKING

from serve import __version__
from serve.logs.record import Asked, Headers, Record

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

COLLECTORS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
QUEUE = 2048  # spans that wait to be sent; those beyond are lost
SEND_SECONDS = 5.0  # for the collector to take some
END_SECONDS = 3.0  # for the last ones, at the server's end
COMPLAIN_EVERY = 60.0

_PARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
# In the order in which a worker goes through them; where each began it does not say.
_IN_WORKER = ("decode", "recall", "embed", "mask", "model", "encode")


def of_environment() -> "Traces | None":
    """None where no collector is named, or OTEL_SDK_DISABLED says so."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, COLLECTORS)):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    complaints = logging.getLogger("opentelemetry")
    complaints.propagate, complaints.handlers = False, [_Complaints()]
    return Traces(OTLPSpanExporter(timeout=SEND_SECONDS))


class Traces:
    """exporter: sends spans. Nothing here waits for it but close."""

    def __init__(self, exporter: "SpanExporter") -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._api = trace
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "palimpsest")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._processor = BatchSpanProcessor(
            exporter,
            max_queue_size=QUEUE,
            max_export_batch_size=min(512, QUEUE),
            export_timeout_millis=1000 * SEND_SECONDS,
        )
        self._provider.add_span_processor(self._processor)
        self._tracer = self._provider.get_tracer("palimpsest", __version__)
        # What the spans' times are told by is time.perf_counter().
        self._epoch = time.time_ns() - time.perf_counter_ns()

    def begin(self, request: Record, headers: Headers) -> "Span":
        """headers: of the request, which may say of whose trace it is a part; names in lower case."""
        api = self._api
        parents = [match for name, value in headers if name == b"traceparent" and (match := _PARENT.fullmatch(value))]
        context = None
        if len(parents) == 1:
            trace_id, span_id, flags = (int(part, 16) for part in parents[0].groups())
            above = api.SpanContext(trace_id, span_id, is_remote=True, trace_flags=api.TraceFlags(flags))
            context = api.set_span_in_context(api.NonRecordingSpan(above)) if above.is_valid else None
        span = self._tracer.start_span(request.method, context, api.SpanKind.SERVER, start_time=self._at(request.began))
        own = span.get_span_context()
        request.traceparent = f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"
        return span

    def end(self, span: "Span", request: Record) -> None:
        if span.is_recording():
            told: dict[str, str | int] = {
                "palimpsest.request_id": request.id,
                "http.request.method": request.method,
                "http.route": request.route,
                "http.response.status_code": request.status,
                "palimpsest.outcome": request.outcome,
                "error.type": request.code,
            }
            span.set_attributes({name: value for name, value in told.items() if value})
            span.update_name(f"{request.method} {request.route}".strip())
            if request.status >= 500:
                span.set_status(self._api.StatusCode.ERROR)
            context = self._api.set_span_in_context(span)
            for asked in request.asked:
                self._add(asked, context)
        span.end(self._at(request.ended))

    def close(self) -> None:
        """Sends what is left, for END_SECONDS at most."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(END_SECONDS)

    def _add(self, asked: Asked, context: "Context") -> None:
        entered = asked.ended if asked.entered is None else asked.entered
        queue = self._span("queue", asked.model, asked.began, entered, context)
        if asked.came is not None:
            began, ended = (min(max(when, asked.began), entered) for when in asked.came)
            self._span("load", asked.model, began, ended, queue)
        if asked.entered is None:
            return
        worker = self._span("worker", asked.model, entered, asked.ended, context)
        stages = [(name, asked.worker[name]) for name in _IN_WORKER if name in asked.worker]
        began = max(entered, asked.ended - sum(seconds for _, seconds in stages))
        for name, seconds in stages:
            self._span(name, asked.model, began, min(began + seconds, asked.ended), worker)
            began = min(began + seconds, asked.ended)

    def _span(self, name: str, model: str, began: float, ended: float, context: "Context") -> "Context":
        """Makes a span that is over; returns the context of those inside of it."""
        span = self._tracer.start_span(
            name,
            context,
            attributes={"palimpsest.model": model},
            start_time=self._at(began),
        )
        span.end(self._at(ended))
        return self._api.set_span_in_context(span)

    def _at(self, when: float) -> int:
        return self._epoch + int(when * 1e9)


class _Complaints(logging.Handler):
    """The SDK complains of each batch that it cannot send, in its own words: once a minute, in ours, is enough."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._last = -COMPLAIN_EVERY

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() > self._last + COMPLAIN_EVERY:
            self._last = time.monotonic()
            logger.warning("traces cannot be sent to the collector, and are lost")
