"""The zygote and its launchers as real processes: with tiny scripts for workers, then through a real TorchServe."""

import asyncio
import ctypes
import functools
import json
import os
import select
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE, Popen, check_output
from typing import Any

import psutil
import pytest
import ts
import yaml
from residence import in_huge_pages
from zoo import write_archive

from serve.engine import launcher, processes, warmstart, zygote
from serve.engine.supervisor import Supervisor
from serve.engine.warmstart import WarmStarts
from serve.residency.memory import HostDevice
from serve.settings import Settings

IN_TIME = 60.0  # seconds that anything here may take
KERNEL_COLLAPSES = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 1)  # MADV_COLLAPSE
TINY = ("json",)  # what a zygote imports where the libraries do not matter

SAY_PARENT = "import os; print(os.getpid(), os.getppid(), flush=True)\n"
UNTIL_STDIN_ENDS = SAY_PARENT + "import sys; sys.stdin.read()\n"
FOR_EVER = SAY_PARENT + "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass\n"


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        asyncio.run(test(*arguments, **fixtures))

    return run


@pytest.fixture(autouse=True)
def parent_of_orphans() -> Iterator[None]:
    """As in the server; not for the tests that come after these."""
    processes.adopt_orphans()
    yield
    ctypes.CDLL(None).prctl(processes.PR_SET_CHILD_SUBREAPER, 0)


