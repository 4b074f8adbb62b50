"""How many cores this process may use, which is how many threads a worker computes with."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from serve.engine import cgroups


def usable(root: Path = Path("/")) -> int:
    """Counts the cores there are to use, at least 1. Hardware threads of one core count once: they share what computes.

    Of a quota of 1.5 cores, one thread would leave a third unused; two use all of it and rest a quarter of the time.

    root: where proc and sys are.
    """
    return max(1, min([_allowed(root), *(math.ceil(quota) for quota in _quotas(root))]))


def _allowed(root: Path) -> int:
    """Cores that the scheduler may run this process on; a cpuset is among what decides."""
    cpus = root / "sys/devices/system/cpu"
    threads = {cpu: cgroups.read(cpus / f"cpu{cpu}/topology/thread_siblings_list") for cpu in os.sched_getaffinity(0)}
    return len({siblings or cpu for cpu, siblings in threads.items()})


def _quotas(root: Path) -> Iterator[float]:
    """Returns the quotas, in cores, of this process's control groups and all of their parents."""
    for folder in cgroups.folders("cpu", root):
        yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Reads a group's quota, if it has one: cpu.max is "150000 100000" or "max 100000", in version 1 -1 means none."""
    texts = cgroups.read(folder / "cpu.max").split() or [
        cgroups.read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    with suppress(ValueError):
        quota, period = map(int, texts)
        if quota > 0 < period:
            yield quota / period
