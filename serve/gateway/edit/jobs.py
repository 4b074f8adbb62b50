"""Requests that take long: how far each is, and how to end one early.

A job shares a few bytes with the worker (contract/progress.py).
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from contract import progress
from contract.progress import Preview
from contract.ticket import File
from serve.engine.answer import Answer
from serve.errors import PalimpsestError
from serve.gateway.peers import marked
from serve.memory_file import MemoryFile
from serve.residency.model import STARTING, Model

Pointer = tuple[str, str]
"""A client's address, and what it calls its pointer."""
Fetched = Callable[[str], tuple[int, int]]


class Cancelled(PalimpsestError):
    status, code = 499, "cancelled"


class Superseded(PalimpsestError):
    status, code = 409, "superseded"


class UnknownJob(PalimpsestError):
    status, code = 404, "job_not_found"


@dataclass(frozen=True)
class JobProgress:
    """phase: queued, loading or running. model: the one that is waited for or runs. step, steps: of the running one; of
    one that is fetched from a store on a URL the MiB that are here, and all of them."""

    phase: str
    model: str
    step: int = 0
    steps: int = 0


class Job:
    """One request of a client, which may ask several models in turn. task: ends when the last worker is free again,
    whether or not the client still waits. also: what a reply in JSON has to say besides the last model's answer.
    timings: as contract.timings has them, of all answers so far.

    Whoever starts one calls close() once the answer has left, or nobody waits for it any more.
    """

    def __init__(
        self,
        work: "Callable[[Job], Coroutine[Any, Any, Answer]]",
        files: ExitStack,
        previews: bool = False,
        box: str = "",
        fetched: Fetched = lambda model: (0, 0),
    ) -> None:
        """files: those that the work needs, and makes; the job closes them. previews: whether anybody looks at them.
        box: where it runs. fetched: told a model's name, says how far it is fetched.
        """
        self.id, self._fetched = marked(uuid4().hex, box), fetched
        self.files, self._closed = files, False
        self._shared = files.enter_context(MemoryFile())
        self._shared.write(bytes(progress.SIZE_WITH_PREVIEW if previews else progress.SIZE))
        self.also: dict[str, Any] = {}
        self.timings: dict[str, float] = {}
        self._model = ""
        self._running = self._superseded = False
        self.task = asyncio.create_task(work(self))
        self.task.add_done_callback(self._ended)

    @property
    def error(self) -> BaseException | None:
        """Returns the error of the task, which is done."""
        if not self.task.cancelled():
            return self.task.exception()
        if self._superseded:
            return Superseded("a newer request of the same pointer is here")
        return Cancelled("the job was cancelled")

    @property
    def file(self) -> File:
        """The bytes that are shared with the worker."""
        return self._shared.file

    def ask(self, model: str) -> None:
        """The next model that it waits for."""
        self._model, self._running = model, False
        os.pwrite(self._shared.descriptor, progress.packed_steps(0, 0), 0)

    def took(self, timings: Mapping[str, float]) -> None:
        """What a model's answer took, by stages: of several models together."""
        self.timings = {name: self.timings.get(name, 0) + timings.get(name, 0) for name in {**self.timings, **timings}}

    def begin(self) -> None:
        """The model is held: from now on the worker itself ends the work."""
        self._running = True

    def cancel(self) -> None:
        """A running worker stops within a step; what only waits ends at once."""
        if self.task.done():
            return
        os.pwrite(self._shared.descriptor, progress.CANCELLED, progress.CANCELLED_AT)
        if not self._running:
            self.task.cancel()

    def supersede(self) -> None:
        """A newer one is wanted instead: ends it if it only waits."""
        if not self._running and not self.task.done():
            self._superseded = True
            self.task.cancel()

    def close(self) -> None:
        """Nobody waits any more: what it holds in memory is given back as soon as no worker needs it."""
        self._closed = True
        self.cancel()
        if self.task.done():
            self.files.close()

    def progress(self, models: list[Model]) -> JobProgress:
        """models: those that the scheduler has in memory or in use."""
        if self._running:
            done = progress.Progress.read(self._shared.read(0, progress.SIZE))
            return JobProgress("running", self._model, done.step, done.steps)
        here, size = self._fetched(self._model)
        loading = size > 0 or any(m.state in STARTING and m.archive.name == self._model for m in models)
        return JobProgress("loading" if loading else "queued", self._model, here >> 20, size >> 20)

    def has_begun(self) -> bool:
        """Whether the model that runs has done a step."""
        return self._running and self.progress([]).step > 0

    def preview(self) -> Preview | None:
        """The newest that the worker has shown."""
        return Preview.read(self._shared.read())

    def _ended(self, task: asyncio.Task[Answer]) -> None:
        if self.error is None:
            self.files.enter_context(task.result().file)
        if self._closed:
            self.files.close()


class Jobs:
    """All that run; of those of one pointer the newest is known by it. box: this server's name among others.

    fetched: as Job has it.
    """

    def __init__(self, box: str = "", fetched: Fetched = lambda model: (0, 0)) -> None:
        self._box, self._fetched = box, fetched
        self._jobs: dict[str, Job] = {}
        self._newest: dict[Pointer, Job] = {}

    def start(
        self,
        work: Callable[[Job], Coroutine[Any, Any, Answer]],
        files: ExitStack,
        pointer: Pointer | None = None,
        previews: bool = False,
    ) -> Job:
        """Starts a job; work, files and previews are those of Job. pointer: whose earlier job it supersedes."""
        job = Job(work, files, previews, self._box, self._fetched)
        self._jobs[job.id] = job
        if pointer is not None:
            if earlier := self._newest.get(pointer):
                earlier.supersede()
            self._newest[pointer] = job
        job.task.add_done_callback(lambda task: self._forget(job, pointer))
        return job

    def _forget(self, job: Job, pointer: Pointer | None) -> None:
        del self._jobs[job.id]
        if pointer is not None and self._newest.get(pointer) is job:
            del self._newest[pointer]

    def get(self, name: str) -> Job:
        """Raises UnknownJob."""
        if name not in self._jobs:
            raise UnknownJob(f"there is no job {name[:60]!r}: it has ended, or never was", "job")
        return self._jobs[name]
