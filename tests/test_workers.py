"""What comes of a load or a request whose worker is killed, late, or has lost its archive.

The engine is a list of outcomes, the worker a process that sleeps.
"""

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeDevice, make_store

from serve.engine.answer import Answer
from serve.engine.question import Question, Sent
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
from serve.residency.workers import Workers
from serve.store.catalog import Archive, Catalog

FAILED, NO_MEMORY = ModelLoadFailed("failed"), OutOfMemory("no memory")


class Engine:
    """outcomes: of one load after another. end: how the worker of that load ended."""

    def __init__(self, *outcomes: tuple[PalimpsestError | None, str]) -> None:
        self.outcomes, self.end, self.loads = list(outcomes), "", 0
        self.pid: int | None = None
        self.up = True
        self.looks_in_vain = 0

    @property
    def engine(self) -> Any:
        if not self.up:
            raise EngineUnavailable("restarting")
        return self

    async def register(self, name: str, archive: Path) -> None:
        self.loads += 1
        error, self.end = self.outcomes.pop(0) if self.outcomes else (None, "")
        if error:
            raise error

    async def predict(self, name: str, question: Question, reply: MemoryFile) -> Answer:
        await asyncio.sleep(3600)
        raise AssertionError

    def worker_pid(self, archive: Path) -> int | None:
        return self.pid

    def take_end(self, archive: Path) -> str:
        if self.looks_in_vain:
            self.looks_in_vain -= 1
            return ""
        end, self.end = self.end, ""
        return end


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Catalog(make_store(tmp_path / "store", "sam", memory_mib=1), tmp_path / "cache", demo=False).find("sam")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def workers(engine: Engine, tmp_path: Path, timeout: float = 5) -> Workers:
    made = Workers(engine, Memory(FakeDevice(), 2**40, tmp_path / "footprints.json"), timeout)
    made.on_lost = lambda name: None
    return made


@pytest.mark.parametrize(
    ("outcomes", "loads", "error"),
    [
        ([], 1, None),
        ([(FAILED, "killed")], 2, None),
        ([(NO_MEMORY, "killed")], 2, None),
        ([(FAILED, "killed"), (FAILED, "killed")], 2, WorkerDied),
        ([(FAILED, "killed"), (FAILED, "")], 2, WorkerDied),
        ([(FAILED, ""), (FAILED, "killed")], 2, WorkerDied),
        ([(FAILED, ""), (FAILED, "")], 2, ModelLoadFailed),
        ([(FAILED, "killed"), (FAILED, "ended")], 2, ModelLoadFailed),
        ([(FAILED, "ended")], 1, ModelLoadFailed),
        ([(NO_MEMORY, "ended")], 1, OutOfMemory),
        # Nobody saw how it ended, and the device has a terabyte.
        ([(FAILED, "")], 2, None),
        ([(NO_MEMORY, "")], 2, None),
        ([(NO_MEMORY, ""), (NO_MEMORY, "")], 2, OutOfMemory),
    ],
)
def test_a_load_is_tried_again_where_its_worker_was_killed(
    tmp_path: Path,
    archive: Archive,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: list[tuple[PalimpsestError | None, str]],
    loads: int,
    error: type[PalimpsestError] | None,
) -> None:
    monkeypatch.setattr("serve.residency.workers.END_TOLD", 0.1)
    engine = Engine(*outcomes)
    if error is None:
        assert asyncio.run(workers(engine, tmp_path).load(archive)) == 1 << 20
    else:
        with pytest.raises(error) as raised:
            asyncio.run(workers(engine, tmp_path).load(archive))
        assert (raised.value.retry_after is None) == (raised.value.status != 503)
    assert engine.loads == loads


@pytest.mark.parametrize(("end", "error"), [("killed", WorkerDied), ("ended", ModelLoadFailed)])
def test_how_a_worker_ended_may_be_told_after_torchserve_has_lost_it(
    tmp_path: Path, archive: Archive, end: str, error: type[PalimpsestError]
) -> None:
    engine = Engine((FAILED, end), (FAILED, end))
    engine.looks_in_vain = 4  # the first is before the load
    with pytest.raises(error):
        asyncio.run(workers(engine, tmp_path).load(archive))
    assert engine.loads == (2 if end == "killed" else 1)


def test_out_of_memory_where_there_is_little_is_believed(
    tmp_path: Path, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDevice, "free", lambda self: 1)
    engine = Engine((NO_MEMORY, ""))
    with pytest.raises(OutOfMemory):
        asyncio.run(workers(engine, tmp_path).load(archive))
    assert engine.loads == 1


def test_an_archive_that_went_or_was_replaced_is_what_the_error_says(tmp_path: Path, archive: Archive) -> None:
    (archive.path / "handler.py").write_text("new")
    with pytest.raises(ModelNotReady, match="replaced"):
        asyncio.run(workers(Engine((FAILED, "ended")), tmp_path).load(archive))
    shutil.rmtree(archive.path)
    with pytest.raises(ModelNotFound) as raised:
        asyncio.run(workers(Engine((FAILED, "ended")), tmp_path).load(archive))
    assert str(tmp_path) not in raised.value.message


async def ask(engine: Engine, made: Workers, archive: Archive, sleeper: subprocess.Popen[bytes]) -> Answer:
    engine.pid = sleeper.pid
    await made.load(archive)
    try:
        with MemoryFile() as body:
            return await made.ask(archive, Sent({}, body))
    finally:
        made.forget()


def test_a_worker_that_is_late_is_ended_and_the_limit_is_named(
    tmp_path: Path, archive: Archive, sleeper: subprocess.Popen[bytes]
) -> None:
    """It would go on working, and the next request would wait for that."""
    engine = Engine()
    with pytest.raises(DeadlineExceeded, match=r"within 0.2 s \(PALIMPSEST_PREDICT_TIMEOUT\)"):
        asyncio.run(ask(engine, workers(engine, tmp_path, timeout=0.2), archive, sleeper))
    assert sleeper.wait(60) == -9


@pytest.mark.parametrize(("limit", "error"), [(0, DeadlineExceeded), (120, WorkerDied)])
def test_a_worker_that_torchserve_ends_at_the_archives_own_limit_was_late(
    tmp_path: Path,
    archive: Archive,
    sleeper: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    error: type[PalimpsestError],
) -> None:
    monkeypatch.setattr(Memory, "response_timeout", lambda self, archive: limit)
    engine = Engine()

    async def killed() -> None:
        asyncio.get_running_loop().call_later(0.1, sleeper.kill)
        await ask(engine, workers(engine, tmp_path), archive, sleeper)

    with pytest.raises(error):
        asyncio.run(killed())


@pytest.mark.parametrize(
    ("config", "seconds"), [("responseTimeout: 7", 7), ("minWorkers: 1", 120), ("", 120), ("responseTimeout: x", 120)]
)
def test_an_archives_own_limit_is_its_word_or_torchserves(
    tmp_path: Path, archive: Archive, config: str, seconds: int
) -> None:
    (archive.path / "model-config.yaml").write_text(config)
    memory = Memory(FakeDevice(), 2**40, tmp_path / "footprints.json")
    assert memory.response_timeout(archive) == seconds


def test_a_request_that_meets_no_engine_was_seen_by_no_worker(
    tmp_path: Path, archive: Archive, sleeper: subprocess.Popen[bytes]
) -> None:
    engine = Engine()
    engine.up = False

    async def finish() -> None:
        made = workers(engine, tmp_path)
        with MemoryFile() as body:
            await made.ask(archive, Sent({}, body))

    with pytest.raises(NotReached):
        asyncio.run(finish())
