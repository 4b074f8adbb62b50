"""A request whose bytes lie in the gateway's memory: ticket -> fields; reply -> the gateway's memory."""

import mmap
import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from contract.bodies import Buffer, Slice, read_body, text_of
from contract.errors import BodyError
from contract.ticket import File, Part, Span, Ticket, Written
from handlers.requests import jobs
from handlers.requests.errors import BadRequest
from handlers.requests.payload import Upload
from handlers.requests.reply import Encoded, is_large
from handlers.requests.timings import Timings


class Unusable(Exception):
    """The ticket is none, or what it names can't be opened."""


class Opened(ExitStack):
    """A ticket with its files open; leaving it closes them.

    job: where to tell the progress. keep: whether the whole result is wanted as well.
    """

    def __init__(self, text: Any) -> None:
        """Raises Unusable."""
        super().__init__()
        try:
            self._ticket = Ticket.from_json(text)
            self._reply = self._open(self._ticket.reply, writable=True)
            files = {part.file for part in self._ticket.parts.values()}
            if self._ticket.body is not None:
                files.add(self._ticket.body)
            self._files = {file: self._open(file) for file in files}
            self.keep = self._ticket.keep
            self.job = None if self._ticket.job is None else jobs.attach(self._open(self._ticket.job, writable=True))
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.close()
            raise Unusable(f"the request cannot be read from the gateway's memory ({type(error).__name__})") from None

    def fields(self) -> dict[str, Any]:
        """Reads the request's fields: JSON values, texts, and files as bytes. Raises BadRequest."""
        if self._ticket.body is None:
            return {**self._ticket.fields, **{name: self._part(part) for name, part in self._ticket.parts.items()}}
        descriptor = self._files[self._ticket.body]
        size = os.fstat(descriptor).st_size
        # Closed when nothing refers to it any more, such as the frames of an error.
        body: Buffer = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) if size else b""
        try:
            fields = read_body(self._ticket.content_type, self._ticket.content_encoding, body)
            return {name: _value(descriptor, body, name, value) for name, value in fields.items()}
        except BodyError as error:
            raise BadRequest(error.message, error.field, status=error.status) from None

    def _part(self, part: Part) -> bytes | str | Upload:
        descriptor = self._files[part.file]
        if part.content:
            return Upload(part.content, lambda: os.pread(descriptor, part.stop - part.start, part.start))
        return _copy(descriptor, part.start, part.stop, part.text)

    def write(self, reply: Encoded, timings: Timings) -> Written:
        """Puts the reply where the gateway looks for it."""
        written: dict[int, Span] = {}  # the first variant is the picture itself, which may be what is kept, too
        if reply.fields is None:
            end = self._span(reply.picture, written).stop
            kept = self._spans(reply.kept, written)
            return Written(reply.content_type, reply.headers, timings=timings.seconds, end=end, kept=kept)
        small = {name: value for name, value in reply.fields.items() if not is_large(value)}
        spans = self._spans({name: value for name, value in reply.fields.items() if name not in small}, written)
        kept = self._spans(reply.kept, written)
        return Written(reply.content_type, reply.headers, small, spans, timings.seconds, kept=kept)

    def _spans(
        self, files: Mapping[str, bytes | list[bytes]], written: dict[int, Span]
    ) -> dict[str, Span | list[Span]]:
        return {
            name: [self._span(each, written) for each in value]
            if isinstance(value, list)
            else self._span(value, written)
            for name, value in files.items()
        }

    def _span(self, data: bytes, written: dict[int, Span]) -> Span:
        if id(data) not in written:
            start = os.lseek(self._reply, 0, os.SEEK_CUR)
            self._write(data)
            written[id(data)] = Span(start, start + len(data))
        return written[id(data)]

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._reply, view) :]

    def _open(self, file: File, writable: bool = False) -> int:
        descriptor = file.open(writable)
        self.callback(os.close, descriptor)
        return descriptor


def _copy(descriptor: int, start: int, stop: int, text: bool) -> bytes | str:
    data = os.pread(descriptor, stop - start, start)
    return data.decode(errors="replace") if text else data


def _value(descriptor: int, body: Buffer, name: str, value: Any) -> Any:
    if not isinstance(value, Slice):
        return value
    if value.escaped:
        return text_of(body, value, name, len(body))
    return _copy(descriptor, value.start, value.stop, value.text)