class Bench(WarmStarts):
    """A zygote with a folder of its own, and workers that are scripts."""

    def __init__(
        self,
        folder: Path,
        libraries: tuple[str, ...],
        patience: float,
        ready_within: float,
        preparation: Path | None = None,
    ) -> None:
        super().__init__(libraries, patience, ready_within, preparation)
        self.home = folder / "home"
        self.home.mkdir()
        self.work = folder / "work"
        self.work.mkdir()
        self.log = folder / "zygote.log"
        self.launched: list[Popen[bytes]] = []
        # A library of a test lies in `folder`.
        self.environment = os.environ | {"TMPDIR": str(self.home), "PYTHONPATH": str(folder)}

    @property
    def zygote_pid(self) -> int:
        assert self.zygote is not None
        return self.zygote.pid

    def launch(self, script: str, *arguments: str, python: str | None = None, **environment: str) -> Popen[bytes]:
        """Starts a worker as TorchServe does; python: a plain interpreter instead of the launcher."""
        file = self.work / launcher.WORKER
        file.write_text(script)
        command = [python or str(self.home / "python"), str(file), *arguments]
        environment = self.environment | environment
        process = Popen(command, cwd=self.work, env=environment, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        self.launched.append(process)
        return process

    async def run(self, script: str, *arguments: str, **options: str) -> tuple[int, bytes, bytes]:
        """Its exit code, standard output and error."""
        process = self.launch(script, *arguments, **options)
        output, errors = await asyncio.to_thread(process.communicate, b"from stdin", IN_TIME)
        return process.returncode, output, errors

    async def at_rest(self) -> None:
        """Until the zygote has no children and has done all that their ends ask for.

        It does one thing at a time: what it hears after the last child is reaped, it hears when it has closed all that
        the child left open.
        """
        await until(lambda: psutil.Process(self.zygote_pid).children() == [])
        await asyncio.to_thread(self._until_heard)

    def _until_heard(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(IN_TIME)
            client.connect(str(self.home / "zygote"))
            client.send(zygote.DISMISS)
            assert client.recv(1) == b""


@asynccontextmanager
async def bench(
    folder: Path,
    libraries: tuple[str, ...] = TINY,
    patience: float = IN_TIME,
    ready_within: float = IN_TIME,
    until_ready: bool = True,
    preparation: Path | None = None,
) -> AsyncIterator[Bench]:
    running = Bench(folder, libraries, patience, ready_within, preparation)
    running.start(running.home, running.environment, running.log)
    try:
        if until_ready:
            await ready(running)
        yield running
    finally:
        await running.stop()
        for process in running.launched:
            process.kill()
            process.communicate()
        processes.kill_all(running.home)
        assert psutil.Process().children(recursive=True) == []


async def ready(warm: WarmStarts) -> None:
    await asyncio.wait_for(warm.ready.wait(), IN_TIME)


async def pids_of(process: Popen[bytes]) -> tuple[int, int]:
    """A worker's own id and its parent's, by UNTIL_STDIN_ENDS or FOR_EVER."""
    assert process.stdout is not None
    pid, parent = map(int, (await asyncio.to_thread(process.stdout.readline)).split())
    return pid, parent


async def code_of(process: Popen[bytes]) -> int:
    return await asyncio.to_thread(process.wait, IN_TIME)


def ends(pid: int) -> bool:
    """Whether the process ends in time, reaped or not."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], IN_TIME)[0])
    finally:
        os.close(descriptor)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(IN_TIME):
        while not condition():
            await asyncio.sleep(0.01)


DESCRIBE_YOURSELF = """
import gc, json, os, runpy, signal, subprocess, sys
print(json.dumps({
    "arguments": sys.argv, "environment": dict(os.environ), "folder": os.getcwd(), "path": sys.path, "main": __name__,
    "file": __file__, "executable": sys.executable, "flags": list(sys.flags), "stdin": sys.stdin.read(),
    "c environment": sorted(subprocess.check_output("env", text=True).splitlines()), "collects": gc.isenabled(),
    "handlers": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "mask": os.umask(0),
    "descriptors": len(os.listdir("/proc/self/fd")), "line buffered": sys.stdout.line_buffering,
    "shown": open("/proc/self/cmdline").read().rstrip(chr(0)).split(chr(0)),
}))
print("a complaint", file=sys.stderr)
"""


@pytest.mark.slow
@in_event_loop
async def test_a_forked_worker_finds_what_a_fresh_one_would(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    # An empty folder at the end of PYTHONPATH is what TorchServe leaves there.
    options = {"TS_OWN": "1", "PYTHONPATH": f"{tmp_path}:other:{tmp_path / 'work'}:"}
    async with bench(tmp_path) as warm:
        code, output, errors = await warm.run(DESCRIBE_YOURSELF, "--name", "é value", **options)
        fresh_code, fresh_output, fresh_errors = await warm.run(
            DESCRIBE_YOURSELF, "--name", "é value", python=sys.executable, **options
        )
        assert warm.slow_starts == 0
    assert (code, errors) == (fresh_code, fresh_errors) == (0, b"a complaint\n")
    forked, fresh = json.loads(output), json.loads(fresh_output)
    (title,) = forked.pop("shown")
    assert shlex.split(title)[2:] == fresh.pop("shown")[2:]
    assert float(forked["environment"]["PALIMPSEST_WORKER_STARTED"]) > 0
    for worker in forked, fresh:
        # Those of the launcher and of the shell that starts it.
        for name in ("PALIMPSEST_WORKER_STARTED", "PWD", "OLDPWD", "SHLVL", "_"):
            value = worker["environment"].pop(name, None)
            if f"{name}={value}" in worker["c environment"]:
                worker["c environment"].remove(f"{name}={value}")
    # Its tie to the launcher.
    forked["descriptors"] -= 1
    assert forked == fresh


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(1)", 1),
        ("raise SystemExit('why')", 1),
        ("raise RuntimeError('why')", 1),
        ("import os; os._exit(137)", 137),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os.kill(os.getpid(), 15)", 143),
        ("import ctypes; ctypes.string_at(0)", 139),
    ],
)
@in_event_loop
async def test_the_exit_code_passes_through(tmp_path: Path, script: str, code: int) -> None:
    async with bench(tmp_path) as warm:
        assert (await warm.run(script))[0] == code
        assert warm.slow_starts == 0


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
@in_event_loop
async def test_a_worker_ends_with_its_launcher(tmp_path: Path, signal_: signal.Signals) -> None:
    async with bench(tmp_path) as warm:
        process = warm.launch(FOR_EVER)
        worker, parent = await pids_of(process)
        assert parent == warm.zygote_pid
        process.send_signal(signal_)
        assert ends(worker)
        assert await code_of(process) == -signal_
        # Another one shows that the zygote has come so far.
        assert (await warm.run("pass"))[0] == 0
        assert not psutil.pid_exists(worker)


@in_event_loop
async def test_a_launcher_that_comes_early_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "slow_library.py").write_text(f"open({str(tmp_path / 'gate')!r}).read()\n")
    async with bench(tmp_path, ("slow_library",), until_ready=False) as warm:
        await until((warm.home / "zygote").exists)
        process = warm.launch(UNTIL_STDIN_ENDS)
        (tmp_path / "gate").write_text("")
        assert (await pids_of(process))[1] == warm.zygote_pid
        assert warm.slow_starts == 0
        process.communicate(b"")


@in_event_loop
async def test_a_launcher_killed_before_it_is_heard_starts_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "slow_library.py").write_text(f"open({str(tmp_path / 'gate')!r}).read()\n")
    async with bench(tmp_path, ("slow_library",), until_ready=False) as warm:
        await until((warm.home / "zygote").exists)
        process = warm.launch("open('ran', 'w')")
        await until(lambda: len(_connections(warm.home / "zygote")) > 1)
        process.kill()
        await code_of(process)
        (tmp_path / "gate").write_text("")
        assert (await warm.run("pass"))[0] == 0
        await until(lambda: psutil.Process(warm.zygote_pid).children() == [])
        assert not (warm.work / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after_in_child", "after_in_parent"])
@in_event_loop
async def test_a_launcher_killed_during_the_fork_leaves_nothing(tmp_path: Path, moment: str) -> None:
    os.mkfifo(tmp_path / "reached")
    os.mkfifo(tmp_path / "gate")
    (tmp_path / "slow_fork.py").write_text(
        "import os\n"
        "def wait():\n"
        f"    if not os.path.exists({str(tmp_path / 'over')!r}):\n"
        f"        open({str(tmp_path / 'reached')!r}, 'w').close()\n"
        f"        open({str(tmp_path / 'gate')!r}).read()\n"
        f"os.register_at_fork({moment}=wait)\n"
    )
    async with bench(tmp_path, ("slow_fork",)) as warm:
        process = warm.launch(FOR_EVER)
        await asyncio.to_thread((tmp_path / "reached").read_text)
        process.kill()
        await code_of(process)
        (tmp_path / "over").touch()
        await asyncio.to_thread((tmp_path / "gate").write_text, "")
        # One after the other is served, so this one's end comes after the first one's was seen.
        await until(lambda: psutil.Process(warm.zygote_pid).children() == [])
        assert (await warm.run("pass"))[0] == 0


# A driver's library in the process, which says what {code} means: 3 that nobody has started it.
LOADS_CUDA = """
import _ctypes, ctypes, types
dlopen, CDLL = _ctypes.dlopen, ctypes.CDLL
driver = types.SimpleNamespace(cuDeviceGetCount=lambda count: {code})
_ctypes.dlopen = lambda name, *mode: 1 if name == "libcuda.so.1" else dlopen(name, *mode)
ctypes.CDLL = lambda name, **options: driver if name == "libcuda.so.1" else CDLL(name, **options)
"""
STARTS_THREAD = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"


@in_event_loop
async def test_a_zygote_that_a_thread_spoils_once_it_is_ready_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spoiling.py").write_text(
        "import os, threading; os.register_at_fork(before=threading.Timer(60, print).start)"
    )
    async with bench(tmp_path, ("spoiling",)) as warm:
        await warm.run("pass")
        assert (await warm.run("raise SystemExit(7)"))[0] == 7
        await until(lambda: warm.slow_starts > 0)
        assert "a second thread" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "reason"),
    [(STARTS_THREAD, "a second thread"), (LOADS_CUDA.format(code=0), "touched CUDA")],
    ids=["thread", "CUDA"],
)
@in_event_loop
async def test_a_package_that_spoils_the_zygote_is_left_to_the_workers(
    tmp_path: Path, library: str, reason: str
) -> None:
    (tmp_path / "spoiling").mkdir()
    (tmp_path / "spoiling" / "__init__.py").touch()
    for name in ("one", "two"):
        (tmp_path / "spoiling" / f"{name}.py").write_text(library)
    async with bench(tmp_path, ("json", "spoiling.one", "wave", "spoiling.two")) as warm:
        loaded = "import sys; print([name for name in ('wave', 'spoiling.one') if name in sys.modules])"
        assert (await warm.run(loaded))[1] == b"['wave']\n"
        assert warm.slow_starts == 0
        assert f"spoiling is left to the workers that need it: the zygote has {reason}" in warm.log.read_text()


@in_event_loop
async def test_the_drivers_library_alone_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "harmless.py").write_text(LOADS_CUDA.format(code=3))
    async with bench(tmp_path, ("harmless",)) as warm:
        assert (await warm.run("import sys; print('harmless' in sys.modules)"))[1] == b"True\n"
        assert warm.slow_starts == 0


TORCHLIKE = """
import types
cuda = types.SimpleNamespace(is_available=lambda: 1 / 0)
default_generator = types.SimpleNamespace(seed=lambda: None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("visible", "said"), [("", False), ("0", True)])
@in_event_loop
async def test_a_library_that_asks_for_a_gpu_is_told_without_the_driver(
    tmp_path: Path, visible: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(TORCHLIKE)
    (tmp_path / "asking.py").write_text("import torch; said = torch.cuda.is_available()")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    async with bench(tmp_path, ("torch", "asking")) as warm:
        assert (await warm.run("import asking; print(asking.said)"))[1] == f"{said}\n".encode()
        # The workers' own is the real one again.
        assert b"ZeroDivisionError" in (await warm.run("import torch; torch.cuda.is_available()"))[2]


@in_event_loop
async def test_another_environment_takes_a_fresh_interpreter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = "import os; print(os.environ['OMP_NUM_THREADS'], os.getcwd())"
    async with bench(tmp_path) as warm:
        assert await warm.run(script, OMP_NUM_THREADS="3") == (0, f"3 {warm.work}\n".encode(), b"")
        await until(lambda: warm.slow_starts == 1)
        assert "OMP_NUM_THREADS" in caplog.text


@in_event_loop
async def test_an_archives_own_copy_of_a_library_is_the_one_imported(tmp_path: Path) -> None:
    own = tmp_path / "archive" / "json"
    own.mkdir(parents=True)
    async with bench(tmp_path) as warm:
        path = {"PYTHONPATH": f"{tmp_path}:{own.parent}"}
        # A folder of data that happens to have the name.
        assert (await warm.run("import json; json.dumps", **path))[0] == 0
        assert warm.slow_starts == 0
        (own / "__init__.py").write_text("own = True")
        assert (await warm.run("import json; json.own", **path))[0] == 0
        await until(lambda: warm.slow_starts == 1)


@in_event_loop
async def test_what_is_no_worker_never_reaches_the_zygote(tmp_path: Path) -> None:
    async with bench(tmp_path) as warm:
        command = [str(warm.home / "python"), "-c", "print('started')"]
        assert await asyncio.to_thread(check_output, command) == b"started\n"
        assert warm.slow_starts == 0


@pytest.mark.slow
@in_event_loop
async def test_a_killed_zygote_costs_slow_starts_until_it_is_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as warm:
        first = warm.zygote_pid
        os.kill(first, signal.SIGSTOP)
        process = warm.launch(UNTIL_STDIN_ENDS)
        await until(lambda: len(_connections(warm.home / "zygote")) > 1)
        os.kill(first, signal.SIGKILL)
        worker, _ = await pids_of(process)
        assert worker == process.pid
        process.communicate(b"")
        assert warm.slow_starts == 1
        await until(lambda: warm.zygote_pid != first)
        await ready(warm)
        process = warm.launch(UNTIL_STDIN_ENDS)
        assert (await pids_of(process))[1] == warm.zygote_pid
        process.communicate(b"")
        assert (warm.slow_starts, warm.zygote_restarts) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["launcher", "worker"])
@in_event_loop
async def test_a_worker_outlives_its_zygote_but_not_its_launcher(tmp_path: Path, end: str) -> None:
    async with bench(tmp_path) as warm:
        process = warm.launch(FOR_EVER)
        worker, first = await pids_of(process)
        os.kill(first, signal.SIGKILL)
        await until(lambda: warm.zygote_restarts == 1)
        assert psutil.Process(worker).ppid() == os.getpid()
        assert process.returncode is None
        if end == "launcher":
            process.kill()
        else:
            os.kill(worker, signal.SIGKILL)
        assert await code_of(process) == (-signal.SIGKILL if end == "launcher" else 1)
        await until(lambda: processes.reap_adopted() or not psutil.pid_exists(worker))


@pytest.mark.slow
@in_event_loop
async def test_a_zygote_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with bench(tmp_path, patience=0.2) as warm:
        os.kill(warm.zygote_pid, signal.SIGSTOP)
        assert (await warm.run("raise SystemExit(7)"))[0] == 7
        await until(lambda: warm.zygote_restarts == 1)
        await ready(warm)


@pytest.mark.slow
@in_event_loop
async def test_a_zygote_that_never_becomes_ready_is_replaced_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warmstart, "GIVE_UP_AFTER", 2)
    (tmp_path / "hanging.py").write_text("import time; time.sleep(3600)\n")
    async with bench(tmp_path, ("hanging",), ready_within=0.5, until_ready=False) as warm:
        await until((warm.home / "zygote").exists)
        # Its launcher does not wait longer than for that.
        assert (await warm.run("raise SystemExit(7)"))[0] == 7
        await until(lambda: "failed 2 times in a row" in caplog.text)
        assert warm.zygote_restarts == 1
        assert (await warm.run("raise SystemExit(8)"))[0] == 8


@pytest.mark.slow
@in_event_loop
async def test_a_zygote_that_could_start_on_the_second_try_is_used(tmp_path: Path) -> None:
    tried = str(tmp_path / "tried")
    (tmp_path / "slow_once.py").write_text(
        f"import os, time\nif not os.path.exists({tried!r}):\n    open({tried!r}, 'w'); time.sleep(3600)\n"
    )
    async with bench(tmp_path, ("slow_once",), ready_within=1) as warm:
        assert warm.zygote_restarts == 1
        process = warm.launch(UNTIL_STDIN_ENDS)
        assert (await pids_of(process))[1] == warm.zygote_pid
        process.communicate(b"")


@pytest.mark.slow
@in_event_loop
async def test_200_starts_and_ends_leave_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as warm:
        for count in range(200):
            process = warm.launch(FOR_EVER if count % 3 else "pass")
            if count % 3:
                await pids_of(process)
                process.kill()
            process.communicate(b"", IN_TIME)
            if count == 20:
                await warm.at_rest()
                before, memory_before = _traces(warm, tmp_path)
        await warm.at_rest()
        after, memory_after = _traces(warm, tmp_path)
        assert after == before
        assert memory_after - memory_before < 256 << 10
        assert (warm.slow_starts, warm.zygote_restarts) == (0, 0)


def _traces(warm: WarmStarts, folder: Path) -> tuple[list[int], int]:
    """Descriptors of the zygote and of this process, processes and files; and the bytes that the zygote has written.

    Not those that it alone has mapped: a library's file counts among them as soon as no other process has it open.
    """
    assert warm.zygote is not None
    its, me = psutil.Process(warm.zygote.pid), psutil.Process()
    family, files = me.children(recursive=True), list(folder.rglob("*"))
    return [its.num_fds(), me.num_fds(), len(family), len(files)], sum(mapped.anonymous for mapped in its.memory_maps())


def _connections(address: Path) -> list[str]:
    """The sockets of that address, the listening one included."""
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(f" {address}")]


