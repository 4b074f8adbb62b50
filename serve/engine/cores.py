"""How many cores this process may use, which is how many threads a worker computes with."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def usable(root: Path = Path("/")) -> int:
    """Counts the cores there are to use, at least 1. Hardware threads of one core count once: they share what computes.

    Of a quota of 1.5 cores, one thread would leave a third unused; two use all of it and rest a quarter of the time.

    root: where proc and sys are.
    """
    return max(1, min([_allowed(root), *(math.ceil(quota) for quota in _quotas(root))]))


def _allowed(root: Path) -> int:
    """Cores that the scheduler may run this process on; a cpuset is among what decides."""
    cpus = root / "sys/devices/system/cpu"
    threads = {cpu: _read(cpus / f"cpu{cpu}/topology/thread_siblings_list") for cpu in os.sched_getaffinity(0)}
    return len({siblings or cpu for cpu, siblings in threads.items()})


def _quotas(root: Path) -> Iterator[float]:
    """Returns the quotas, in cores, of this process's control groups and all of their parents, of version 2 and 1."""
    groups: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), group)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        place, _, filesystem = line.partition(" - ")
        top, mount = place.split()[3:5]
        kind, _, options = filesystem.split(maxsplit=2)
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            group = groups.get("" if kind == "cgroup2" else "cpu", top)
            for folder in _with_parents(root / mount.lstrip("/"), _inside(group, top)):
                yield from _quota(folder)


def _inside(group: str, top: str) -> Path:
    """Returns where the group is below its mount, which shows `top` and what is in it.

    A container sees its own group as that, whatever path it goes by outside.
    """
    path = Path(group)
    return path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else Path()


def _with_parents(mount: Path, inside: Path) -> list[Path]:
    return [mount / inside, *(mount / parent for parent in inside.parents)]


def _quota(folder: Path) -> Iterator[float]:
    """Reads a group's quota, if it has one: cpu.max is "150000 100000" or "max 100000", in version 1 -1 means none."""
    texts = _read(folder / "cpu.max").split() or [
        _read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    with suppress(ValueError):
        quota, period = map(int, texts)
        if quota > 0 < period:
            yield quota / period


def _read(file: Path) -> str:
    """Empty where it can't be read: not every kernel has it, nor every container shows it."""
    try:
        return file.read_text()
    except OSError:
        return ""
