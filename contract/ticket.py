"""What the gateway gives a worker instead of bytes: where they lie in memory, and where to write the answer.

A request's body, its progress and its reply are files in the gateway's memory (memfd_create). They are in no folder;
the worker, which runs as the same user, opens them below /proc/<gateway>/fd. So pictures never pass through TorchServe.
"""

import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class File(NamedTuple):
    """A memory file of the gateway. name: its own, so that a number that was given to another file is noticed."""

    path: str
    name: str

    def open(self, writable: bool = False) -> int:
        """Returns a descriptor, for the caller to close; raises OSError where the file is gone."""
        descriptor = os.open(self.path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        if os.readlink(f"/proc/self/fd/{descriptor}") != f"/memfd:{self.name} (deleted)":
            os.close(descriptor)
            raise FileNotFoundError(f"{self.path} is another file by now")
        return descriptor


class Part(NamedTuple):
    """Bytes start to stop of a file. text: they are text, most often base64; else a picture's own, or either.

    content: the name that contract.pictures gives these bytes, of an upload. Who knows them by it need not read them.
    """

    file: File
    start: int
    stop: int
    text: bool = False
    content: str = ""


class Ticket(NamedTuple):
    """One request. reply: to be written. job: see contract/progress.py.

    body, content_type, content_encoding: the request as the client sent it. Else fields, and parts: the large ones.
    keep: whether the reply's file is to hold the whole result as well, exactly.
    """

    reply: File
    job: File | None = None
    body: File | None = None
    content_type: str = ""
    content_encoding: str = ""
    fields: Mapping[str, Any] = MappingProxyType({})
    parts: Mapping[str, Part] = MappingProxyType({})
    keep: bool = False

    def to_json(self) -> bytes:
        return json.dumps(self._asdict(), default=dict).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Ticket":
        """Raises ValueError, KeyError or TypeError where it is none."""
        values = json.loads(text)
        job, body, parts = values["job"], values["body"], values["parts"]
        return cls(
            File(*values["reply"]),
            job and File(*job),
            body and File(*body),
            values["content_type"],
            values["content_encoding"],
            values["fields"],
            {name: Part(File(*file), *rest) for name, (file, *rest) in parts.items()},
            values["keep"],
        )


class Span(NamedTuple):
    """Bytes start to stop of the reply's file."""

    start: int
    stop: int


class Written(NamedTuple):
    """What a worker has written into the reply's file. headers: further ones of the reply.

    fields: of a reply in JSON, the small ones; spans: its large ones, by name, which leave as base64. Without fields
    the reply's body is the file, as far as `end` where something follows. kept: whole results, by the names under which
    the client is to be told their ids. timings: as contract.timings has them.
    """

    content_type: str
    headers: Mapping[str, str] = MappingProxyType({})
    fields: Mapping[str, Any] | None = None
    spans: Mapping[str, Span | list[Span]] = MappingProxyType({})
    timings: Mapping[str, float] = MappingProxyType({})
    end: int | None = None
    kept: Mapping[str, Span | list[Span]] = MappingProxyType({})

    def to_json(self) -> bytes:
        return json.dumps(self._asdict(), default=dict).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Written":
        """Raises ValueError, KeyError or TypeError where it is none."""
        values = json.loads(text)
        spans, kept = ({n: _spans(each) for n, each in values[name].items()} for name in ("spans", "kept"))
        told = values["content_type"], values["headers"], values["fields"]
        return cls(*told, spans, values["timings"], values["end"], kept)


def _spans(value: list[Any]) -> Span | list[Span]:
    return [Span(*each) for each in value] if value and isinstance(value[0], list) else Span(*value)
