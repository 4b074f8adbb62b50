"""A process's memory as the kernel counts it, in bytes; this one's where no other is named.

Never the whole proportional set size: that of the libraries changes whenever another Python on the machine ends.
"""

from collections.abc import Iterator
from pathlib import Path


def anonymous() -> int:
    """What it holds that no file could give back."""
    return _field(Path("/proc/self/smaps_rollup").read_text().splitlines(), "Anonymous:")


def in_huge_pages(pid: int) -> int:
    return _field(Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines(), "AnonHugePages:")


def proportional(file: Path) -> int:
    """This process's share of the file's pages that it has mapped in."""
    return sum(_field(lines, "Pss:") for lines in _mappings(file))


def private_pages(file: Path) -> int:
    """How much of the file's mapping has been written to, and so is a copy."""
    return sum(_field(lines, "Anonymous:") for lines in _mappings(file))


def _mappings(file: Path) -> Iterator[list[str]]:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.endswith(str(file)):
            yield lines[number + 1 : number + 24]


def _field(lines: list[str], name: str) -> int:
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
