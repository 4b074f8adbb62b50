"""What a model is asked: a request as its client sent it, or fields of our own making."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol
from uuid import uuid4

from contract import commands
from contract.ticket import File, Ticket
from serve.memory_file import MemoryFile, Part


class Question(Protocol):
    """Handlers of ours get it as a ticket, with a command; those of another make as the body of a request, `length`
    bytes in pieces.
    """

    headers: dict[str, str]
    command: str

    def ticket(self, reply: File, job: File | None) -> Ticket: ...

    @property
    def length(self) -> int: ...

    def pieces(self) -> AsyncIterator[bytes]: ...


class Sent:
    """A client's own request. headers: all of it; names in lower case."""

    command = commands.ANSWER

    def __init__(self, headers: Mapping[str, str], body: MemoryFile) -> None:
        self.headers, self._body = dict(headers), body

    def ticket(self, reply: File, job: File | None) -> Ticket:
        kind, encoding = (self.headers.get(f"content-{name}", "") for name in ("type", "encoding"))
        return Ticket(reply, job, self._body.file, kind, encoding)

    @property
    def length(self) -> int:
        return self._body.size

    async def pieces(self) -> AsyncIterator[bytes]:
        for piece in self._body.pieces():
            yield piece


class Form:
    """Fields by name; as a body multipart/form-data. accept: the kind of reply that is wanted.

    keep: whether the whole result is wanted as well. command: of contract.commands. Both reach handlers of ours alone.
    """

    def __init__(
        self, fields: Mapping[str, Any], accept: str, keep: bool = False, command: str = commands.ANSWER
    ) -> None:
        """fields: texts, parts of files, and JSON values."""
        self._fields, self._keep, self.command = fields, keep, command
        self._boundary = uuid4().hex
        self.headers = {"content-type": f"multipart/form-data; boundary={self._boundary}", "accept": accept}

    def ticket(self, reply: File, job: File | None) -> Ticket:
        parts = {name: value.named for name, value in self._fields.items() if isinstance(value, Part)}
        fields = {name: value for name, value in self._fields.items() if name not in parts}
        return Ticket(reply, job, fields=fields, parts=parts, keep=self._keep)

    @property
    def length(self) -> int:
        return sum(each.size if isinstance(each, Part) else len(each) for each in self._segments())

    async def pieces(self) -> AsyncIterator[bytes]:
        for segment in self._segments():
            for piece in segment.pieces() if isinstance(segment, Part) else [segment]:
                yield piece
                await asyncio.sleep(0)

    def _segments(self) -> Iterator[bytes | Part]:
        for name, value in self._fields.items():
            head = f'--{self._boundary}\r\nContent-Disposition: form-data; name="{name}"'
            if isinstance(value, Part) and not value.text:
                head += '; filename="file"\r\nContent-Type: application/octet-stream'
            yield f"{head}\r\n\r\n".encode()
            yield value if isinstance(value, Part) else _text(value).encode()
            yield b"\r\n"
        yield f"--{self._boundary}--\r\n".encode()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
