"""What the stages of one request take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings:
    """seconds: by stage, in the order of their ends. A stage within another is its own, and no part of the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before, began = sum(self.seconds.values()), time.perf_counter()
        try:
            yield
        finally:
            within = sum(self.seconds.values()) - before
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began - within
