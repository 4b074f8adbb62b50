"""The control groups that this process is in, of version 2 and 1."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_NO_LIMIT = 2**60  # bytes; version 1 says so by the largest number that it can


def folders(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The group's folder and those of all its parents, with the controller's files. root: where proc and sys are."""
    groups: dict[str, str] = {}
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), group)
    for line in read(root / "proc/self/mountinfo").splitlines():
        place, _, filesystem = line.partition(" - ")
        top, mount = place.split()[3:5]
        kind, _, options = filesystem.split(maxsplit=2)
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            group = groups.get("" if kind == "cgroup2" else controller, top)
            yield from _with_parents(root / mount.lstrip("/"), _inside(group, top))


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of main memory that it may have, with all that is in the group; None where nothing limits it."""
    limits = []
    for folder in folders("memory", root):
        with suppress(ValueError):
            limits.append(int(read(folder / "memory.max") or read(folder / "memory.limit_in_bytes")))
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def read(file: Path) -> str:
    """Empty where it can't be read: not every kernel has it, nor every container shows it."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _inside(group: str, top: str) -> Path:
    """Returns where the group is below its mount, which shows `top` and what is in it.

    A container sees its own group as that, whatever path it goes by outside.
    """
    path = Path(group)
    return path.relative_to(top) if path.is_relative_to(top) and ".." not in path.parts else Path()


def _with_parents(mount: Path, inside: Path) -> list[Path]:
    return [mount / inside, *(mount / parent for parent in inside.parents)]
