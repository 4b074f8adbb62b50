"""The scheduler's engine: TorchServe's workers, each watched through its process and measured.

TorchServe notices a dead worker by a time limit and a hung one never.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from contract import commands
from contract.ticket import File
from serve.engine import processes
from serve.engine.answer import Answer
from serve.engine.question import Question
from serve.engine.torchserve import TorchServe
from serve.errors import (
    DeadlineExceeded,
    EngineUnavailable,
    ModelLoadFailed,
    ModelNotFound,
    ModelNotReady,
    NotReached,
    OutOfMemory,
    PalimpsestError,
    WorkerDied,
)
from serve.memory_file import MemoryFile
from serve.residency.memory import Memory
from serve.residency.model import Taken
from serve.residency.worker import Worker
from serve.store.catalog import Archive

T = TypeVar("T")

logger = logging.getLogger(__name__)

POLL = 0.5  # seconds between looks at a worker that has a request
END_TOLD = 2.0  # seconds within which it is known how a worker ended that TorchServe has lost
LOOK_AGAIN = 10.0  # seconds between two measurements of one worker
SUSPENSION = 30.0  # seconds that the driver may take to suspend or resume a worker: some ten gigabytes
MEMORY_BACK = 5.0  # seconds that the device gets to report freed memory


class EngineHost(Protocol):
    """The running TorchServe, and which process serves an archive.

    take_end: how a worker of the archive has ended since the last call: "killed" by a signal that TorchServe did not
    send, "ended" by itself, or "" where nobody knows.
    """

    @property
    def engine(self) -> TorchServe: ...

    def worker_pid(self, archive: Path) -> int | None: ...

    def take_end(self, archive: Path) -> str: ...


class Workers:
    """Loads, parks, wakes, unloads and asks models. on_lost, on_footprint: the scheduler's, set once both exist.
    on_phases: told of the seconds of each phase of a load.
    """

    on_lost: Callable[[str], None]
    on_footprint: Callable[[str, int], None]
    on_phases: Callable[[Archive, dict[str, float]], None]

    def __init__(self, host: EngineHost, memory: Memory, predict_timeout: float) -> None:
        """predict_timeout: seconds that an answer may take."""
        self._host, self._memory, self._predict_timeout = host, memory, predict_timeout
        self._workers: dict[str, Worker] = {}

    async def load(self, archive: Archive) -> int:
        """Returns the bytes that the model takes. Raises OutOfMemory, ModelLoadFailed, or what the engine raises;
        WorkerDied where the worker was killed again, ModelNotFound and ModelNotReady where the archive has gone or was
        replaced meanwhile.
        """
        free_before = self._memory.free()
        await self._start(archive)
        pid = self._host.worker_pid(archive.path)
        known = self._memory.footprint(archive)
        if pid is None or not self._watch(archive, pid) or (known and known.load <= self._memory.budget):
            # A footprint that is known is looked at again beside the first answer.
            return self._memory.predict(archive)
        taken = max(0, free_before - self._memory.free())
        return await asyncio.to_thread(self._memory.measure_load, archive, pid, taken)

    async def _start(self, archive: Archive) -> None:
        """Starts a worker; again if it was killed: nothing is wrong with the model, and its killer may have gone."""
        was_killed = False
        for last in (False, True):
            self._host.take_end(archive.path)
            began = asyncio.get_running_loop().time()
            try:
                await self._host.engine.register(archive.engine_name, archive.path)
                return
            except (ModelLoadFailed, OutOfMemory) as error:
                seconds = asyncio.get_running_loop().time() - began
                end = await self._take_end(archive, error, seconds)
                may_be = self._may_have_been_killed(archive, error, end, seconds)
                # Of one that was killed before, it is enough that nobody knows better.
                if last and (end == "killed" or (was_killed and may_be)):
                    died = f"the worker of {archive.name!r} was killed while it loaded: try again"
                    raise WorkerDied(died) from error
                if last or not (end == "killed" or may_be):
                    raise _cause(archive, error) from error
                was_killed = end == "killed"
                logger.error("the worker of %s was killed while it loaded", archive.name)

    async def _take_end(self, archive: Archive, error: PalimpsestError, seconds: float) -> str:
        """As the host's: who reaps the worker and TorchServe, which misses it, tell each in their time."""
        end = self._host.take_end(archive.path)
        if not end and self._may_have_been_killed(archive, error, end, seconds):
            clock = asyncio.get_running_loop().time
            deadline = clock() + END_TOLD
            while not end and clock() < deadline:
                await asyncio.sleep(END_TOLD / 40)
                end = self._host.take_end(archive.path)
        return end

    def _may_have_been_killed(self, archive: Archive, error: PalimpsestError, end: str, seconds: float) -> bool:
        """Whether nothing else explains the load's end: TorchServe, quick to clear up, may hide what went before."""
        no_memory = isinstance(error, OutOfMemory) and self._memory.free() < self._memory.predict(archive)
        late = seconds >= self._memory.startup_timeout(archive)
        return not (end == "ended" or no_memory or late) and archive.is_there() and not archive.is_replaced()

    async def unload(self, archive: Archive) -> None:
        """Returns once the worker is gone and its memory is back, or after a bound."""
        worker = self._workers.pop(archive.engine_name, None)
        free_before = self._memory.free()
        held = 0 if worker is None or worker.suspended else await self._held(archive, worker)
        try:
            await self._host.engine.unregister(archive.engine_name)
        finally:
            if worker is not None:
                await self._until_gone(worker, free_before, held)
                worker.close()

    async def _held(self, archive: Archive, worker: Worker) -> int:
        """What the device has to get back from it, where that takes a while to tell."""
        if not self._memory.device.frees_late:
            return 0
        used = await asyncio.to_thread(self._memory.device.used_by, worker.pid)
        return used or self._memory.predict(archive)

    async def ask(self, archive: Archive, question: Question, job: File | None = None) -> Answer:
        """Asks a loaded model; the answer is the caller's to close. job: for its progress.

        Raises NotReached where no worker has seen the request, WorkerDied as soon as its process ends or stops, and
        DeadlineExceeded.
        """
        ours, name = self._memory.takes_commands(archive), archive.engine_name
        try:
            engine = self._host.engine
        except EngineUnavailable as error:
            raise NotReached(error.message) from error
        # New for every try: a worker that was given up may still write into its own.
        reply = MemoryFile()
        asked = asyncio.create_task(
            engine.answer(name, question, reply, job) if ours else engine.predict(name, question, reply)
        )
        try:
            answer = await self._answer(archive, asked)
        except BaseException:
            asked.cancel()
            # It may yet read the question, or write what comes in: nothing is closed before it has ended.
            await asyncio.wait({asked})
            reply.close()
            raise
        if worker := self._workers.get(archive.engine_name):
            self._learn(archive, worker)
            if worker.report is None and ours:
                # Not before the first answer: whoever waited for the load waits for that.
                worker.report = asyncio.create_task(self._report_phases(archive))
        return answer

    async def park(self, archive: Archive) -> Taken:
        """Moves the model's weights to host memory. Raises as TorchServe.command, or WorkerDied."""
        status = await self._command(archive, commands.PARK)
        pid = self._worker(archive).pid
        return await asyncio.to_thread(self._memory.measure_parked, archive, pid, int(status["host_bytes"]))

    async def suspend(self, archive: Archive) -> Taken:
        """Takes the parked model off the device. Raises as park, and DeadlineExceeded, where its worker was killed."""
        try:
            await self._command(archive, commands.SUSPEND, SUSPENSION)
        except PalimpsestError:
            self._memory.cannot_suspend(archive)
            raise
        self._worker(archive).suspended = True
        return self._memory.suspended(archive)

    async def wake(self, archive: Archive) -> Taken:
        """Moves them back, after the worker itself where that was suspended. Raises as suspend."""
        worker = self._worker(archive)
        if worker.suspended:
            await self._command(archive, commands.RESUME, SUSPENSION)
            worker.suspended = False
        status = await self._command(archive, commands.WAKE)
        device = await asyncio.to_thread(self._memory.measure, archive, self._worker(archive).pid)
        return Taken(device, int(status["host_bytes"]))

    def _worker(self, archive: Archive) -> Worker:
        """Returns the model's worker; raises WorkerDied where it is gone."""
        worker = self._workers.get(archive.engine_name)
        if worker is None:
            raise _died(archive)
        return worker

    async def _report_phases(self, archive: Archive) -> None:
        try:
            status = await self._command(archive, commands.STATUS)
        except PalimpsestError as error:
            logger.info("%s does not say how it was loaded: %s", archive.name, error.message)
        else:
            self.on_phases(archive, status["phases"])

    async def _command(self, archive: Archive, command: str, seconds: float | None = None) -> dict[str, Any]:
        request = asyncio.create_task(self._host.engine.command(archive.engine_name, command))
        try:
            return await self._answer(archive, request, seconds)
        finally:
            request.cancel()

    async def _answer(self, archive: Archive, request: asyncio.Task[T], seconds: float | None = None) -> T:
        """seconds: that it may take; by default those that the operator gives a prediction."""
        worker = self._workers.get(archive.engine_name)
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds or self._predict_timeout):
                return await (request if worker is None else self._unless_it_dies(worker, request, archive))
        except TimeoutError:
            if worker is not None:
                # It works on, and the next request would wait for what nobody waits for any more.
                processes.kill(worker.pid)
            if seconds:
                raise _late(archive, seconds, "the driver's limit to suspend or resume it") from None
            raise _late(archive, self._predict_timeout, "PALIMPSEST_PREDICT_TIMEOUT") from None
        except NotReached:
            raise
        except (EngineUnavailable, OutOfMemory) as error:
            # TorchServe calls a worker that was killed out of memory, and may say so a moment before the kernel does.
            if isinstance(error, WorkerDied) or (worker is not None and await worker.ends_within(POLL)):
                own_limit = self._memory.response_timeout(archive)
                if asyncio.get_running_loop().time() - began >= own_limit:
                    raise _late(archive, own_limit, "responseTimeout in its model-config.yaml") from None
                raise _died(archive) from None
            raise

    def forget(self) -> None:
        """TorchServe is gone and its workers with it."""
        for worker in self._workers.values():
            worker.mark_dead()
        self._workers.clear()

    async def _unless_it_dies(self, worker: Worker, request: asyncio.Task[T], archive: Archive) -> T:
        stopped_before = False
        either: set[asyncio.Future[Any]] = {request, worker.died}
        while not request.done() and not worker.died.done():
            ended, _ = await asyncio.wait(either, timeout=POLL, return_when=asyncio.FIRST_COMPLETED)
            if not ended:
                self._look_at_work(archive, worker)
            stopped = not ended and processes.is_stopped(worker.pid)
            if stopped and stopped_before:
                logger.error("the worker of %s is stopped: killing it", archive.name)
                processes.kill(worker.pid)
            stopped_before = stopped
        if not request.done():
            raise _died(archive)
        return request.result()

    def _look_at_work(self, archive: Archive, worker: Worker) -> None:
        """Looks at the worker's memory in the middle of a request, as often as between two."""
        now = asyncio.get_running_loop().time()
        if now >= worker.look_at_work:
            worker.look_at_work = now + LOOK_AGAIN
            asyncio.get_running_loop().run_in_executor(None, self._memory.measure_work, archive, worker.pid)

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
            self._workers[archive.engine_name] = Worker(pid, partial(self._on_death, archive))
        except ProcessLookupError:
            return False
        return True

    def _on_death(self, archive: Archive, worker: Worker) -> None:
        if self._workers.get(archive.engine_name) is worker:
            logger.error("the worker of %s ended", archive.name)
            self.on_lost(archive.engine_name)

    async def _until_gone(self, worker: Worker, free_before: int, size: int) -> None:
        if not await worker.ends_within(MEMORY_BACK):
            processes.kill(worker.pid)
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


def _cause(archive: Archive, error: PalimpsestError) -> PalimpsestError:
    """Why the archive could not be loaded: the error, unless it was taken away or replaced meanwhile."""
    if not archive.is_there():
        return ModelNotFound(f"{archive.name!r} was removed from the store", "model")
    if archive.is_replaced():
        return ModelNotReady(f"{archive.name!r} was replaced while it loaded: try again", retry_after=1)
    return error


def _late(archive: Archive, seconds: float, limit: str) -> DeadlineExceeded:
    return DeadlineExceeded(f"{archive.name!r} did not answer within {seconds:g} s ({limit})")
