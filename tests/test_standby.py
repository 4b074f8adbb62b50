"""The standby worker: forked and prepared ahead, it becomes the next worker. What prepares it is a tiny script here."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import psutil
import pytest
from test_zygote import (
    DESCRIBE_YOURSELF,
    FOR_EVER,
    IN_TIME,
    TINY,
    UNTIL_STDIN_ENDS,
    Bench,
    bench,
    code_of,
    ends,
    in_event_loop,
    parent_of_orphans,
    pids_of,
    ready,
    supervising,
    until,
)
from zoo import write_archive

from serve.engine.warmstart import WarmStarts

__all__ = ["parent_of_orphans"]  # a fixture for all

# What a worker can see of the preparation; CUDA would be such a thing.
PREPARED = "import builtins, os; builtins.prepared_by = os.getpid()"
WAS_PREPARED = "import builtins, os; print(os.getpid() == getattr(builtins, 'prepared_by', 0), flush=True)"


def preparation(folder: Path, script: str = PREPARED) -> Path:
    (folder / "standby.py").write_text(script)
    return folder / "standby.py"


async def prepared(warm: Bench) -> int:
    """Its process, once it is ready."""
    warm.prepare_standby()
    await until(lambda: warm.standby_is_ready)
    (standby,) = psutil.Process(warm.zygote_pid).children()
    return standby.pid


@in_event_loop
async def test_the_standby_becomes_the_next_worker_and_the_one_after_is_forked(tmp_path: Path) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        standby = await prepared(warm)
        process = warm.launch(UNTIL_STDIN_ENDS)
        assert await pids_of(process) == (standby, warm.zygote_pid)
        await until(lambda: not warm.standby)
        assert (await warm.run(WAS_PREPARED))[1] == b"False\n"
        process.communicate(b"", IN_TIME)
        # There is another only where one is wished.
        assert await prepared(warm) != standby
        assert (await warm.run(WAS_PREPARED))[1] == b"True\n"
        await until(lambda: warm.standby_starts == 2)
        assert (warm.slow_starts, warm.zygote_restarts) == (0, 0)


@in_event_loop
async def test_it_finds_what_a_fresh_interpreter_would(tmp_path: Path) -> None:
    options = {"TS_OWN": "1", "PYTHONPATH": f"{tmp_path}:{tmp_path / 'work'}:"}
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        await prepared(warm)
        told = [
            await warm.run(DESCRIBE_YOURSELF, "--name", "é value", python=python, **options)
            for python in (None, sys.executable)
        ]
        await until(lambda: warm.standby_starts == 1)
    assert [(code, errors) for code, _, errors in told] == [(0, b"a complaint\n")] * 2
    stood_by, fresh = (json.loads(output) for _, output, _ in told)
    (title,) = stood_by.pop("shown")
    assert shlex.split(title)[2:] == fresh.pop("shown")[2:]
    for worker in stood_by, fresh:
        # Those of the launcher and of the shell that starts it.
        for name in ("PALIMPSEST_WORKER_STARTED", "PWD", "OLDPWD", "SHLVL", "_"):
            value = worker["environment"].pop(name, None)
            if f"{name}={value}" in worker["c environment"]:
                worker["c environment"].remove(f"{name}={value}")
    stood_by["descriptors"] -= 1  # its tie to the launcher
    assert stood_by == fresh


@pytest.mark.slow
@pytest.mark.parametrize(("script", "code"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
@in_event_loop
async def test_its_exit_code_is_the_workers(tmp_path: Path, script: str, code: int) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        await prepared(warm)
        assert (await warm.run(script))[0] == code
        await until(lambda: warm.standby_starts == 1)
        end = "killed" if code > 128 else "ended"
        await until(lambda: warm.take_end(str(warm.work)) == end)


@pytest.mark.slow
@in_event_loop
async def test_a_worker_that_stood_by_ends_with_its_launcher_and_outlives_the_zygote(tmp_path: Path) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        standby = await prepared(warm)
        process = warm.launch(FOR_EVER)
        assert (await pids_of(process))[0] == standby
        os.kill(warm.zygote_pid, signal.SIGKILL)
        await until(lambda: warm.zygote_restarts == 1)
        await ready(warm)
        assert psutil.Process(standby).ppid() == os.getpid()
        process.kill()
        assert ends(standby)
        await code_of(process)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
@in_event_loop
async def test_a_standby_ends_with_the_zygote(tmp_path: Path, how: str) -> None:
    """Even one that is still preparing; the fixture's end sees that nothing is left."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with bench(tmp_path, preparation=preparation(tmp_path, f"open({str(gate)!r}).read()")) as warm:
        warm.prepare_standby()
        await until(lambda: bool(psutil.Process(warm.zygote_pid).children()))
        (standby,) = psutil.Process(warm.zygote_pid).children()
        if how == "killed":
            os.kill(warm.zygote_pid, signal.SIGKILL)
            await until(lambda: warm.zygote_restarts == 1)
        else:
            await warm.stop()
        assert ends(standby.pid)
        assert not warm.standby


