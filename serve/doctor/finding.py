"""What a check says."""

from collections.abc import Iterator
from enum import StrEnum
from typing import NamedTuple


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """check: what was looked at. found: what is there. advice: what to do about it, unless it is ok."""

    check: str
    status: Status
    found: str
    advice: str = ""


Findings = Iterator[Finding]


def ok(check: str, found: str) -> Finding:
    return Finding(check, Status.OK, found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Status.WARNING, found, advice)


def problem(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Status.PROBLEM, found, advice)


def gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
