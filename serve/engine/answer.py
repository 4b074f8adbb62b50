"""What a handler replied: a body in memory, or fields of which the large ones are."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from contract.ticket import Span, Written
from serve.errors import EngineUnavailable
from serve.memory_file import MemoryFile, Part


@dataclass(frozen=True)
class Answer:
    """Header names are in lower case. file: closed by whoever has the answer. timings: as contract.timings has them.

    fields: of a reply in JSON; values are of JSON, or a Part or a list of Parts for what leaves as base64. Where there
    are none the reply's body is the file, as far as `end` where something follows. kept: what is to be kept, as parts
    of the file, by the names under which the client is to be told its ids.
    """

    status: int
    headers: dict[str, str]
    file: MemoryFile
    fields: dict[str, Any] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    end: int | None = None
    kept: dict[str, Part | list[Part]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Bytes of the body."""
        if self.fields is None:
            return self.file.size if self.end is None else self.end
        return json_length(self.fields)

    def pieces(self) -> Iterator[bytes]:
        """The body; none is longer than 256 KiB and what the small fields take."""
        return self.file.pieces(0, self.end) if self.fields is None else json_pieces(self.fields)

    def beginning(self, size: int) -> str:
        """Returns the first bytes of an error's body as text."""
        return self.file.read(0, min(size, self.file.size)).decode(errors="replace")

    def close(self) -> None:
        self.file.close()


def written(file: MemoryFile, told: bytes) -> Answer:
    """The answer that a worker wrote into the file and told about in JSON."""
    try:
        written = Written.from_json(told)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise EngineUnavailable("the worker's answer cannot be read: try again") from None
    headers = {"content-type": written.content_type} | {name.lower(): text for name, text in written.headers.items()}
    large, kept = _parts(file, written.spans), _parts(file, written.kept)
    fields = None if written.fields is None else {**large, **written.fields}
    return Answer(200, headers, file, fields, dict(written.timings), written.end, kept)


def _parts(file: MemoryFile, by_name: Mapping[str, Span | list[Span]]) -> dict[str, Part | list[Part]]:
    return {
        name: [Part(file, *span) for span in spans] if isinstance(spans, list) else Part(file, *spans)
        for name, spans in by_name.items()
    }


def json_length(fields: dict[str, Any]) -> int:
    return sum(each.text_size if isinstance(each, Part) else len(each) for each in _segments(fields))


def json_pieces(fields: dict[str, Any]) -> Iterator[bytes]:
    """A JSON object, in which a Part stands for its base64, wherever it is; none is ever whole in memory."""
    for segment in _segments(fields):
        if isinstance(segment, Part):
            yield from segment.text_pieces()
        else:
            yield segment


def _segments(value: Any) -> Iterator[bytes | Part]:
    """A JSON value's text, with each Part in quotes."""
    match value:
        case Part():
            yield b'"'
            yield value
            yield b'"'
        case dict():
            yield b"{"
            for number, (name, item) in enumerate(value.items()):
                yield f"{', ' if number else ''}{json.dumps(name)}: ".encode()
                yield from _segments(item)
            yield b"}"
        case [Part() | dict(), *_]:
            yield b"["
            for number, item in enumerate(value):
                yield b", " if number else b""
                yield from _segments(item)
            yield b"]"
        case _:
            yield json.dumps(value).encode()
