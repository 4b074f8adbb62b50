"""The end of the server: whoever still waits gets an answer, the log has no traceback, nothing is left."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import door
import psutil
import pytest
from door import PING, Server, closed, post, read
from fakes import FakeTorchServe, make_store
from serving import environment, fill, free_port, small_disk

TESTS = Path(__file__).parent
UNFINISHED = post("/predictions/sam", b"x" * 100)[:-1]
TARGET = "X-Amzn-SageMaker-Target-Model: sam"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, "sam")


@contextlib.asynccontextmanager
async def never(*_: object, **__: object) -> AsyncIterator[None]:
    await asyncio.get_running_loop().create_future()
    yield


@pytest.mark.slow
def test_what_does_not_end_in_time_is_answered_in_its_apis_shape(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(door.serving(FakeTorchServe(), store, stop_timeout=0.5))
        running.app.state.services.scheduler.lease = never
        requests = {
            "ours": UNFINISHED,
            "waiting": post("/predictions/sam", b"x"),
            "sagemaker": post("/endpoints/x/invocations", b"x", TARGET),
            "events": post(
                "/v1/segment", b'{"image": "/9j/", "points": [[1, 1]]}', "Accept: text/event-stream",
                "Content-Type: application/json",
            ),
            "editing": post("/v1/segment", b'{"image": "/9j/", "points": [[1, 1]]}', "Content-Type: application/json"),
            "half a head": PING[:-4],
            "nothing": b"",
        }  # fmt: skip
        lines = {name: stack.enter_context(running.connect()) for name in requests}
        for name, request in requests.items():
            lines[name].sendall(request)
        events = read_until(lines["events"], b"event: progress")
        door.until(lambda: running.running and len(running.running.server_state.tasks) == 5)
        idle = stack.enter_context(running.connect())
        idle.sendall(PING)
        assert read(idle).status == 200
        assert running.running is not None
        running.running.should_exit = True
        for name in ("ours", "waiting", "editing", "half a head"):
            reply = read(lines[name])
            assert (reply.status, reply.code) == (503, "unavailable")
            assert reply.headers["retry-after"] == "5"
            assert closed(lines[name])
        reply = read(lines["sagemaker"])
        assert (reply.status, reply.headers["x-amzn-errortype"]) == (503, "ServiceUnavailable")
        assert reply.headers["retry-after"] == "5"
        events += read_until(lines["events"], b"\r\n0\r\n\r\n")
        assert b"event: error\ndata: {" in events
        assert closed(idle)
        assert closed(lines["nothing"])
        door.until(lambda: running.running is not None and not running.running.server_state.connections)
        jobs = running.app.state.services.jobs
        assert not jobs._jobs
    assert not [record for record in caplog.records if record.levelno > logging.WARNING or record.exc_info]


def read_until(line: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        piece = line.recv(65536)
        assert piece, data
        data += piece
    return data


class Process:
    """serve_fake.py as it runs; `said` is its output once it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], server: Server, log: Path) -> None:
        self.process, self.server, self._log = process, server, log

    @property
    def said(self) -> str:
        return self._log.read_text()


@contextlib.contextmanager
def serving(
    folder: Path, store: Path, descriptors: int = 1024, log: Path | None = None, **settings: str
) -> Iterator[Process]:
    port = free_port()
    environ = (
        environment(port, folder, store) | settings | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    )
    log = log or folder / "log"
    # SIGHUP as a terminal's processes have it, also where the tests run under nohup, which has children ignore it.
    command = f'ulimit -n {descriptors}; exec "{sys.executable}" "{TESTS / "serve_fake.py"}"'
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["env", "--default-signal=HUP", "bash", "-c", command],
            env=environ, stdout=output, stderr=output, cwd=folder,
        )  # fmt: skip
    running = Process(process, Server(None, port), log)  # type: ignore[arg-type]
    try:
        door.until(lambda: "is ready" in running.said or process.poll() is not None or not _refused(port), 60)
        yield running
    finally:
        process.kill()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [["SIGTERM"], ["SIGINT"], ["SIGHUP"], ["SIGTERM", "SIGTERM"], ["SIGINT", "SIGINT"], ["SIGTERM", "SIGINT"]],
)
def test_a_signal_ends_it_cleanly_and_a_second_one_sooner(tmp_path: Path, store: Path, signals: list[str]) -> None:
    patience = {"PALIMPSEST_STOP_TIMEOUT": "300" if len(signals) > 1 else "0.5"}
    with serving(tmp_path, store, **patience) as running, running.server.connect() as line:
        line.sendall(UNFINISHED)
        running.server.ping()
        family = psutil.Process(running.process.pid).children(recursive=True)
        for name in signals:
            running.process.send_signal(getattr(signal, name))
            door.until(lambda: _refused(running.server.port))
        reply = read(line)
        assert (reply.status, reply.code, reply.headers["retry-after"]) == (503, "unavailable", "5")
        assert running.process.wait(30) == 0
    assert "The engine is stopped.\n" in running.said
    assert running.said.endswith("Stopped.\n")
    assert "Traceback" not in running.said
    assert "ERROR" not in running.said
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert not [*(tmp_path / "state").glob("*.pid"), *(tmp_path / "tmp").iterdir()]


def _refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.slow
def test_more_connections_than_descriptors_keep_nobody_out(tmp_path: Path, store: Path) -> None:
    with serving(tmp_path, store, descriptors=256) as running, contextlib.ExitStack() as stack:
        for i in range(400):
            stack.enter_context(running.server.connect()).sendall(UNFINISHED if i < 10 else b"")
        for _ in range(10):
            running.server.ping()
        assert psutil.Process(running.process.pid).num_fds() < 256


@pytest.mark.slow
def test_a_server_whose_words_go_to_a_full_disk_serves(tmp_path: Path, store: Path) -> None:
    with small_disk(tmp_path / "small", "64k") as disk:
        make_room = fill(disk)
        with serving(tmp_path, store, log=disk / "log") as running:
            running.server.ping()
            make_room()
            running.process.terminate()
            assert running.process.wait(30) == 0
            assert running.said.endswith("Stopped.\n")
