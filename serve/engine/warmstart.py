"""Keeps the zygote running beside one TorchServe, and counts the workers that had to start without it."""

import asyncio
import logging
import os
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from serve.descriptions import descriptions
from serve.engine import launcher, processes, zygote

logger = logging.getLogger(__name__)

# Seconds that a launcher waits for its fork: about what importing the libraries itself would take.
PATIENCE = 25.0
# Seconds that a zygote may import, from a cold disk on a busy machine.
READY_WITHIN = 45.0
STANDBY_ENDS = 1.0  # seconds that the zygote gets to end one before it is ended itself
MAX_BACKOFF = 60.0
LOG_BYTES = 2**20  # of the zygote's log; it writes a few lines at each start
MAX_ENDS = 1000  # archives whose worker has ended and nobody has asked
# So many in a row that never became ready, and workers start slowly without waiting, for so many seconds.
GIVE_UP_AFTER = 3
REST = 600.0


class WarmStarts:
    """The zygote of the running TorchServe. slow_starts, zygote_restarts, standby_starts: since the server started.

    libraries: what the zygote imports; by default all that any model's worker does. patience, ready_within: seconds
    that a launcher waits for its fork, and that a zygote may import. preparation: the file that a standby worker runs
    ahead (standby.py); None: there is to be none.
    """

    def __init__(
        self,
        libraries: Sequence[str] | None = None,
        patience: float = PATIENCE,
        ready_within: float = READY_WITHIN,
        preparation: Path | None = None,
    ) -> None:
        self._libraries = all_libraries() if libraries is None else libraries
        self._patience, self._ready_within, self._preparation = patience, ready_within, preparation
        self._zygotes_address = ""
        self._reports: socket.socket | None = None
        self._runner: asyncio.Task[None] | None = None
        self.zygote: asyncio.subprocess.Process | None = None
        self.ready = asyncio.Event()
        self._ends: dict[str, str] = {}
        self.slow_starts = 0
        self.zygote_restarts = 0
        self._no_standby = asyncio.Event()
        self._no_standby.set()
        self.standby_is_ready = False
        self.standby_starts = 0
        self.on_standby: Callable[[], None] = lambda: None

    def start(self, home: Path, environment: Mapping[str, str], log: Path) -> str:
        """Starts the zygote, without waiting for it, and returns what TorchServe is to take for its Python.

        home: an empty folder, for the sockets and the launcher. environment: that of TorchServe. log: for its output.
        """
        python = self._write_launcher(home)
        if not os.access(python, os.X_OK):
            logger.warning("programs in %s may not be executed: every worker starts slowly", home)
            return sys.executable
        self._reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._reports.setblocking(False)
        self._reports.bind(str(home / "starts"))
        asyncio.get_running_loop().add_reader(self._reports, self._read_report, self._reports)
        self._zygotes_address = str(home / "zygote")
        addresses = self._zygotes_address, str(home / "starts")
        command = [sys.executable, zygote.__file__, *addresses, str(self._preparation or ""), *self._libraries]
        self._runner = asyncio.create_task(self._keep_running(command, home, environment, log))
        return str(python)

    async def wait(self, timeout: float) -> bool:
        """Whether workers start fast, at the latest after `timeout` seconds; at once where they never will."""
        if self._runner is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.ready.wait(), timeout)
        return self.ready.is_set()

    async def stop(self) -> None:
        """Ends the zygote and the standby. Its workers live on until their launchers end."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self._runner = None
        if self.standby:
            # By its parent, which reaps it.
            self.dismiss_standby()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._no_standby.wait(), STANDBY_ENDS)
        if self.zygote is not None:
            await processes.end(self.zygote)
            self.zygote = None
        if self._reports is not None:
            asyncio.get_running_loop().remove_reader(self._reports)
            self._reports.close()
            self._reports = None
        self.ready.clear()
        self._no_standby.set()
        self.standby_is_ready = False

    @property
    def standby(self) -> bool:
        """Whether there is one or will be."""
        return not self._no_standby.is_set()

    def prepare_standby(self) -> None:
        """Has a standby worker made, if there is none; on_standby is called when there is one no more.

        Of no effect before the zygote is ready, which on_standby tells as well.
        """
        if self.ready.is_set() and self._preparation and not self.standby and self._tell(zygote.PREPARE):
            self._no_standby.clear()

    def dismiss_standby(self) -> None:
        """Ends it, wherever it has come to."""
        self._tell(zygote.DISMISS)

    def _tell(self, wish: bytes) -> bool:
        """Whether the zygote will read it, unless it dies."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client, suppress(OSError):
            client.setblocking(False)
            client.connect(self._zygotes_address)
            client.send(wish)
            return True
        return False

    def take_end(self, folder: str) -> str:
        """How a worker in the folder has ended since the last call: "killed" by a signal, "ended" by itself, or ""."""
        return self._ends.pop(folder, "")

    async def _keep_running(
        self, command: Sequence[str], home: Path, environment: Mapping[str, str], log: Path
    ) -> None:
        backoff, failures = 0.0, 0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            with _opened(log) as output:
                self.zygote = await processes.start(*command, cwd=home, env=environment, stdout=output, stderr=output)
            failures = 0 if await self._until_ready(self.zygote) else failures + 1
            code = await self.zygote.wait()
            self.ready.clear()
            self._lose_standby()
            logger.error("the zygote ended with code %d: workers start slowly until it is back; see %s", code, log)
            if failures >= GIVE_UP_AFTER:
                failures = 0
                logger.error("it failed %d times in a row: the next try is in %g s", GIVE_UP_AFTER, REST)
                await asyncio.sleep(REST)
            backoff = 0.0 if loop.time() - began > MAX_BACKOFF else backoff
            await asyncio.sleep(backoff)
            backoff = min(MAX_BACKOFF, 2 * backoff + 1)
            self.zygote_restarts += 1

    async def _until_ready(self, zygote: asyncio.subprocess.Process) -> bool:
        """Whether it has become ready, rather than ended. Kills one that imports for too long."""
        ready, ended = asyncio.create_task(self.ready.wait()), asyncio.create_task(zygote.wait())
        try:
            done, _ = await asyncio.wait(
                {ready, ended}, timeout=self._ready_within, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            ready.cancel()
            ended.cancel()
        if not done:
            logger.error("the zygote is not ready after %g s", self._ready_within)
            with suppress(ProcessLookupError):
                zygote.kill()
        return ready in done

    def _write_launcher(self, home: Path) -> Path:
        """One file, as TorchServe wants it; for a shell, as the path in a #! line must be short and have no blanks."""
        file = home / "python"
        python = [sys.executable, "-ISB", launcher.__file__, str(home / "zygote"), str(home / "starts")]
        file.write_text(f'#!/bin/sh\nexec {shlex.join([*python, str(self._patience), sys.executable])} "$@"\n')
        file.chmod(0o700)
        return file

    def _read_report(self, reports: socket.socket) -> None:
        with suppress(BlockingIOError):
            report = reports.recv(zygote.LARGEST)
            if report == zygote.READY:
                self.ready.set()
                self.on_standby()
                return
            if report == zygote.STANDBY_READY:
                self.standby_is_ready = True
                return
            if report in (zygote.STANDBY_TAKEN, zygote.STANDBY_GONE):
                self.standby_starts += report == zygote.STANDBY_TAKEN
                self._lose_standby()
                return
            how, _, folder = report.partition(b": ")
            if how + b": " in (zygote.KILLED, zygote.ENDED):
                self._ends[os.fsdecode(folder)] = how.decode()
                while len(self._ends) > MAX_ENDS:
                    del self._ends[next(iter(self._ends))]
                return
            self.slow_starts += 1
            logger.warning("a worker starts slowly: %s", report.decode(errors="replace"))
            # One that still imports may yet become ready; one that was ready and is silent hangs.
            if self.ready.is_set() and report.decode(errors="replace").endswith(launcher.NO_ANSWER) and self.zygote:
                self.zygote.kill()

    def _lose_standby(self) -> None:
        self._no_standby.set()
        self.standby_is_ready = False
        self.on_standby()


def all_libraries() -> list[str]:
    """What any model's worker imports, each once."""
    models = descriptions().values()
    return list(dict.fromkeys([*zygote.LIBRARIES, *(name for model in models for name in model.imports)]))


def _opened(log: Path) -> BinaryIO:
    """Opens the log for adding to it, anew where it is large; where the disk has no room for one more file, nothing is
    kept.
    """
    try:
        return log.open("wb" if log.exists() and log.stat().st_size > LOG_BYTES else "ab")
    except OSError:
        return open(os.devnull, "ab")
