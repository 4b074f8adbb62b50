"""The models that there is code for, as each describes itself in handlers/<name>/description.py."""

import runpy
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from contract.description import Description

HANDLERS = Path(__file__).resolve().parent.parent / "handlers"


@cache
def descriptions(handlers: Path = HANDLERS) -> Mapping[str, Description]:
    """Reads each model's description, by the name of its folder. It is read by path: the server imports no handler."""
    files = sorted(handlers.glob("*/description.py"))
    return {file.parent.name: runpy.run_path(str(file))["DESCRIPTION"] for file in files}
