"""What talking to the server is made of, without any I/O.

The core's functions (core.py) are generators of steps, which Client carries out one after the other, and AsyncClient
with `await`: each step's result is sent into the generator, and a PalimpsestError that it ends with is thrown there.
"""

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from palimpsest.events import OnProgress

T = TypeVar("T")

Part = tuple[str, tuple[str | None, bytes] | tuple[str | None, bytes, str]]
"""Of a multipart body, as httpx has it."""


class Call(NamedTuple):
    """Asks for a reply in one piece; results in its bytes.

    parts: of the body. query: of the address. timeout: seconds of silence, where the client's own are too few.
    """

    method: str
    path: str
    parts: Sequence[Part] = ()
    query: Mapping[str, str] = MappingProxyType({})
    timeout: float | None = None

    def request(self) -> dict[str, Any]:
        """The arguments of httpx."""
        more: dict[str, Any] = {"files": list(self.parts)} if self.parts else {}
        if self.timeout is not None:
            more["timeout"] = self.timeout
        return {"method": self.method, "url": self.path, "params": dict(self.query), **more}


class Job(NamedTuple):
    """Has a model work; results in the fields of its reply. on_progress: called at every change."""

    path: str
    parts: Sequence[Part]
    on_progress: OnProgress | None = None

    def request(self) -> dict[str, Any]:
        """The arguments of httpx."""
        headers = {"accept": "text/event-stream"}
        # For who shares requests out among many servers: in the body it may lie behind megabytes.
        if model := next((part[1] for name, part in self.parts if name == "model"), b""):
            headers["x-palimpsest-model"] = model.decode("ascii", "replace")
        return {"method": "POST", "url": self.path, "files": list(self.parts), "headers": headers}


class Work(NamedTuple):
    """Computes, reads or writes something that may take a while; results in what it returns."""

    do: Callable[[], Any]


class Wait(NamedTuple):
    """Results in nothing, later."""

    seconds: float


Step = Call | Job | Work | Wait
Steps = Generator[Step, Any, T]


def file(name: str, data: bytes) -> Part:
    """A field that is a file."""
    return name, (name, data, "application/octet-stream")


def value(name: str, said: Any) -> Part:
    """A field that is a text, or else what JSON makes of it; arrays of numpy's are lists."""
    text = said if isinstance(said, str) else json.dumps(said, default=lambda array: array.tolist())
    return name, (None, text.encode())