COMPUTE = """
import json, os, sys
imported = "torch" in sys.modules
import cv2, numpy, torch
big = torch.arange(4_000_000, dtype=torch.float64).reshape(2000, 2000)
product = (big[:300] @ big[:, :300]).sum().item()
array = numpy.ones((600, 600)) @ numpy.ones((600, 600))
blurred = cv2.blur(numpy.ones((900, 900, 3), numpy.uint8), (5, 5))
print(json.dumps({
    "product": product, "array": array.sum(), "blurred": int(blurred.sum()), "torch": torch.get_num_threads(),
    "cv2": cv2.getNumThreads(), "precision": torch.get_float32_matmul_precision(), "imported": imported,
    "bad fork": torch.cuda._is_in_bad_fork(), "threads": len(os.listdir("/proc/self/task")),
    "random": [torch.initial_seed(), float(numpy.random.random()), __import__("random").random()],
}))
"""


@pytest.mark.slow
@in_event_loop
async def test_a_forked_worker_computes_like_a_fresh_one(tmp_path: Path) -> None:
    async with bench(tmp_path, ("numpy", "torch", "cv2")) as warm:
        answers = [json.loads((await warm.run(COMPUTE))[1]) for _ in range(2)]
        fresh = json.loads((await warm.run(COMPUTE, python=sys.executable))[1])
        assert warm.slow_starts == 0
    assert [answer.pop("imported") for answer in answers] == [True, True]
    assert fresh.pop("imported") is False
    randoms = [answer.pop("random") for answer in [*answers, fresh]]
    assert all(len(set(values)) == 3 for values in zip(*randoms, strict=True))
    assert answers == [fresh, fresh]


