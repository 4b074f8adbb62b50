"""Requests that take long: how far each is, and how to end one early.

A job shares twelve bytes with the worker (handlers/jobs.py): two little-endian uint32 that it writes, steps done and
steps in all, and one that we write, whether nobody waits any more.
"""

import asyncio
import mmap
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from serve.engine.torchserve import Answer
from serve.errors import PalimpsestError
from serve.residency.model import Model, State

_LAYOUT = struct.Struct("<III")


class Cancelled(PalimpsestError):
    status, code = 499, "cancelled"


class UnknownJob(PalimpsestError):
    status, code = 404, "job_not_found"


@dataclass(frozen=True)
class Progress:
    """phase: queued, loading or running. model: the one that is waited for or runs. step, steps: of the running one."""

    phase: str
    model: str
    step: int = 0
    steps: int = 0


class Job:
    """One request of a client, which may ask several models in turn. task: ends when the last worker is free again,
    whether or not the client still waits. also: what a reply in JSON has to say besides the last model's answer.
    """

    def __init__(self, file: Path, work: "Callable[[Job], Awaitable[Answer]]") -> None:
        """file: to be made, for the bytes that are shared with the worker."""
        self.id = file.name
        self._file = file
        with file.open("xb+") as shared:
            shared.write(bytes(_LAYOUT.size))
            shared.flush()
            self._memory = mmap.mmap(shared.fileno(), _LAYOUT.size)
        self.also: dict[str, str] = {}
        self._model = ""
        self._running = False
        self.task = asyncio.create_task(self._run(work))

    def ask(self, model: str) -> None:
        """The next model that it waits for."""
        self._model, self._running = model, False
        self._memory[:8] = bytes(8)

    def begin(self) -> None:
        """The model is held: from now on the worker itself ends the work."""
        self._running = True

    def cancel(self) -> None:
        """A running worker stops within a step; what only waits ends at once."""
        if self.task.done():
            return
        self._memory[8:] = (1).to_bytes(4, "little")
        if not self._running:
            self.task.cancel()

    def progress(self, models: list[Model]) -> Progress:
        """models: those that the scheduler has in memory or in use."""
        if self._running:
            step, steps, _ = _LAYOUT.unpack_from(self._memory)
            return Progress("running", self._model, step, steps)
        loading = any(m.state is State.LOADING and m.archive.name == self._model for m in models)
        return Progress("loading" if loading else "queued", self._model)

    async def _run(self, work: "Callable[[Job], Awaitable[Answer]]") -> Answer:
        try:
            return await work(self)
        except asyncio.CancelledError:
            raise Cancelled("the job was cancelled") from None
        finally:
            self._file.unlink(missing_ok=True)


class Jobs:
    """All that run. folder: for the shared bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs: dict[str, Job] = {}

    def open(self) -> None:
        """Makes the folder, or empties it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._folder.iterdir():
            left_over.unlink(missing_ok=True)

    def start(self, work: Callable[[Job], Awaitable[Answer]]) -> Job:
        job = Job(self._folder / uuid4().hex, work)
        self._jobs[job.id] = job
        job.task.add_done_callback(lambda task: self._forget(job))
        return job

    def get(self, name: str) -> Job:
        """Raises UnknownJob."""
        if name not in self._jobs:
            raise UnknownJob(f"there is no job {name[:60]!r}: it has ended, or never was", "job")
        return self._jobs[name]

    def _forget(self, job: Job) -> None:
        del self._jobs[job.id]
        job.task.exception()  # seen, though nobody may wait for it any more
