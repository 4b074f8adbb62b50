"""One request to one model: when it waited, when it had the model, when it was answered."""

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from serve.logs.record import Asked
from serve.residency.model import Model


@dataclass
class Invocation:
    """One request to a model, the archive of that name. status: of its answer; 0 while there is none.

    waits_for: "load" where its model is not in memory, else "queue". began: when it was asked.
    entered: when it went to the engine for the first time. engine_seconds: time in the engine, all tries together.
    came: when the load that it waited for began and ended. worker: what the worker says of its stages.
    """

    name: str
    waits_for: str
    began: float
    status: int = 0
    entered: float = 0.0
    engine_seconds: float = 0.0
    came: tuple[float, float] | None = None
    worker: Mapping[str, float] = field(default_factory=dict)

    @property
    def timings(self) -> dict[str, float]:
        """Returns the timings so far, as contract.timings has them."""
        if not self.entered:
            return {self.waits_for: time.perf_counter() - self.began}
        return {self.waits_for: self.entered - self.began, "engine": self.engine_seconds, **self.worker}

    @property
    def asked(self) -> Asked:
        now = time.perf_counter()
        return Asked(self.name, self.began, self.entered or None, now, self.came, self.worker)

    def gets(self, model: Model) -> None:
        """The model is this request's from now on."""
        if model.arrived is not None:
            seconds, ago = model.arrived.seconds, asyncio.get_running_loop().time() - model.arrived.when
            ended = time.perf_counter() - ago
            self.came = (ended - seconds, ended) if ended > self.began else None

    @contextmanager
    def in_engine(self) -> Iterator[None]:
        began = time.perf_counter()
        self.entered = self.entered or began
        try:
            yield
        finally:
            self.engine_seconds += time.perf_counter() - began