COMPACTED = """
import json, numpy, re
from serve.engine import zygote
numbers = numpy.arange(4 * zygote.HUGE_PAGE // 8)  # in small pages, of which the kernel was not asked for others
before = numbers.copy()
steps = sum(1 for page in zygote.compaction())
huge = re.search(r"AnonHugePages: +(\\d+) kB", open("/proc/self/smaps_rollup").read())
print(json.dumps([steps, int(huge[1]) * 1024, bool((numbers == before).all())]))
"""


@pytest.mark.slow
def test_compaction_gathers_memory_in_huge_pages_and_changes_nothing_in_it() -> None:
    steps, huge, unchanged = json.loads(check_output([sys.executable, "-c", COMPACTED], timeout=IN_TIME))
    assert unchanged
    assert steps >= 3  # of a page for each whole one of the array
    assert huge >= 2**21 or not KERNEL_COLLAPSES


@pytest.mark.slow
def test_a_fork_after_compaction_still_copies_single_pages(tmp_path: Path) -> None:
    script = (
        COMPACTED
        + """
import os
if os.fork() == 0:
    numbers[::100_000] = 0  # here and there
    private = re.search(r"Private_Dirty: +(\\d+) kB", open("/proc/self/smaps_rollup").read())
    print(json.dumps(int(private[1]) * 1024), flush=True)
    os._exit(0)
os.wait()
"""
    )
    lines = check_output([sys.executable, "-c", script], timeout=IN_TIME).splitlines()
    assert json.loads(lines[1]) < 4 * 2**20  # of 8 MiB that are huge pages


