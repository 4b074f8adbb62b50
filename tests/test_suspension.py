"""Suspension below the scheduler: what a worker asks of the driver, and what the gateway makes of its answers.

The driver is a fake at the border to ctypes; nothing here needs a GPU.
"""

import asyncio
import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeDevice, make_store
from test_parking import KEY, BigHandler, big, command, send, state_after, with_big_weights

from handlers.worker import suspension
from serve.errors import DeadlineExceeded, EngineUnavailable, PalimpsestError, WorkerDied
from serve.residency import workers as workers_module
from serve.residency.memory import Memory
from serve.residency.workers import Workers
from serve.store.catalog import Archive, Catalog

ILLEGAL_STATE, OUT_OF_MEMORY, NOT_READY, NOT_SUPPORTED = 401, 2, 600, 801  # CUresult
MIB = 2**20


class Driver:
    """The states of CUprocessState, by the rules of the driver's documentation. fail: what a call returns instead."""

    def __init__(self) -> None:
        self.state, self.calls = "running", list[str]()
        self.fail: dict[str, int] = {}

    def _move(self, call: str, pid: int, before: str, after: str) -> int:
        assert pid == os.getpid()
        self.calls.append(call)
        if call in self.fail:
            return self.fail[call]
        if self.state != before:
            return ILLEGAL_STATE
        self.state = after
        return 0

    def cuCheckpointProcessLock(self, pid: int, arguments: Any) -> int:
        read = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_uint))
        # A timeout and 60 bytes of zeros, as cuda.h has it.
        assert list(read[:16]) == [suspension.LOCK_TIMEOUT] + [0] * 15
        return self._move("lock", pid, "running", "locked")

    def cuCheckpointProcessCheckpoint(self, pid: int, arguments: None) -> int:
        return self._move("checkpoint", pid, "locked", "checkpointed")

    def cuCheckpointProcessRestore(self, pid: int, arguments: None) -> int:
        return self._move("restore", pid, "checkpointed", "locked")

    def cuCheckpointProcessUnlock(self, pid: int, arguments: None) -> int:
        return self._move("unlock", pid, "locked", "running")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(suspension, "_driver", lambda: made)
    return made


@pytest.fixture
def handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BigHandler:
    monkeypatch.setenv("PALIMPSEST_COMMAND_KEY", KEY)
    return big(with_big_weights(tmp_path))


# In the worker


@pytest.mark.slow
def test_a_parked_model_is_suspended_and_resumed_and_answers_the_same(handler: BigHandler, driver: Driver) -> None:
    before = handler.numbers()
    for _ in range(2):
        state_after(handler, "park")
        assert state_after(handler, "suspend")["state"] == "suspended"
        assert driver.state == "checkpointed"
        assert state_after(handler, "resume")["state"] == "parked"
        assert driver.state == "running"
        assert state_after(handler, "wake")["state"] == "ready"
        assert torch.equal(handler.numbers(), before)
    assert driver.calls == ["lock", "checkpoint", "restore", "unlock"] * 2


@pytest.mark.slow
def test_the_driver_is_asked_once_however_often_the_command_comes(handler: BigHandler, driver: Driver) -> None:
    state_after(handler, "resume")
    state_after(handler, "park")
    for name in ("suspend", "suspend", "park", "status"):
        assert state_after(handler, name)["state"] == "suspended"
    assert driver.calls == ["lock", "checkpoint"]


@pytest.mark.slow
def test_a_suspended_worker_touches_nothing_of_its_model(handler: BigHandler, driver: Driver) -> None:
    state_after(handler, "park")
    state_after(handler, "suspend")
    reply = command(handler, "wake")
    assert (reply.status, reply.error["code"]) == (409, "suspended")
    assert send(handler, {}).status == 503


def test_a_model_at_work_is_not_suspended(handler: BigHandler, driver: Driver) -> None:
    reply = command(handler, "suspend")
    assert (reply.status, reply.error["code"]) == (409, "not_parked")
    assert driver.calls == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "code"), [("lock", NOT_READY), ("checkpoint", NOT_SUPPORTED), ("restore", OUT_OF_MEMORY), ("unlock", 1)]
)
def test_whatever_fails_is_said_and_nothing_more_is_asked_of_the_gpu(
    handler: BigHandler, driver: Driver, call: str, code: int
) -> None:
    state_after(handler, "park")
    driver.fail[call] = code
    replies = [command(handler, name) for name in ("suspend", "resume")]
    failed = next(reply for reply in replies if reply.status != 200)
    # Never 507, which would mean that it can be tried again.
    assert (failed.status, failed.error["code"]) == (500, "suspension_failed")
    assert str(code) in failed.error["message"]
    assert command(handler, "wake").status == 409


@pytest.mark.slow
def test_a_driver_without_the_calls_is_named(handler: BigHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspension, "_driver", object)
    state_after(handler, "park")
    assert "no process checkpoint" in command(handler, "suspend").error["message"]


# In the gateway


class SuspendingDevice(FakeDevice):
    suspends, parked_worker, frees_late = True, 700 * MIB, True


