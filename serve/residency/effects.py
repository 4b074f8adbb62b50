"""Loads, parkings, suspensions, wakings and unloads while they run: tasks, at most one per model, and how each ends."""

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Protocol, TypeVar

from serve.errors import ModelLoadFailed, PalimpsestError
from serve.residency.model import Model, State, Taken
from serve.store.catalog import Archive

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What residency needs done. Errors are PalimpsestErrors; a load that is cancelled leaves nothing behind."""

    async def load(self, archive: Archive) -> int:
        """Starts the model and returns the bytes that it takes; OutOfMemory or ModelLoadFailed leave nothing behind."""

    async def unload(self, archive: Archive) -> None:
        """Returns once the worker is gone and the device reports its memory back, or after a bound."""

    async def park(self, archive: Archive) -> Taken:
        """Moves the weights to host memory; where that fails, the model can still be unloaded."""

    async def suspend(self, archive: Archive) -> Taken:
        """Takes a parked model off the device altogether; where that fails, the model can still be unloaded."""

    async def wake(self, archive: Archive) -> Taken:
        """Moves the weights back; the copy in host memory may stay. After OutOfMemory a model that was parked is so as
        before; whatever fails for one that was suspended, it can only be unloaded.
        """


class Ends(Protocol):
    """Who is told how an effect ended: with a result or an error, after so many seconds."""

    def on_loaded(self, model: Model, outcome: int | PalimpsestError, seconds: float) -> None: ...

    def on_parked(self, model: Model, outcome: Taken | PalimpsestError, seconds: float) -> None: ...

    def on_suspended(self, model: Model, outcome: Taken | PalimpsestError, seconds: float) -> None: ...

    def on_woken(self, model: Model, outcome: Taken | PalimpsestError, seconds: float) -> None: ...

    def on_unloaded(self, model: Model, seconds: float) -> None: ...


class Effects:
    """on_end: called after any of them, and after one that was cancelled."""

    def __init__(self, engine: Engine, ends: Ends, on_end: Callable[[], None]) -> None:
        self._engine, self._ends, self._on_end = engine, ends, on_end
        self._tasks: list[asyncio.Task[None]] = []

    def load(self, model: Model) -> None:
        model.to(State.LOADING)
        self._start(model, self._run(model, State.LOADING, "loaded", self._engine.load, self._ends.on_loaded))

    def park(self, model: Model) -> None:
        model.to(State.PARKING)
        self._start(model, self._run(model, State.PARKING, "parked", self._engine.park, self._ends.on_parked))

    def suspend(self, model: Model) -> None:
        """Suspends a model that is in the state already, in which it may have waited for room."""
        run = self._run(model, State.SUSPENDING, "suspended", self._engine.suspend, self._ends.on_suspended)
        self._start(model, run)

    def wake(self, model: Model) -> None:
        model.to(State.WAKING)
        self._start(model, self._run(model, State.WAKING, "woken", self._engine.wake, self._ends.on_woken))

    def unload(self, model: Model) -> None:
        model.to(State.UNLOADING)
        model.away = None
        self._start(model, self._unload(model))

    def cancel(self) -> list[asyncio.Task[None]]:
        """Returns those that are now ending."""
        for task in self._tasks:
            task.cancel()
        return list(self._tasks)

    def _start(self, model: Model, effect: Coroutine[Any, Any, None]) -> None:
        # It is no single request's, although one may have brought it about: what it logs names none.
        model.effect = asyncio.create_task(effect, context=contextvars.Context())
        self._tasks.append(model.effect)
        model.effect.add_done_callback(partial(self._end, model))

    def _end(self, model: Model, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if model.effect is task:  # another may have begun in the moment in which this one ended
            model.effect = None
        if not task.cancelled() and (bug := task.exception()):
            logger.error("%s: residency failed", model.archive.name, exc_info=bug)
        self._on_end()

    async def _run(
        self,
        model: Model,
        state: State,
        done: str,
        act: Callable[[Archive], Awaitable[Result]],
        on_end: Callable[[Model, Result | PalimpsestError, float], None],
    ) -> None:
        """Runs one effect. If the state is not `state` at its end, engine or worker was lost, and nobody is told."""
        began = _now()
        outcome = await _outcome(model, done, act)
        if model.state is state:
            on_end(model, outcome, _now() - began)

    async def _unload(self, model: Model) -> None:
        began = _now()
        outcome = await _outcome(model, "unloaded", self._engine.unload)
        if outcome is not None:
            logger.error("%s could not be unloaded cleanly: %s", model.archive.name, outcome.message)
        if model.state is State.UNLOADING:
            self._ends.on_unloaded(model, _now() - began)


async def _outcome(model: Model, done: str, act: Callable[[Archive], Awaitable[Result]]) -> Result | PalimpsestError:
    try:
        return await act(model.archive)
    except PalimpsestError as error:
        return error
    except Exception:
        logger.exception("%s could not be %s", model.archive.name, done)
        return ModelLoadFailed(f"{model.archive.name!r} could not be {done}: an internal error, see the log")


def _now() -> float:
    return asyncio.get_running_loop().time()
