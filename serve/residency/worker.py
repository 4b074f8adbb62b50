"""One worker's process, watched: a process file descriptor tells at once when it ends."""

import asyncio
import os
from collections.abc import Callable


class Worker:
    """died: done as soon as it has ended. look_again, look_at_work: when its memory may be looked at, between two
    requests and in the middle of one, in the event loop's seconds. report: asks it for the phases of its start.
    suspended: whether the driver has taken it off its GPU.
    """

    def __init__(self, pid: int, on_death: Callable[["Worker"], None]) -> None:
        """on_death: called when it ends while it is watched. Raises ProcessLookupError where it has ended already."""
        self.pid, self._on_death = pid, on_death
        self._descriptor = os.pidfd_open(pid)
        loop = asyncio.get_running_loop()
        self.died: asyncio.Future[None] = loop.create_future()
        self.look_again = self.look_at_work = 0.0
        self.report: asyncio.Task[None] | None = None
        self.suspended = False
        loop.add_reader(self._descriptor, self._end)

    def close(self) -> None:
        """Watches it no longer; a second call does nothing."""
        if self.report is not None:
            self.report.cancel()
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def mark_dead(self) -> None:
        """Notes that it has ended."""
        self.close()
        if not self.died.done():
            self.died.set_result(None)

    async def ends_within(self, seconds: float) -> bool:
        await asyncio.wait({self.died}, timeout=seconds)
        return self.died.done()

    def _end(self) -> None:
        self.mark_dead()
        self._on_death(self)
