"""What the server writes down, read in tests."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve.logs.writer import NAME, Writer, logging_begun
from serve.settings import Settings


@contextmanager
def logged(state: Path, form: str = "json") -> Iterator[Writer]:
    """As `palimpsest serve` has it. What is written is complete once this has ended."""
    with logging_begun(Settings.model_validate({"state": state, "log_format": form})) as writer:
        yield writer


def text(state: Path) -> str:
    return (state / "logs" / NAME).read_text()


def lines(state: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text(state).splitlines()]


def requests(state: Path) -> list[dict[str, Any]]:
    return [line for line in lines(state) if line["source"] == "request"]


def everything(folder: Path) -> bytes:
    """Of all files below the folder."""
    return b"\n".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())
