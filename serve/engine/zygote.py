"""Forks workers that have every library imported already: a start takes milliseconds instead of seconds.

`python zygote.py SOCKET REPORTS STANDBY LIBRARY...` imports the libraries, which belong to the server's environment;
never `handlers`, which belongs to the archive. Then it forks once for every launcher (launcher.py) that hands over a
start: arguments, environment, working directory and the three standard descriptors. The child becomes what a fresh
interpreter would have become; it ends with its launcher, and the launcher with it, with the same exit code.

A fork copies one thread and no CUDA context. A zygote that has a second thread, or has begun to use CUDA, is therefore
unsafe to fork: it refuses, and the launcher becomes a fresh interpreter. numpy and OpenCV start OpenBLAS' threads
unless a variable says otherwise (FOR_IMPORTS), which no child sees; diffusers asks whether there is a GPU, which starts
CUDA, or a thread of NVML's, were it not answered here (_import). A package that makes it unsafe all the same when it is
imported is left to the workers that need it.

What a child cannot take from its launcher is what the libraries read when they were imported. TorchServe and the zygote
get one environment from the supervisor, so a variable that differs is rare. It means a fresh interpreter:

- anything of CUDA_*, HF_*, OMP_*, MKL_*, PYTORCH_*, LD_*, PYTHON* and so on, and any variable not known to be harmless.
  CUDA_VISIBLE_DEVICES is among them: diffusers asks at import whether there is a device, and keeps the answer;
- except READ_LATE: what only the worker's own code reads, and what the shell sets that starts the launcher;
- PYTHONPATH, which TorchServe sets for each worker, becomes the child's sys.path. Where one of its folders holds a
  module of the name of one that is imported already (an archive's own copy of a library), it takes a fresh interpreter.

One thing stays common to all children: the secret of Python's string hashes.

One child, the *standby*, may be forked ahead of its launcher, when the supervisor wishes it (PREPARE). It runs the file
STANDBY, which sets up what takes long, then waits for a start and becomes that worker. Any start that could be forked
is given to it; while it is not ready, or where it has died, starts are forked. The zygote itself stays as it was,
without CUDA. DISMISS ends the standby, as does the end of the zygote.
"""

import _ctypes
import ctypes
import fcntl
import functools
import gc
import importlib
import logging
import marshal
import os
import re
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from types import ModuleType

import setproctitle
import threadpoolctl

# What every model's worker imports; each model's own are in handlers/<name>/description.py.
LIBRARIES = (
    "numpy.typing", "torch", "cv2", "PIL.ImageCms", "PIL.ImageOps",
    # Image.open imports these five when it is called first.
    "PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.PpmImagePlugin",
    "isal.isal_zlib", "kornia_rs.io", "pybase64", "yaml", "safetensors.torch", "ts.model_service_worker",
)  # fmt: skip
FOR_IMPORTS = {"OPENBLAS_NUM_THREADS": "1"}
READ_LATE = re.compile(rb"PYTHONPATH|(TS|PALIMPSEST)_.*|PWD|OLDPWD|SHLVL|_")
READY = b"ready"  # what it reports once it can fork
# Before a worker's folder. The first is reported by the worker, too, and by its launcher, which has it as well.
ENDED, KILLED = b"ended: ", b"killed: "
# What the supervisor may wish, and what it hears about the standby.
PREPARE, DISMISS = b"prepare a standby", b"dismiss the standby"
STANDBY_READY, STANDBY_TAKEN, STANDBY_GONE = b"standby: ready", b"standby: taken", b"standby: gone"
STANDBY_TIMEOUT = 60  # seconds that it may take to prepare
LARGEST = 2**18  # bytes of a message: more than Linux sends at once
HANDOVER_TIMEOUT = 5.0  # seconds that a connected launcher may take to say what to start
HUGE_PAGE = 2**21  # bytes
_F_SETSIG = 10  # of fcntl.h
_MADV_COLLAPSE = 25  # of mman.h
_PR_SET_PDEATHSIG = 1  # of prctl.h
_CUDA_ERROR_NOT_INITIALIZED = 3  # of cuda.h

