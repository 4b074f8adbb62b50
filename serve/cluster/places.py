"""The places that a machine has for boxes: one for each GPU, or for some cores where there is none."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pynvml

from serve.engine import cores

CORES = 4  # of a box, where there is no GPU


class Place(NamedTuple):
    """number: from 0, of this machine. state: the folder of the box that has it, and outlives that."""

    number: int
    state: Path


def places_here() -> int:
    return len(gpus()) or max(1, cores.usable() // CORES)


def gpus() -> list[str]:
    """By index or UUID: those that CUDA_VISIBLE_DEVICES names, else all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each for each in map(str.strip, named.split(",")) if each not in ("", "-1")]
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return []


@contextlib.contextmanager
def claimed(state: Path) -> Iterator[Place]:
    """The first that no other process has; the kernel frees it with the process, however that ends."""
    for number in count():
        folder = state / f"box-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        try:
            yield Place(number, folder)
        finally:
            os.close(lock)
        return
