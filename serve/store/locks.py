"""Locks on folders: flock(2) on the folder itself, so that a lock moves with it, and goes with it and with its process.

They hold between the processes of one machine, also where the disk is another's.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX
STALLED = 60.0  # seconds without progress after which nobody waits any longer for whoever has a lock
_LOOK_EVERY = 0.05


class Stopped(Exception):
    """The server ends."""


class Stalled(Exception):
    """Another process has the lock and gets on with nothing."""


def try_lock(folder: Path, how: int) -> int | None:
    """A descriptor that keeps the folder locked until it is closed; None where another has it, or it has gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        # Until it was locked, another may have put it elsewhere.
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def locked(
    folder: Path, stopped: threading.Event, progress: Callable[[], object], waits: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Has the folder for itself, and makes it where there is none. Not for the event loop.

    progress: what changes while whoever has it gets on. waits: told once, where there is somebody to wait for.
    Raises Stopped, Stalled and OSError.
    """
    began, seen = time.monotonic(), None
    while True:
        with suppress(FileExistsError):  # with exist_ok it would look again, when another may have removed it
            folder.mkdir(parents=True)
        descriptor = try_lock(folder, EXCLUSIVE)
        if descriptor is not None:
            break
        now = progress()
        if seen is None:
            waits()
        if now != seen:
            began, seen = time.monotonic(), now
        elif time.monotonic() - began > STALLED:
            raise Stalled(f"another process has {folder} and did not get on with it for {STALLED:g} s")
        if stopped.wait(_LOOK_EVERY):
            raise Stopped
    try:
        yield
    finally:
        os.close(descriptor)
