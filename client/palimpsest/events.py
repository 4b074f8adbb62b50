"""A job's stream of server-sent events, read as it comes: no I/O here."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from palimpsest.errors import PalimpsestError, Unreachable, error_in_event


class Progress(NamedTuple):
    """How far a job is. phase: queued, loading or running. step of steps are done; 0 of 0: the model has not said yet.
    While it loads they are the MiB of an archive that its server fetches from elsewhere.

    model: the archive that is waited for or runs; several in turn, where points are to become a mask first.

    Example: `client.erase(image, mask=mask, progress=lambda told: print(told.phase, told.step, "of", told.steps))`.
    """

    phase: str
    step: int
    steps: int
    model: str


OnProgress = Callable[[Progress], None]


class JobReader:
    """job: its id on the server, once that was told. error: what the job ended with, if it failed."""

    def __init__(self, on_progress: OnProgress | None = None) -> None:
        self.job: str | None = None
        self.error: PalimpsestError | None = None
        self._on_progress = on_progress
        self._fields: dict[str, Any] | None = None
        self._pieces: list[bytes] = []

    @property
    def runs(self) -> bool:
        """Whether there is a job that has not told its end."""
        return self.job is not None and self._fields is None and self.error is None

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes of the stream; calls on_progress at every change. Raises what that raises."""
        for name, data in self._events(piece):
            if name == "job":
                self.job = data["job"]
            elif name == "progress" and self._on_progress:
                self._on_progress(Progress(data["phase"], data["step"], data["steps"], data["model"]))
            elif name == "done":
                self._fields = data
            elif name in ("error", "cancelled"):
                self.error = error_in_event(data)

    def result(self) -> dict[str, Any]:
        """The fields of the reply, at the end of the stream. Raises what the job ended with, or Unreachable."""
        if self.error:
            raise self.error
        if self._fields is None:
            raise Unreachable("the server went away amid the work")
        return self._fields

    def _events(self, piece: bytes) -> Iterator[tuple[str, Any]]:
        """Those that end in this piece; a large one is put together once."""
        self._pieces.append(piece)
        if b"\n" not in piece:
            return
        *blocks, rest = b"".join(self._pieces).split(b"\n\n")
        self._pieces = [rest]
        for block in blocks:
            head, _, data = block.partition(b"\ndata: ")
            if head.startswith(b"event: "):  # else a comment, that the server is still there
                yield head.removeprefix(b"event: ").decode(), json.loads(data)
