"""Tiny archives, one per failure: what a model can do wrong, without a network or weights."""

import json
import shutil
from pathlib import Path
from typing import Any

HANDLER = Path(__file__).with_name("handler.py")


def write_archive(
    store: Path, name: str, startup_timeout: int = 30, response_timeout: int = 30, **behaviour: Any
) -> Path:
    """Writes STORE/<name> in the no-archive layout; `behaviour` is what tests/zoo/handler.py reads.

    Timeouts are in seconds and TorchServe's own.
    """
    folder = store / name
    (folder / "MAR-INF").mkdir(parents=True)
    shutil.copy(HANDLER, folder / "handler.py")
    model = {
        "modelName": Path(name).name,
        "handler": "handler.py",
        "modelVersion": "1.0",
        "configFile": "model-config.yaml",
    }
    manifest = {"createdOn": "", "runtime": "python", "archiverVersion": "0.12.0", "model": model}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
    lines = ["minWorkers: 1", "maxWorkers: 1", "batchSize: 1", "maxBatchDelay: 1"]
    lines += [f"startupTimeout: {startup_timeout}", f"responseTimeout: {response_timeout}", "handler:"]
    lines += [f"  {key}: {json.dumps(value)}" for key, value in ({"memory_mib": 64} | behaviour).items()]
    (folder / "model-config.yaml").write_text("\n".join(lines) + "\n")
    return folder
