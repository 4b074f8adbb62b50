"""What is learned while serving and kept between runs: small JSON files that may be lost."""

import contextlib
import json
from pathlib import Path
from typing import Any


def keep(file: Path, data: Any) -> None:
    """Replaces the file in one step. A full disk costs only what was learned."""
    new = file.with_suffix(".new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(data))
        new.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
