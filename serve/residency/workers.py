"""The scheduler's engine: TorchServe's workers, each watched through its process and measured.

TorchServe notices a dead worker by a time limit and a hung one never; a process file descriptor tells at once.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from serve.engine.torchserve import Answer, TorchServe
from serve.errors import EngineUnavailable, OutOfMemory, WorkerDied
from serve.residency.catalog import Archive
from serve.residency.memory import Memory

logger = logging.getLogger(__name__)

POLL = 0.5  # seconds between looks at a worker that has a request
LOOK_AGAIN = 10.0  # seconds between two measurements of one worker
MEMORY_BACK = 5.0  # seconds that the device gets to report freed memory


class EngineHost(Protocol):
    """The running TorchServe, and which process serves an archive."""

    @property
    def engine(self) -> TorchServe: ...

    def worker_pid(self, archive: Path) -> int | None: ...


@dataclass(eq=False)
class Worker:
    """A worker process. died: set as soon as it has ended."""

    pid: int
    descriptor: int
    died: asyncio.Event = field(default_factory=asyncio.Event)
    look_again: float = 0.0


class Workers:
    """Loads, unloads and asks models. on_lost, on_footprint: the scheduler's, set once both exist."""

    on_lost: Callable[[str], None]
    on_footprint: Callable[[str, int], None]

    def __init__(self, host: EngineHost, memory: Memory) -> None:
        self._host, self._memory = host, memory
        self._workers: dict[str, Worker] = {}

    async def load(self, archive: Archive) -> int:
        """Returns the bytes that the model takes. Raises OutOfMemory, ModelLoadFailed, or what the engine raises."""
        free_before = self._memory.free()
        await self._host.engine.register(archive.engine_name, archive.path)
        pid = self._host.worker_pid(archive.path)
        if pid is None or not self._watch(archive, pid):
            return self._memory.predict(archive)
        taken = max(0, free_before - self._memory.free())
        return await asyncio.to_thread(self._memory.measure, archive, pid, True, taken)

    async def unload(self, archive: Archive) -> None:
        """Returns once the worker is gone and its memory is back, or after a bound."""
        worker = self._workers.pop(archive.engine_name, None)
        free_before = self._memory.free()
        try:
            await self._host.engine.unregister(archive.engine_name)
        finally:
            if worker is not None:
                await self._until_gone(worker, free_before, self._memory.predict(archive))
                self._close(worker)

    async def predict(self, archive: Archive, headers: dict[str, str], body: bytes) -> Answer:
        """Asks a loaded model. Raises WorkerDied as soon as its process ends or stops, else as TorchServe.predict."""
        worker = self._workers.get(archive.engine_name)
        request = asyncio.create_task(self._host.engine.predict(archive.engine_name, headers, body))
        try:
            answer = await (request if worker is None else self._unless_it_dies(worker, request, archive))
        except (EngineUnavailable, OutOfMemory):
            # TorchServe calls a worker that was killed out of memory.
            if worker is not None and await self._ends_soon(worker):
                raise _died(archive) from None
            raise
        finally:
            request.cancel()
        if worker is not None:
            self._learn(archive, worker)
        return answer

    def forget(self) -> None:
        """TorchServe is gone and its workers with it."""
        for worker in self._workers.values():
            worker.died.set()
            self._close(worker)
        self._workers.clear()

    async def _unless_it_dies(self, worker: Worker, request: asyncio.Task[Answer], archive: Archive) -> Answer:
        died = asyncio.create_task(worker.died.wait())
        stopped_before = False
        try:
            while not request.done() and not died.done():
                await asyncio.wait({request, died}, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
                stopped = _is_stopped(worker.pid)
                if stopped and stopped_before:
                    logger.error("the worker of %s is stopped: killing it", archive.name)
                    _kill(worker.pid)
                stopped_before = stopped
        finally:
            died.cancel()
        if not request.done():
            raise _died(archive)
        return request.result()

    async def _ends_soon(self, worker: Worker) -> bool:
        """TorchServe's error can arrive a moment before the kernel's news of the same death."""
        with suppress(TimeoutError):
            await asyncio.wait_for(worker.died.wait(), POLL)
        return worker.died.is_set()

    def _learn(self, archive: Archive, worker: Worker) -> None:
        """Looks at the worker's memory once in a while, beside the answer: it takes milliseconds for a large one."""
        now = asyncio.get_running_loop().time()
        if now < worker.look_again:
            return
        worker.look_again = now + LOOK_AGAIN
        look = asyncio.get_running_loop().run_in_executor(None, self._memory.measure, archive, worker.pid)
        look.add_done_callback(lambda done: self.on_footprint(archive.engine_name, done.result()))

    def _watch(self, archive: Archive, pid: int) -> bool:
        try:
            worker = Worker(pid, os.pidfd_open(pid))
        except ProcessLookupError:
            return False
        asyncio.get_running_loop().add_reader(worker.descriptor, self._on_death, archive, worker)
        self._workers[archive.engine_name] = worker
        return True

    def _on_death(self, archive: Archive, worker: Worker) -> None:
        self._close(worker)
        worker.died.set()
        if self._workers.get(archive.engine_name) is worker:
            logger.error("the worker of %s ended", archive.name)
            self.on_lost(archive.engine_name)

    def _close(self, worker: Worker) -> None:
        if worker.descriptor >= 0:
            asyncio.get_running_loop().remove_reader(worker.descriptor)
            os.close(worker.descriptor)
            worker.descriptor = -1

    async def _until_gone(self, worker: Worker, free_before: int, size: int) -> None:
        if not worker.died.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(worker.died.wait(), MEMORY_BACK)
        if not worker.died.is_set():
            _kill(worker.pid)
        if self._memory.device.frees_late:
            await self._until_free(free_before + size * 3 // 4)

    async def _until_free(self, target: int) -> None:
        """Three quarters of what was freed will do: others may have taken some in the meantime."""
        deadline = asyncio.get_running_loop().time() + MEMORY_BACK
        while self._memory.free() < target:
            if asyncio.get_running_loop().time() > deadline:
                logger.warning("the device does not report the memory of an unloaded model back")
                return
            await asyncio.sleep(0.05)


def _died(archive: Archive) -> WorkerDied:
    return WorkerDied(f"the worker of {archive.name!r} ended while it had this request: try again")


def _is_stopped(pid: int) -> bool:
    """Whether the process is stopped by a signal (state T): it will never answer."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