@pytest.mark.slow
@in_event_loop
async def test_a_worker_that_came_before_compaction_still_shares_the_zygotes_memory(tmp_path: Path) -> None:
    """Compacted under it, the pages that they share would be the worker's alone, and count as its memory."""
    (tmp_path / "large.py").write_text("data = bytearray(b'x' * (256 << 20))\n")
    async with bench(tmp_path, ("large",)) as warm:
        process = warm.launch(UNTIL_STDIN_ENDS)
        pid, _ = await pids_of(process)
        for _ in range(3):
            await warm.run("pass")
        own = HostDevice().used_by(pid)
        assert own is not None
        assert own < 64 * 2**20
        process.communicate(b"", IN_TIME)
        if KERNEL_COLLAPSES:
            await until(lambda: in_huge_pages(warm.zygote_pid) > 128 * 2**20)


def test_torchserves_metrics_are_its_own_list_without_the_machines() -> None:
    ours = yaml.safe_load((Path(launcher.__file__).parent / "metrics.yaml").read_text())
    theirs = yaml.safe_load((Path(ts.__file__).parent / "configs" / "metrics.yaml").read_text())

    def metrics(spec: Any, section: str) -> dict[str, Any]:
        return {metric["name"]: metric for kind in spec[section].values() for metric in kind}

    assert metrics(ours, "model_metrics") == metrics(theirs, "model_metrics")
    left_out = metrics(theirs, "ts_metrics").keys() - metrics(ours, "ts_metrics").keys()
    assert all(name.startswith(("CPU", "Memory", "Disk", "GPU")) for name in left_out)
    assert metrics(ours, "ts_metrics").items() <= metrics(theirs, "ts_metrics").items()