Environment = Mapping[bytes, bytes]


def main() -> None:
    address, reports, standby, *libraries = sys.argv[1:]
    began = time.monotonic()
    environment = dict(os.environb)
    # It finds where the arguments stand by the environment as this process got it, and is to leave that as it is.
    os.environ["SPT_NOENV"] = "1"
    setproctitle.getproctitle()
    # Before the imports: a launcher that comes early waits.
    listener = _listen(address)
    # This file's folder: a worker has its own there.
    del sys.path[0]
    # A collection would write to pages that the children are to share.
    gc.disable()
    os.environ.update(FOR_IMPORTS)
    _import(libraries, environment)
    # The first thing that the worker's script does. It touches every logger that the libraries have made: in a child
    # that would be a copy of a page for nearly each of them, 10 to 20 ms in all.
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    _blas()
    _imported()
    gc.collect()
    gc.freeze()
    _say(f"ready after {time.monotonic() - began:.1f} s, {unsafe_to_fork() or 'fit to fork'}")
    _report(reports, READY)
    start = Zygote(listener, environment, reports, standby).until_forked()
    # From here on this process is a child.
    start.become(environment)
    try:
        _run(start.arguments[0])
    finally:
        # Nobody hears of it from the launcher where TorchServe is quick to kill that.
        _report(reports, ENDED + os.fsencode(start.folder))


