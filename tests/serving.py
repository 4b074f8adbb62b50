"""Running `palimpsest serve` in tests, and looking at what it leaves."""

import base64
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

ROOT = Path(__file__).parent.parent
PALIMPSEST = Path(sys.executable).parent / "palimpsest"
FIRST_PORT, PORTS_EACH = 20_000, 1_500  # above those that Ray's workers take


class Server:
    """A running `palimpsest serve`; `family` is every process that it has started so far."""

    def __init__(self, process: subprocess.Popen[str], port: int, folder: Path) -> None:
        self.process, self.port, self.folder = process, port, folder
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)

    def ask(self, model: str, **fields: Any) -> dict[str, Any]:
        plain = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in fields.items()}
        answer = self.http.post(f"/predictions/{model}", json=plain)
        assert answer.status_code == 200, answer.text[:500]
        return dict(answer.json())

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self, model: str) -> psutil.Process:
        """Of the archive in a folder of that name. Waits for it: a process has no command line for a moment while it
        turns into another program."""
        found: list[psutil.Process] = []
        until(lambda: bool(found.extend(p for p in self.family() if is_worker(p, model)) or found))
        return found[0]

    def leftovers(self, family: list[psutil.Process]) -> list[Any]:
        """What a clean end must not leave: processes of the family, files in the temporary folder."""
        _, alive = psutil.wait_procs(family, timeout=60)
        return [*alive, *(self.folder / "tmp").iterdir()]


def is_worker(process: psutil.Process, model: str) -> bool:
    try:
        return Path(process.cwd()).name == model and "model_service_worker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code that a page of the documentation shows. page: its path in the repository."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def _ports() -> Iterator[int]:
    """Below those that the system gives away by itself: one that is free stays free until its server takes it.

    A connection to a port of those that nobody listens on may even get that port for its own end, and meet itself.
    Every process that runs tests has numbers of its own.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    first = FIRST_PORT + PORTS_EACH * process
    begin = random.randrange(PORTS_EACH)
    return cycle(first + (begin + each) % PORTS_EACH for each in range(PORTS_EACH))


def free_port() -> int:
    for port in islice(_PORTS, PORTS_EACH):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


_PORTS = _ports()


def environment(port: int, folder: Path, store: Path, models: str = "demo") -> dict[str, str]:
    (folder / "tmp").mkdir(exist_ok=True)
    return os.environ | {
        "PALIMPSEST_PORT": str(port),
        "PALIMPSEST_STATE": str(folder / "state"),
        "PALIMPSEST_STORE": str(store),
        "PALIMPSEST_CACHE": str(folder / "cache"),
        "PALIMPSEST_MODELS": models,
        "TMPDIR": str(folder / "tmp"),
    }


def palimpsest(tree: Path | None = None) -> list[str]:
    """The command of a source tree: the installed one runs this repository's."""
    return [str(PALIMPSEST)] if tree is None else [sys.executable, "-c", "from serve.cli import run; run()"]


def own_path(tree: Path | None) -> dict[str, str]:
    return {} if tree is None else {"PYTHONPATH": str(tree)}


@contextmanager
def serving(
    folder: Path, store: Path, models: str = "demo", cpu_only: bool = False, tree: Path | None = None
) -> Iterator[Server]:
    """cpu_only: even where there is a GPU, for models that take main memory whatever there is. tree: whose code, where
    not this repository's."""
    if models == "full":
        name_full_set(store)
    port = free_port()
    log = (folder / "serve.log").open("w+")
    environ = environment(port, folder, store, models) | ({"CUDA_VISIBLE_DEVICES": ""} if cpu_only else {})
    # A process group of its own, as a shell's job has: Ctrl-C goes to all of it.
    process = subprocess.Popen(
        [*palimpsest(tree), "serve"],
        cwd=tree or ROOT,
        env=environ | own_path(tree),
        stdout=log,
        stderr=log,
        text=True,
        process_group=0,
    )
    server = Server(process, port, folder)
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.http.close()
        process.terminate()
        process.wait(60)
        log.close()


def wait_until_ready(server: Server) -> None:
    transport = httpx.HTTPTransport(retries=5)
    with httpx.Client(transport=transport, timeout=60) as client:
        while server.process.poll() is None:
            try:
                if client.get(f"http://127.0.0.1:{server.port}/ping").status_code == 200:
                    return
            except httpx.TransportError:
                continue
    raise AssertionError((server.folder / "serve.log").read_text())


def name_full_set(store: Path) -> None:
    """Lets `MODELS=full` serve a store without the three archives that it asks for: they are named, never loaded."""
    for name in ("sam", "lama", "sd"):
        if not (store / name).exists():
            (store / name / "MAR-INF").mkdir(parents=True)
            (store / name / "MAR-INF" / "MANIFEST.json").write_text("{}")


@contextmanager
def small_disk(folder: Path, size: str = "1m", files: int = 1000) -> Iterator[Path]:
    """A disk of its own in the folder, which is made. size: as mount has it."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={files}", "none", folder]
    if os.geteuid() != 0 or subprocess.run(mount).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, files: bool = False) -> Callable[[], None]:
    """Leaves no byte on it, nor one more file; returns what makes room again."""
    filler = disk / "filler"
    filler.mkdir()
    with suppress(OSError), (filler / "bytes").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with suppress(OSError):
        for number in count() if files else ():
            (filler / str(number)).touch()
    return lambda: shutil.rmtree(filler)


def descriptors(pid: int | str = "self") -> Counter[str]:
    """Of a process, by what they are: memfd, socket, anon_inode (a process, say), pipe, a file's path."""
    kinds = Counter[str]()
    for each in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{each}")
            kinds["memfd" if target.startswith("/memfd:") else target.partition(":")[0]] += 1
    return kinds


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
