"""Homes of TorchServes, and a server of which single processes are stopped or killed."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import uvloop
from serving import ROOT, Server, serving, until
from zoo import write_archive

from serve.engine import homes, processes


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # A socket's path is short, and so is the folder's.
    folder = tmp_path / "t"
    folder.mkdir()
    monkeypatch.setattr(homes, "temporary_folder", lambda socket: str(folder))
    return folder


DIE_WITH_A_HOME = """
import os, subprocess, sys
from serve.engine import homes
homes.temporary_folder = lambda socket: sys.argv[1]
home = homes.Home()
environ = {**os.environ, "TMPDIR": str(home.path)}
left = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, env=environ, start_new_session=True)
print(home.path, left.pid, flush=True)
os._exit(0)
"""


def test_the_home_of_a_dead_server_is_swept_with_what_still_runs_there(temporary: Path) -> None:
    alive = homes.Home()
    said = subprocess.check_output([sys.executable, "-c", DIE_WITH_A_HOME, str(temporary)], cwd=ROOT, text=True)
    dead, left = said.split()
    others = [temporary / "palimpsest-backup12", temporary / "palimpsest-notes", temporary / "other"]
    for folder in others:
        folder.mkdir()
    outside = temporary.parent / "precious"
    outside.mkdir()
    (outside / ".lock").touch()
    link = temporary / "palimpsest-abcdefgh"
    link.symlink_to(outside)
    linked_lock = temporary / "palimpsest-hgfedcba"
    linked_lock.mkdir()
    (linked_lock / ".lock").symlink_to(outside / ".lock")

    homes.sweep()

    assert not Path(dead).exists()
    assert not psutil.pid_exists(int(left)) or psutil.Process(int(left)).status() == psutil.STATUS_ZOMBIE
    assert all(path.exists() for path in [alive.path, *others, link, linked_lock, outside / ".lock"])
    alive.remove()
    alive.remove()
    assert not alive.path.exists()


def test_a_home_is_ours_alone(temporary: Path) -> None:
    home = homes.Home()
    assert home.path.stat().st_mode & 0o777 == 0o700
    home.remove()


def test_the_event_loops_own_children_are_left_to_it(tmp_path: Path) -> None:
    """To reap one of them would take its exit code away: whoever waits for it would wait for ever."""

    os.mkfifo(tmp_path / "gate")

    async def run() -> None:
        child = await processes.start(
            "sh",
            "-c",
            "read line < gate; exit 7",
            cwd=tmp_path,
            env=dict(os.environ),
            stdout=subprocess.DEVNULL,
            stderr=None,
        )
        # It ends while the loop, which is the server's, can not look.
        (tmp_path / "gate").write_text("\n")
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
        processes.reap_adopted()
        assert await asyncio.wait_for(child.wait(), 20) == 7

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def test_a_stopped_child_is_ended_without_waiting_for_it(tmp_path: Path) -> None:
    async def run() -> None:
        child = await processes.start(
            "sleep", "1000", cwd=tmp_path, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=None
        )
        os.kill(child.pid, signal.SIGSTOP)
        while not processes.stopped({child.pid}):
            await asyncio.sleep(0.01)
        await asyncio.wait_for(processes.end(child, patience=1000), 20)
        assert child.returncode == -signal.SIGKILL

    asyncio.run(run())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("processes")
    write_archive(folder / "store", "echo")
    with serving(folder, folder / "store", "full", cpu_only=True) as running:
        yield running
        family = running.family()
        running.process.terminate()
        running.process.wait(60)
        assert running.leftovers(family) == []


def find(server: Server, kind: str) -> psutil.Process:
    def named() -> list[psutil.Process]:
        found = []
        for process in server.family():
            try:
                words = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if {"java": "ModelServer", "zygote": "zygote.py", "launcher": "launcher.py"}.get(kind, "\0") in words:
                found.append(process)
        return found

    if kind == "worker":
        return server.worker("echo")
    until(lambda: bool(named()))
    return named()[0]


@pytest.mark.torchserve
@pytest.mark.parametrize("kind", ["zygote", "launcher", "worker", "java"])
@pytest.mark.parametrize("signal_", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_any_process_may_be_stopped_or_killed(server: Server, kind: str, signal_: signal.Signals) -> None:
    assert server.http.post("/predictions/echo", content=b"before").content == b"before"
    victim = find(server, kind)
    victim.send_signal(signal_)
    # Noticed without a request, and nothing is left of it.
    until(lambda: not victim.is_running(), 30)
    until(lambda: server.http.post("/predictions/echo", content=b"after").content == b"after", 60)
    until(lambda: not [p for p in server.family() if p.status() == psutil.STATUS_ZOMBIE], 20)
    assert len(list((server.folder / "tmp").iterdir())) == 1