@dataclass
class Start:
    """What a launcher was told to run. stdio: copies of its three standard descriptors."""

    launcher: socket.socket
    stdio: list[int]
    arguments: list[str]
    environment: Environment
    folder: str

    @classmethod
    def read(cls, message: bytes, launcher: socket.socket, stdio: list[int]) -> "Start":
        """Raises ValueError where the message was cut off."""
        try:
            return cls(launcher, stdio, *marshal.loads(message))  # noqa: S302
        except (ValueError, EOFError, TypeError):
            _close(stdio)
            raise ValueError("no start request") from None

    def pass_on(self, link: socket.socket) -> None:
        """Sends it to who reads it with Start.received. Raises OSError."""
        message = marshal.dumps((self.arguments, dict(self.environment), self.folder))
        socket.send_fds(link, [message], [self.launcher.fileno(), *self.stdio])

    @classmethod
    def received(cls, link: socket.socket) -> "Start":
        """What was passed on. Ends this process where nothing comes any more."""
        message, descriptors, *_ = socket.recv_fds(link, LARGEST, 4)
        if not message:
            os._exit(0)
        return cls.read(message, socket.socket(fileno=descriptors[0]), descriptors[1:])

    def tie_to_launcher(self) -> None:
        """Lets the kernel kill this process when the launcher is gone, whatever it is doing and whoever is its parent.

        The launcher sends nothing any more, so the only event on its socket is the end of the connection.
        """
        fcntl.fcntl(self.launcher, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(self.launcher, _F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(self.launcher, fcntl.F_SETFL, fcntl.fcntl(self.launcher, fcntl.F_GETFL) | os.O_ASYNC)
        # Where it is gone already this raises, and the child ends.
        self.launcher.send(b"forked")

    def was_called_off(self) -> bool:
        """Whether the launcher is gone, which ends the worker."""
        return bool(select.select([self.launcher], [], [], 0)[0])

    def become(self, zygotes: Environment) -> None:
        """Makes this process what a fresh interpreter is before it runs the script. zygotes: its environment."""
        for number, descriptor in enumerate(self.stdio):
            os.dup2(descriptor, number)
        _close(self.stdio)
        os.environ.clear()
        os.environb.update(self.environment)
        os.chdir(self.folder)
        sys.argv = self.arguments
        sys.orig_argv = [sys.executable, *self.arguments]
        own = _path(zygotes)
        libraries = [folder for folder in sys.path if folder not in own]
        sys.path[:] = [os.path.dirname(self.arguments[0]), *dict.fromkeys(_path(self.environment) + libraries)]
        gc.enable()
        _show_arguments(self.arguments)
        _renew_random_state()
        _start_blas_threads(self.environment)


@dataclass
class Standby:
    """descriptor: of the process. link: to it, which has one message once it is ready."""

    pid: int
    descriptor: int
    link: socket.socket

    def take(self, start: Start) -> bool:
        """Whether it is ready and has got the start; it is not asked again where it has not after all."""
        try:
            if not self.link.recv(LARGEST):
                return False
            start.pass_on(self.link)
        except OSError:
            return False
        return True

    def end(self) -> None:
        """Gives it no start any more."""
        self.link.close()
        signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)


class Zygote:
    """The process that forks; one thread, and nothing it does waits for long."""

    def __init__(self, listener: socket.socket, environment: Environment, reports: str, standby: str) -> None:
        """standby: the file that prepares one."""
        self._listener, self._environment, self._reports = listener, environment, reports
        self._preparation, self._wanted = standby, False
        self._standby: Standby | None = None
        self._compaction = compaction()
        # Process descriptor -> process id, how it started; nothing yet for a standby.
        self._children: dict[int, tuple[int, Start | None]] = {}
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)

    def until_forked(self) -> Start:
        """Serves launchers for ever; returns in every child."""
        compacted = False
        while True:
            # Not while there are children: the small pages that they share with this process would be theirs alone.
            idle = not compacted and not self._children
            if self._wanted and not idle and (start := self._fork_standby()):
                return start
            ready = self._poll.poll(0 if idle else None)
            if not ready:
                compacted = next(self._compaction, None) is None
                if compacted:
                    _say("memory gathered in huge pages")
            for descriptor, _ in ready:
                if descriptor != self._listener.fileno():
                    self._reap(descriptor)
                elif (start := self._receive()) and self._fork(start):
                    return start

    def _receive(self) -> Start | None:
        client, _ = self._listener.accept()
        try:
            client.settimeout(HANDOVER_TIMEOUT)
            message, stdio, *_ = socket.recv_fds(client, LARGEST, 3)
            if message not in (PREPARE, DISMISS):
                return Start.read(message, client, stdio)
            self._wanted = message == PREPARE
            if self._standby and message == DISMISS:
                self._standby.end()
        except (OSError, ValueError):
            pass
        client.close()
        return None

    def _fork(self, start: Start) -> bool:
        """Whether this process is the child."""
        reason = unsafe_to_fork() or why_not_forkable(start.environment, self._environment)
        pid = -1
        if reason is None and self._hand_over(start):
            return False
        if reason is None:
            try:
                pid = os.fork()
            except OSError as error:
                reason = f"fork: {error.strerror}"
        if pid == 0:
            self._forget()
            start.tie_to_launcher()
            return True
        _close(start.stdio)
        if pid > 0:
            self._watch(pid, start)
        else:
            _send(start.launcher, f"refused {reason}")
        return False

    def _watch(self, pid: int, start: Start | None) -> int:
        descriptor = os.pidfd_open(pid)
        self._children[descriptor] = pid, start
        self._poll.register(descriptor, select.POLLIN)
        return descriptor

    def _fork_standby(self) -> Start | None:
        """Returns in the child only: what it is to start, once it is prepared and there is something."""
        self._wanted = False
        if self._standby:
            return None
        link, its_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        zygote = os.getpid()
        try:
            pid = -1 if not self._preparation or unsafe_to_fork() else os.fork()
        except OSError:
            pid = -1
        if pid == 0:
            self._forget()
            link.close()
            return self._stand_by(its_link, zygote)
        its_link.close()
        if pid > 0:
            link.setblocking(False)
            self._standby = Standby(pid, self._watch(pid, None), link)
        else:
            link.close()
            _report(self._reports, STANDBY_GONE)
        return None

    def _stand_by(self, link: socket.socket, zygote: int) -> Start:
        die_with_parent = functools.partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG)
        die_with_parent(signal.SIGKILL)
        if os.getppid() != zygote:
            os._exit(0)
        signal.alarm(STANDBY_TIMEOUT)  # which ends it
        _run(self._preparation)
        signal.alarm(0)
        link.send(STANDBY_READY)
        _report(self._reports, STANDBY_READY)
        start = Start.received(link)
        link.close()
        start.tie_to_launcher()
        # A worker outlives the zygote.
        die_with_parent(0)
        return start

    def _hand_over(self, start: Start) -> bool:
        """Whether the standby is the worker from now on."""
        if not self._standby or not self._standby.take(start):
            return False
        self._children[self._standby.descriptor] = self._standby.pid, start
        self._standby.link.close()
        self._standby = None
        _close(start.stdio)
        _report(self._reports, STANDBY_TAKEN)
        return True

    def _reap(self, descriptor: int) -> None:
        pid, start = self._children.pop(descriptor)
        self._poll.unregister(descriptor)
        os.close(descriptor)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if start is None:
            assert self._standby is not None
            self._standby.link.close()
            self._standby = None
            _say(f"the standby ended with code {code}")
            _report(self._reports, STANDBY_GONE)
            return
        if code < 0 and not start.was_called_off():
            # Not left to the launcher: TorchServe is quick to kill that.
            _report(self._reports, KILLED + os.fsencode(start.folder))
        # As a shell, and TorchServe, count a death by a signal.
        _send(start.launcher, f"ended {code if code >= 0 else 128 - code}")

    def _forget(self) -> None:
        """Closes the sockets in a child: a copy of another launcher's would outlive the zygote."""
        self._listener.close()
        for descriptor, (_, start) in self._children.items():
            os.close(descriptor)
            if start:
                start.launcher.close()
        if self._standby:
            self._standby.link.close()


