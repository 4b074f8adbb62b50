"""An event loop whose clock jumps to the next timer as soon as nothing else is to be done."""

import asyncio
import math
import selectors


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._clock, self._until = 0.0, math.inf
        super().__init__(_NoWaiting(self))

    def time(self) -> float:
        return self._clock

    def run_for(self, seconds: float) -> None:
        """Runs what happens in the next `seconds`, which pass at once; 0: all that needs no time to pass."""
        self._until = self._clock + seconds
        self.run_forever()
        self._until = math.inf

    def nothing_to_do(self, timeout: float | None) -> None:
        """Called where a real loop would sleep for `timeout` seconds; None: for ever."""
        then = math.inf if timeout is None else self._clock + timeout
        if then > self._until:
            self._clock = self._until
            self.stop()
        elif then == math.inf:
            raise RuntimeError("this would wait for ever: no timer is set and nothing can happen")
        else:
            self._clock = then


class _NoWaiting(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self._loop.nothing_to_do(timeout)
        return []
