"""All checks, and what they say as a table or, for a report of a fault, as JSON."""

import json
import platform
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve import __version__
from serve.doctor import machine, software, store
from serve.doctor.finding import Finding, Status
from serve.settings import Settings

_STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.PROBLEM: "bold red"}


def examine(settings: Settings, runs: bool) -> list[Finding]:
    """Everything. runs: whether the server of these settings runs already."""
    return [
        *software.python(),
        *software.libraries(),
        *software.java(),
        *software.gpu(),
        *machine.ports(settings, runs),
        *machine.config(settings),
        *machine.keys(settings),
        *machine.disks(settings),
        *store.archives(settings),
        *machine.memory_files(),
        *machine.memory(settings),
        *machine.open_files(),
        *machine.locale(),
    ]


def show(findings: list[Finding], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("check", "", "found, and what to do"):
        table.add_column(heading, overflow="fold")
    for each in findings:
        told = Text(each.found) + Text(f"\n{each.advice}" if each.advice else "", style="italic")
        table.add_row(each.check, Text(each.status, style=_STYLES[each.status]), told)
    console.print(table)


def as_json(findings: list[Finding]) -> str:
    """Without secrets: no environment, no settings but those that a finding is about, home folders as ~."""
    told: dict[str, Any] = {
        "palimpsest": __version__,
        "system": platform.platform(),
        "checks": [each._asdict() for each in findings],
    }
    return _without_home(json.dumps(told, indent=2, ensure_ascii=False))


def _without_home(text: str) -> str:
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if home != "/" else text
