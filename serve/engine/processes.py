"""Processes that this one started or came to own: finding them, ending them, seeing that none is left."""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Makes this process the parent of workers whose TorchServe or zygote died, so that it can end them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Runs in a child before its program: a gateway killed outright takes TorchServe and the zygote with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def descendants_of_home(home: Path | None) -> list[psutil.Process]:
    """Our descendants that belong to the TorchServe that lives in `home`."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
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


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Returns once they are gone and reaped, or after five seconds."""
    alive = list(processes)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def reap_session(session: int) -> None:
    """Has the event loop reap this process's children of the session, which it did not start, as each of them ends.

    Needs a running event loop. Known by their session, because a process that has ended has no environment any more.
    """
    loop = asyncio.get_running_loop()
    for process in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == session:
                descriptor = os.pidfd_open(process.pid)
                loop.add_reader(descriptor, _reap, descriptor)


def _reap(descriptor: int) -> None:
    asyncio.get_running_loop().remove_reader(descriptor)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, descriptor, os.WEXITED)
    os.close(descriptor)
