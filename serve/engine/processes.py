"""Processes that this one started or came to own: finding them, ending them, seeing that none is left."""

import asyncio
import contextlib
import ctypes
import os
import signal
import time
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_TIMEOUT = 5.0  # seconds that the kernel gets to end what was killed

# Those whose exit code the event loop waits for: nobody else may reap them.
_started: weakref.WeakSet[asyncio.subprocess.Process] = weakref.WeakSet()


def adopt_orphans() -> None:
    """Makes this process the parent of workers whose TorchServe or zygote died, so that it can end them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


async def start(
    *command: str, cwd: Path, env: Mapping[str, str], stdout: Any, stderr: Any
) -> asyncio.subprocess.Process:
    """Starts a child that a gateway killed outright takes with it, even one that is stopped. Raises OSError.

    It has a session of its own: Ctrl-C must reach the gateway alone, which then lets running requests finish.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    _started.add(process)
    return process


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


async def end(process: asyncio.subprocess.Process, patience: float = 0) -> None:
    """Asks a child to end, where there is patience, in seconds; kills it after that. Returns once it is reaped."""
    with contextlib.suppress(ProcessLookupError, TimeoutError):
        if patience and not is_stopped(process.pid):
            process.terminate()
            await asyncio.wait_for(process.wait(), patience)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def processes_of(home: Path) -> list[psutil.Process]:
    """The processes of this user, whoever started them, that belong to the TorchServe that lives in `home`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            # Known by what they were started with. Of another user's, and of one that has ended, this can't be read.
            if process.environ().get("TMPDIR") == str(home):
                found.append(process)
    return found


def descendants_in(folder: Path) -> list[psutil.Process]:
    """Our descendants whose working directory the folder is.

    Looks for the directory first: to ask each process of a machine for its parent takes ten times as long.
    """
    there, me = str(folder.resolve()), os.getpid()
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError, psutil.Error):
            if os.readlink(f"/proc/{pid}/cwd") == there:
                process = psutil.Process(int(pid))
                if any(parent.pid == me for parent in process.parents()):
                    found.append(process)
    return found


def kill_all(home: Path) -> None:
    """Kills what belongs to the home, and what that starts meanwhile; returns once it is gone, or after a bound.

    The event loop's own children are reaped by it; the others that are ours, here.
    """
    deadline = time.monotonic() + KILL_TIMEOUT
    while (alive := processes_of(home)) and time.monotonic() < deadline:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)
        reap_adopted()
    reap_adopted()


def reap_adopted() -> None:
    """Reaps the children that have ended and that this process did not start: they had a parent that died before them.

    Those of its own session it did start. Where nothing has ended it takes microseconds.
    """
    try:
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
    except ChildProcessError:
        return
    own = {process.pid for process in list(_started) if process.returncode is None}
    for child in psutil.Process().children():
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            session = os.getsid(child.pid)
            # A young leader of a session may be the event loop's, which is still starting it.
            young = child.pid == session and time.time() - child.create_time() < KILL_TIMEOUT
            if child.pid not in own and session != os.getsid(0) and not young:
                os.waitpid(child.pid, os.WNOHANG)


def stopped(sessions: Collection[int]) -> set[tuple[int, str]]:
    """Process id and start time of those in the sessions that a signal has stopped (state T): they never answer.

    A few milliseconds for hundreds of processes.
    """
    found = set()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        fields = _stat(int(pid))
        # Of proc(5): state, session and start time.
        if fields and fields[0] == "T" and int(fields[3]) in sessions:
            found.add((int(pid), fields[19]))
    return found


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped it (state T): it will never answer."""
    return _stat(pid)[:1] == ["T"]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