@in_event_loop
async def test_while_it_prepares_starts_are_forked(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    script = f"open({str(gate)!r}).read()\n{PREPARED}"
    async with bench(tmp_path, preparation=preparation(tmp_path, script)) as warm:
        warm.prepare_standby()
        await until(lambda: bool(psutil.Process(warm.zygote_pid).children()))
        assert (await warm.run(WAS_PREPARED))[1] == b"False\n"
        gate.write_text("")
        await until(lambda: warm.standby_is_ready)
        assert (await warm.run(WAS_PREPARED))[1] == b"True\n"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["1 / 0", "import os; os.kill(os.getpid(), 9)"])
@in_event_loop
async def test_one_that_cannot_prepare_is_not_tried_again_by_itself(tmp_path: Path, script: str) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path, script)) as warm:
        told = []
        warm.on_standby = lambda: told.append(warm.standby)
        warm.prepare_standby()
        await until(lambda: told == [False])
        assert (await warm.run(WAS_PREPARED))[1] == b"False\n"
        await until(lambda: psutil.Process(warm.zygote_pid).children() == [])
        assert "the standby ended with code" in warm.log.read_text()
        assert (warm.standby_starts, warm.slow_starts) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "dismissed"])
@in_event_loop
async def test_where_it_has_gone_starts_are_forked(tmp_path: Path, how: str) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        standby = await prepared(warm)
        if how == "killed":
            os.kill(standby, signal.SIGKILL)
        else:
            warm.dismiss_standby()
        assert ends(standby)
        assert (await warm.run(WAS_PREPARED))[1] == b"False\n"
        await until(lambda: not warm.standby)
        assert (warm.standby_starts, warm.slow_starts) == (0, 0)


@in_event_loop
async def test_another_environment_leaves_it_alone(tmp_path: Path) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        await prepared(warm)
        assert (await warm.run(WAS_PREPARED, OMP_NUM_THREADS="3"))[1] == b"False\n"
        assert warm.standby_is_ready
        assert (await warm.run(WAS_PREPARED))[1] == b"True\n"


@in_event_loop
async def test_an_archive_with_a_copy_of_a_library_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "archive" / "json").mkdir(parents=True)
    (tmp_path / "archive" / "json" / "__init__.py").touch()
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        await prepared(warm)
        assert (await warm.run(WAS_PREPARED, PYTHONPATH=str(tmp_path / "archive")))[1] == b"False\n"
        assert warm.standby_is_ready


@pytest.mark.slow
@in_event_loop
async def test_there_is_one_at_most_and_none_where_there_is_nothing_to_prepare(tmp_path: Path) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        standby = await prepared(warm)
        for _ in range(3):
            warm.prepare_standby()
        assert (await warm.run(WAS_PREPARED))[1] == b"True\n"
        assert (await warm.run(WAS_PREPARED))[1] == b"False\n"
        await until(lambda: not psutil.pid_exists(standby))
        await until(lambda: psutil.Process(warm.zygote_pid).children() == [])
    (tmp_path / "cpu").mkdir()
    async with bench(tmp_path / "cpu", TINY) as warm:
        warm.prepare_standby()
        assert not warm.standby


@in_event_loop
async def test_the_zygote_stays_fit_to_fork(tmp_path: Path) -> None:
    """A second thread in the standby, as CUDA starts them, is none in the zygote."""
    script = f"import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n{PREPARED}"
    async with bench(tmp_path, preparation=preparation(tmp_path, script)) as warm:
        await prepared(warm)
        assert (await warm.run(WAS_PREPARED))[1] == b"True\n"
        assert (await warm.run(WAS_PREPARED))[1] == b"False\n"
        assert warm.slow_starts == 0


@pytest.mark.slow
@in_event_loop
async def test_many_standbys_leave_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path, preparation=preparation(tmp_path)) as warm:
        for count in range(12):
            await prepared(warm)
            if count % 3 == 0:
                warm.dismiss_standby()
            else:
                assert (await warm.run("pass"))[0] == 0
            await until(lambda: not warm.standby)
            await warm.at_rest()
            if count == 3:
                before = psutil.Process(warm.zygote_pid).num_fds(), psutil.Process().num_fds()
        assert (psutil.Process(warm.zygote_pid).num_fds(), psutil.Process().num_fds()) == before
        assert warm.standby_starts == 8


@pytest.mark.torchserve
@in_event_loop
async def test_torchserves_next_worker_is_the_standby_and_nothing_is_left_when_it_stops(tmp_path: Path) -> None:
    warm = WarmStarts(("ts.model_service_worker",), preparation=preparation(tmp_path))
    archives = {name: write_archive(tmp_path / "store", name) for name in ("one", "two")}
    async with supervising(tmp_path, warm) as supervisor:
        assert warm.zygote is not None
        standbys = []
        for name, archive in archives.items():
            warm.prepare_standby()
            await until(lambda: warm.standby_is_ready)
            (standby,) = {child.pid for child in psutil.Process(warm.zygote.pid).children()} - set(standbys)
            standbys.append(standby)
            await supervisor.engine.register(name, archive)
            assert supervisor.worker_pid(archive) == standby
            await until(lambda: not warm.standby)
        assert (warm.standby_starts, warm.slow_starts) == (2, 0)
        await supervisor.engine.unregister("one")
        await until(lambda: not psutil.pid_exists(standbys[0]))
        # One that waits ends with the server, too.
        warm.prepare_standby()
        await until(lambda: warm.standby_is_ready)
