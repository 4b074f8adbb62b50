"""Which process of ours runs for a state folder: told by a file that names it, and when it began."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def held(file: Path) -> Iterator[None]:
    """Names this process in the file. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        yield
    finally:
        file.unlink(missing_ok=True)


def process_of(file: Path) -> psutil.Process | None:
    """The process that wrote the file, unless it is gone and its number was given to another."""
    try:
        pid, created = file.read_text().split()
        process = psutil.Process(int(pid))
        return process if process.create_time() == float(created) else None
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def terminate(process: psutil.Process, seconds: float) -> bool:
    """Asks it to end, and returns whether it has, within so many seconds."""
    process.terminate()
    deadline = time.monotonic() + seconds
    while _alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _alive(process: psutil.Process) -> bool:
    """False for a zombie, too: it has ended, and only whoever started it has not looked yet."""
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