class Engine:
    """TorchServe, whose one worker is a process that sleeps. answers: what each command does; by default it is done."""

    def __init__(self, worker: subprocess.Popen[bytes]) -> None:
        self.worker, self.commands = worker, list[str]()
        self.answers: dict[str, Callable[[], Any]] = {}

    @property
    def engine(self) -> Any:
        return self

    async def register(self, name: str, archive: Path) -> None:
        pass

    async def unregister(self, name: str) -> None:
        self.commands.append("unregister")
        self.worker.kill()

    async def command(self, name: str, command: str) -> dict[str, Any]:
        self.commands.append(command)
        if answer := self.answers.get(command):
            await answer()
        return {"state": "", "phases": {}, "device_bytes": 0, "host_bytes": 100 * MIB}

    def worker_pid(self, archive: Path) -> int | None:
        return self.worker.pid

    def take_end(self, archive: Path) -> str:
        return ""


@pytest.fixture
def engine() -> Iterator[Engine]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield Engine(process)
        process.kill()


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Catalog(
        make_store(tmp_path / "store", "sd", memory_mib=2000, ours=True), tmp_path / "cache", demo=False
    ).find("sd")


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(SuspendingDevice(), 2**40, tmp_path / "footprints.json", 2**40, suspend=True)


async def parked(engine: Engine, memory: Memory, archive: Archive) -> Workers:
    made = Workers(engine, memory, predict_timeout=60)
    made.on_lost = lambda name: None
    await made.load(archive)
    await made.park(archive)
    return made


def test_a_suspended_model_takes_main_memory_for_its_context_and_is_resumed_before_it_is_woken(
    engine: Engine, memory: Memory, archive: Archive
) -> None:
    async def run() -> None:
        workers = await parked(engine, memory, archive)
        taken = await workers.suspend(archive)
        assert (taken.device, taken.host, taken.suspended) == (0, 800 * MIB, True)
        assert taken == memory.predict_suspended(archive)
        await workers.wake(archive)
        await workers.park(archive)
        await workers.wake(archive)
        assert engine.commands == ["park", "suspend", "resume", "wake", "park", "wake"]
        workers.forget()

    asyncio.run(run())


async def fail() -> None:
    raise EngineUnavailable("the driver has none")


async def hang() -> None:
    await asyncio.sleep(3600)


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "error"), [(fail, EngineUnavailable), (hang, DeadlineExceeded)])
def test_what_could_not_be_suspended_once_is_not_tried_again(
    engine: Engine,
    memory: Memory,
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[], Any],
    error: type[PalimpsestError],
) -> None:
    monkeypatch.setattr(workers_module, "SUSPENSION", 0.2)
    engine.answers["suspend"] = answer

    async def run() -> None:
        workers = await parked(engine, memory, archive)
        assert memory.predict_suspended(archive)
        with pytest.raises(error):
            await workers.suspend(archive)
        assert memory.predict_suspended(archive) is None
        workers.forget()

    asyncio.run(run())
    if answer is hang:
        assert engine.worker.wait(60) == -9


def test_a_resumption_that_hangs_ends_the_worker(
    engine: Engine, memory: Memory, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "SUSPENSION", 0.2)
    engine.answers["resume"] = hang

    async def run() -> None:
        workers = await parked(engine, memory, archive)
        await workers.suspend(archive)
        with pytest.raises(DeadlineExceeded, match="suspend or resume"):
            await workers.wake(archive)
        workers.forget()

    asyncio.run(run())
    assert engine.worker.wait(60) == -9
    assert "wake" not in engine.commands


def test_a_worker_killed_while_it_is_suspended_is_known_to_have_died(
    engine: Engine, memory: Memory, archive: Archive
) -> None:
    async def run() -> None:
        workers = await parked(engine, memory, archive)
        lost = asyncio.get_running_loop().create_future()
        workers.on_lost = lost.set_result
        await workers.suspend(archive)
        engine.worker.kill()
        assert await asyncio.wait_for(lost, 10) == archive.engine_name
        engine.answers["resume"] = hang
        with pytest.raises(WorkerDied):
            await workers.wake(archive)
        workers.forget()

    asyncio.run(run())


def test_the_end_of_a_suspended_worker_is_not_waited_for_on_the_device(
    engine: Engine, memory: Memory, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has its memory already, so what it reports as free does not grow."""
    monkeypatch.setattr(workers_module, "MEMORY_BACK", 3600.0)

    async def run() -> None:
        workers = await parked(engine, memory, archive)
        await workers.suspend(archive)
        await asyncio.wait_for(workers.unload(archive), 30)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("device", "setting", "ours"),
    [(SuspendingDevice, False, True), (FakeDevice, True, True), (SuspendingDevice, True, False)],
)
def test_where_it_is_not_wanted_or_cannot_be_there_is_no_such_place(
    tmp_path: Path, device: type[FakeDevice], setting: bool, ours: bool
) -> None:
    archive = Catalog(
        make_store(tmp_path / "store", "sd", memory_mib=1, ours=ours), tmp_path / "cache", demo=False
    ).find("sd")
    memory = Memory(device(), 2**40, tmp_path / "footprints.json", 2**40, setting)
    assert memory.predict_suspended(archive) is None