def _import(libraries: list[str], environment: Environment) -> None:
    """Meanwhile torch says by the environment whether there is a GPU: the supervisor names the one, or none."""
    asks_driver = None
    for name in libraries:
        try:
            importlib.import_module(name)
        except ImportError as error:
            # The workers that need it will say so, or never will.
            _say(f"cannot import {name}: {error}")
        if reason := unsafe_to_fork():
            _begin_again(libraries, name.partition(".")[0], reason, environment)
        if asks_driver is None and (torch := sys.modules.get("torch")):
            asks_driver = torch.cuda.is_available
            torch.cuda.is_available = lambda: bool(environment.get(b"CUDA_VISIBLE_DEVICES"))
    if asks_driver is not None:
        sys.modules["torch"].cuda.is_available = asks_driver


def _begin_again(libraries: list[str], without: str, reason: str, environment: Environment) -> None:
    """What a library has started cannot be undone: this process becomes a zygote that does not import its package."""
    _say(f"{without} is left to the workers that need it: {reason}")
    kept = [name for name in libraries if name.partition(".")[0] != without]
    os.execve(sys.executable, [sys.executable, *sys.argv[:4], *kept], environment)  # noqa: S606


def compaction() -> Iterator[int]:
    """Gathers this process's memory into huge pages, one at each step: a fork then copies 3 ms of page tables, not 12.

    A child still copies single pages. Where the kernel cannot (before Linux 6.1), or has none left, nothing changes.
    """
    madvise = ctypes.CDLL(None).madvise
    for line in _maps().splitlines():
        addresses, access, _, _, inode, *_ = line.split()
        if access == b"rw-p" and inode == b"0":
            start, end = (int(address, 16) for address in addresses.split(b"-"))
            for page in range(-(-start // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE):
                madvise(ctypes.c_void_p(page), ctypes.c_size_t(HUGE_PAGE), _MADV_COLLAPSE)
                yield page


def unsafe_to_fork() -> str | None:
    """Why this process must not fork; None if it may."""
    if len(os.listdir("/proc/self/task")) > 1:
        return "the zygote has a second thread"
    if _cuda_has_begun():
        return "the zygote has touched CUDA"
    return None


def _cuda_has_begun() -> bool:
    """The driver's library alone does no harm: some of CUDA's other libraries bring it along and leave it be."""
    try:
        handle = _ctypes.dlopen("libcuda.so.1", os.RTLD_NOLOAD)
    except OSError:  # it is not in this process
        return False
    try:
        return bool(_driver(handle).cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _CUDA_ERROR_NOT_INITIALIZED)
    except AttributeError:
        return True


@functools.cache
def _driver(handle: int) -> ctypes.CDLL:
    """Every CDLL comes with a class of its own, which only a garbage collection would remove."""
    return ctypes.CDLL("libcuda.so.1", handle=handle)


def why_not_forkable(workers: Environment, zygotes: Environment) -> str | None:
    """Why a child would not be like a fresh interpreter in the worker's environment; None if it would."""
    differing = sorted(
        name.decode(errors="replace")
        for name in workers.keys() | zygotes.keys()
        if workers.get(name) != zygotes.get(name) and not READ_LATE.fullmatch(name)
    )
    if differing:
        return f"the worker's environment differs in {', '.join(differing)}"
    for folder in set(_path(workers)) - set(_path(zygotes)):
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.partition(".")[0] in _imported() and _is_module(entry):
                    return f"{entry.path} would be imported instead of the server's own"
    return None


@functools.cache
def _imported() -> set[str]:
    """The packages that every child has. Made once: to count the references to a name is to write beside it, and with
    thousands of them a good part of the memory that the children share would be copied.
    """
    return {name.partition(".")[0] for name in sys.modules}


def _is_module(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith((".py", ".so")) or os.path.exists(f"{entry.path}/__init__.py")


def _path(environment: Environment) -> list[str]:
    """The folders of PYTHONPATH, as Python puts them into sys.path; an empty one is the working directory."""
    text = os.fsdecode(environment.get(b"PYTHONPATH", b""))
    return [os.path.abspath(folder) for folder in text.split(os.pathsep)] if text else []


def _run(script: str) -> None:
    """Runs the script as runpy.run_path does, which would compile it each time."""
    code = SourceFileLoader("__main__", script).get_code("__main__")
    assert code is not None
    module = sys.modules["__main__"] = ModuleType("__main__")
    module.__file__ = script
    exec(code, module.__dict__)  # noqa: S102


def _listen(address: str) -> socket.socket:
    with suppress(FileNotFoundError):
        os.unlink(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mask = os.umask(0o177)
    listener.bind(address)
    os.umask(mask)
    listener.listen(128)
    return listener


def _report(address: str, report: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor, suppress(OSError):
        supervisor.setblocking(False)
        supervisor.sendto(report, address)


def _send(launcher: socket.socket, text: str) -> None:
    """The last word to a launcher, which may be gone."""
    with launcher, suppress(OSError):
        launcher.send(text.encode(errors="replace"))


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _maps() -> bytes:
    """What is mapped into this process, a line each that ends with the path of the file."""
    with open("/proc/self/maps", "rb", buffering=0) as maps:
        return maps.read()


def _show_arguments(arguments: list[str]) -> None:
    """The worker's instead of the zygote's, for ps and nvidia-smi; as many as find room."""
    setproctitle.setproctitle(shlex.join([sys.executable, os.path.basename(arguments[0]), *arguments[1:]]))


def _renew_random_state() -> None:
    """Python's own module does so by itself."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()


def _start_blas_threads(environment: Environment) -> None:
    """Gives OpenBLAS the threads that it would have started at import, had FOR_IMPORTS not held it back.

    torch's own threads are started by its first operation, which is the child's.
    """
    count = len(os.sched_getaffinity(0))
    for name in (b"OMP_NUM_THREADS", b"GOTO_NUM_THREADS", b"OPENBLAS_NUM_THREADS"):
        wanted = re.match(rb"\s*\d+", environment.get(name, b""))
        count = int(wanted[0]) if wanted and int(wanted[0]) else count
    for library in _blas():
        library.set_num_threads(count)


@functools.cache
def _blas() -> list[threadpoolctl.LibController]:
    """Every copy of OpenBLAS in this process."""
    found = threadpoolctl.ThreadpoolController().lib_controllers
    return [library for library in found if library.internal_api == "openblas"]


def _say(text: str) -> None:
    """Into the log, without print: what a full disk does not take would stay in a buffer that every child gets."""
    with suppress(OSError):
        os.write(1, f"{text}\n".encode(errors="replace"))


if __name__ == "__main__":
    main()