@asynccontextmanager
async def supervising(folder: Path, warm: WarmStarts) -> AsyncIterator[Supervisor]:
    """A real TorchServe whose warm starts are ready."""
    supervisor = Supervisor(Settings(state=folder / "state", store=folder / "store"), gpu=None)
    supervisor.warm = warm
    await supervisor.start(lambda: None, lambda: None)
    try:
        await ready(warm)
        yield supervisor
    finally:
        await supervisor.stop()
        assert psutil.Process().children(recursive=True) == []


def parent_of(supervisor: Supervisor, archive: Path) -> int:
    pid = supervisor.worker_pid(archive)
    assert pid is not None
    return psutil.Process(pid).ppid()


@pytest.mark.torchserve
@in_event_loop
async def test_torchserve_starts_its_workers_warm_with_every_library(tmp_path: Path) -> None:
    archives = {name: write_archive(tmp_path / "store", name) for name in ("one", "two", "three")}
    async with supervising(tmp_path, WarmStarts()) as supervisor:
        warm = supervisor.warm
        assert warm.zygote is not None
        first = warm.zygote.pid
        assert "cannot import" not in (tmp_path / "state/logs/zygote.log").read_text()
        await supervisor.engine.register("one", archives["one"])
        assert parent_of(supervisor, archives["one"]) == first

        os.kill(first, signal.SIGKILL)
        # Whether that one waits for the next zygote or not: it starts.
        await supervisor.engine.register("two", archives["two"])
        await until(lambda: warm.zygote_restarts == 1)
        await ready(warm)
        slow_starts = warm.slow_starts
        await supervisor.engine.register("three", archives["three"])
        assert parent_of(supervisor, archives["three"]) == warm.zygote.pid != first
        assert warm.slow_starts == slow_starts

        # The worker of the first zygote is this process's now.
        assert parent_of(supervisor, archives["one"]) == os.getpid()
        orphan = supervisor.worker_pid(archives["one"])
        assert orphan is not None
        await supervisor.engine.unregister("one")
        await until(lambda: not psutil.pid_exists(orphan))
        assert supervisor.worker_pid(archives["one"]) is None


@pytest.mark.torchserve
@pytest.mark.parametrize("cycles", [15, pytest.param(200, marks=pytest.mark.full)])
@in_event_loop
async def test_loading_and_unloading_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cycles: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    archive = write_archive(tmp_path / "store", "echo")
    async with supervising(tmp_path, WarmStarts(("ts.model_service_worker",))) as supervisor:
        # While it gathers its memory, what it has grows.
        await until(lambda: "gathered" in (tmp_path / "state/logs/zygote.log").read_text())
        address = Path(supervisor.warm._zygotes_address)
        for cycle in range(cycles):
            await supervisor.engine.register("echo", archive)
            worker = supervisor.worker_pid(archive)
            assert worker is not None
            await supervisor.engine.unregister("echo")
            await until(lambda worker=worker: not psutil.pid_exists(worker))
            # Its launcher's connection goes a moment later.
            await until(lambda: len(_connections(address)) == 1)
            if cycle == 4:
                before, memory_before = _traces(supervisor.warm, tmp_path)
        after, memory_after = _traces(supervisor.warm, tmp_path)
        assert after == before
        assert memory_after - memory_before < 1 << 20
        assert (supervisor.warm.slow_starts, supervisor.warm.zygote_restarts) == (0, 0)
