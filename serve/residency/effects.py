"""Loads and unloads while they run: the tasks, at most one per model, and how each ends."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

from serve.errors import ModelLoadFailed, PalimpsestError
from serve.residency.catalog import Archive
from serve.residency.model import Model, State

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What residency needs done. Errors are PalimpsestErrors; a load that is cancelled leaves nothing behind."""

    async def load(self, archive: Archive) -> int:
        """Starts the model and returns the bytes that it takes; OutOfMemory or ModelLoadFailed leave nothing behind."""

    async def unload(self, archive: Archive) -> None:
        """Returns once the worker is gone and the device reports its memory back, or after a bound."""


class Effects:
    """on_loaded: told of the bytes taken or the error, and the seconds. on_unloaded: told of the seconds. on_end:
    called after either, and after an effect that was cancelled."""

    def __init__(
        self,
        engine: Engine,
        on_loaded: Callable[[Model, int | PalimpsestError, float], None],
        on_unloaded: Callable[[Model, float], None],
        on_end: Callable[[], None],
    ) -> None:
        self._engine, self._on_loaded, self._on_unloaded, self._on_end = engine, on_loaded, on_unloaded, on_end
        self._tasks: list[asyncio.Task[None]] = []

    def load(self, model: Model) -> None:
        model.to(State.LOADING)
        self._start(model, self._load(model))

    def unload(self, model: Model) -> None:
        model.to(State.UNLOADING)
        self._start(model, self._unload(model))

    def cancel(self) -> list[asyncio.Task[None]]:
        """Returns those that are now ending."""
        for task in self._tasks:
            task.cancel()
        return list(self._tasks)

    def _start(self, model: Model, effect: Coroutine[Any, Any, None]) -> None:
        model.effect = asyncio.create_task(effect)
        self._tasks.append(model.effect)
        model.effect.add_done_callback(partial(self._end, model))

    def _end(self, model: Model, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if model.effect is task:  # an unload may have begun in the moment in which the load ended
            model.effect = None
        if not task.cancelled() and (bug := task.exception()):
            logger.error("%s: residency failed", model.archive.name, exc_info=bug)
        self._on_end()

    async def _load(self, model: Model) -> None:
        began = _now()
        outcome: int | PalimpsestError
        try:
            outcome = await self._engine.load(model.archive)
        except PalimpsestError as error:
            outcome = error
        except Exception:
            logger.exception("%s could not be loaded", model.archive.name)
            outcome = ModelLoadFailed(f"{model.archive.name!r} cannot be loaded: an internal error, see the log")
        if model.state is State.LOADING:  # else the engine was lost meanwhile
            self._on_loaded(model, outcome, _now() - began)

    async def _unload(self, model: Model) -> None:
        began = _now()
        try:
            await self._engine.unload(model.archive)
        except PalimpsestError as error:
            logger.error("%s could not be unloaded cleanly: %s", model.archive.name, error.message)
        except Exception:
            logger.exception("%s could not be unloaded cleanly", model.archive.name)
        if model.state is State.UNLOADING:
            self._on_unloaded(model, _now() - began)


def _now() -> float:
    return asyncio.get_running_loop().time()
