"""Who is in memory: loads a model when a request names it, once, however many ask for it at the same time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from serve.residency.catalog import Archive


class Engine(Protocol):
    """The part of TorchServe that residency needs."""

    async def register(self, name: str, archive: Path) -> None: ...


class Scheduler:
    """Keeps one load per model; a failed one is forgotten, so that the next request tries again."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loads: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def lease(self, archive: Archive) -> AsyncIterator[None]:
        """Inside this context the model is loaded. Raises what the load raised."""
        # Shielded: a client that leaves must not end the load that others wait for.
        await asyncio.shield(self._load(archive))
        yield

    def _load(self, archive: Archive) -> asyncio.Task[None]:
        if archive.name not in self._loads:
            task = asyncio.create_task(self._engine.register(archive.engine_name, archive.path))
            task.add_done_callback(lambda done: self._on_load_done(archive.name, done))
            self._loads[archive.name] = task
        return self._loads[archive.name]

    def _on_load_done(self, name: str, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            del self._loads[name]
