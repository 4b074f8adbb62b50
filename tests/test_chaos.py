"""Kill things under load: every client gets an answer within its deadline, and the service comes back by itself."""

import os
import signal
import socket
import subprocess
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from serving import Server, descriptors, fill, is_worker, serving, small_disk, until
from zoo import write_archive

from bench import churn

pytestmark = [pytest.mark.torchserve, pytest.mark.alone]
DEADLINE = 60.0  # seconds within which every request must have some answer
MODELS = ("quick", "slow", "third")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Three models, room for two."""
    store = tmp_path / "store"
    write_archive(store, "quick", memory_mib=200, ballast_mib=170)
    write_archive(store, "slow", memory_mib=200, ballast_mib=170, predict="slow", seconds=3.0)
    write_archive(store, "third", memory_mib=200, ballast_mib=170)
    monkeypatch.setenv("PALIMPSEST_MEMORY_BUDGET", "500")
    with serving(tmp_path, store, "full", cpu_only=True) as running:
        yield running


@contextmanager
def load(server: Server, models: tuple[str, ...], clients: int = 4) -> Iterator[Counter[object]]:
    """Clients that ask without a pause until the context is left; yields the tally of their answers."""
    tally: Counter[object] = Counter()
    over = threading.Event()

    def client(number: int) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=DEADLINE) as http:
            while not over.is_set():
                try:
                    answer = http.post(f"/predictions/{models[number % len(models)]}", content=b"x")
                    tally[answer.status_code if answer.status_code == 200 else answer.json()["error"]["code"]] += 1
                except httpx.HTTPError as error:
                    tally[type(error).__name__] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        over.set()
        for thread in threads:
            thread.join(DEADLINE)


def java_of(server: Server) -> psutil.Process:
    return next(p for p in server.family() if "org.pytorch.serve.ModelServer" in p.cmdline())


def ask(server: Server, model: str) -> httpx.Response:
    return server.http.post(f"/predictions/{model}", content=b"x")


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_worker_is_noticed_within_two_seconds(server: Server, signal_: signal.Signals) -> None:
    assert ask(server, "slow").status_code == 200
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server, "slow")))
    thread.start()
    worker = server.worker("slow")
    until(lambda: server.http.get("/v1/models/slow").json()["leases"] == 1)
    time_of_death = time.monotonic()
    os.kill(worker.pid, signal_)
    thread.join(DEADLINE)
    assert time.monotonic() - time_of_death < 2
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "worker_died")
    assert ask(server, "slow").status_code == 200
    assert ask(server, "quick").status_code == 200


def test_torchserve_itself_may_die(server: Server) -> None:
    with load(server, ("quick", "third")) as tally:
        until(lambda: tally[200] > 20)
        java_of(server).kill()
        lost = sum(tally.values())
        until(lambda: tally[200] > lost + 20)
    assert set(tally) <= {200, "worker_died", "unavailable", "model_not_ready"}
    assert server.process.poll() is None


def test_a_worker_may_die_while_it_loads(server: Server, tmp_path: Path) -> None:
    write_archive(tmp_path / "store", "loading", load="slow", seconds=3.0, memory_mib=100)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server, "loading")))
    thread.start()
    first = server.worker("loading")
    first.kill()
    thread.join(DEADLINE)
    assert answers[0].status_code == 200  # it was started again
    assert server.worker("loading") != first


def test_a_worker_that_is_killed_whenever_it_loads_is_no_fault_of_its_model(server: Server, tmp_path: Path) -> None:
    write_archive(tmp_path / "store", "killed", load="die", memory_mib=100)
    write_archive(tmp_path / "store", "broken", load="fail", memory_mib=100)
    answer = ask(server, "killed")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_died")
    assert int(answer.headers["retry-after"]) > 0
    answer = ask(server, "broken")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "load_failed")


def test_what_a_foreign_handler_does_wrong_is_told_apart(server: Server, tmp_path: Path) -> None:
    """Its own errors are not worth another try, and its own time limit is named."""
    write_archive(tmp_path / "store", "raises", predict="fail", memory_mib=50)
    write_archive(tmp_path / "store", "late", predict="slow", seconds=20, response_timeout=2, memory_mib=50)
    answer = ask(server, "raises")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_failed")
    assert "secret" not in answer.text
    assert ask(server, "raises").status_code == 500
    answer = server.http.post("/endpoints/e/invocations", headers={"X-Amzn-SageMaker-Target-Model": "raises"})
    assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (424, "ModelError")
    answer = ask(server, "late")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert "within 2 s (responseTimeout in its model-config.yaml)" in answer.json()["error"]["message"]


def test_an_archive_that_is_removed_while_its_request_waits_is_not_found(server: Server, tmp_path: Path) -> None:
    write_archive(tmp_path / "store", "going", memory_mib=200)
    answers: list[httpx.Response] = []
    with load(server, ("slow",), clients=1), load(server, ("quick",), clients=1):
        until(lambda: sum(server.http.get(f"/v1/models/{m}").json()["leases"] for m in ("slow", "quick")) > 0)
        thread = threading.Thread(target=lambda: answers.append(ask(server, "going")))
        thread.start()
        until(lambda: server.http.get("/v1/models/going").json()["queue"] > 0 or bool(answers))
        (tmp_path / "store" / "going").rename(tmp_path / "gone")
        thread.join(DEADLINE)
    if answers[0].status_code != 200:  # it was loaded before the removal
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (404, "model_not_found")
        assert str(tmp_path) not in answers[0].text
    assert ask(server, "going").status_code == 404


def test_a_short_churn_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/churn.py for ten seconds; its own three minutes are for a person to wait for."""
    monkeypatch.setenv("PALIMPSEST_MEMORY_BUDGET", "")  # it sets its own, which must not stay
    seen = churn.run(tmp_path, seconds=10, every=1.5, clients=6)
    assert (seen["lost"], seen["hung"], seen["left behind"], seen["exit code"]) == ([], 0, [], 0)
    assert seen["leases and waiting at the end"] == 0
    assert seen["requests answered"] >= 6
    assert seen["workers killed"] > 0


def test_everything_at_once_and_nothing_is_left(server: Server) -> None:
    with load(server, MODELS, clients=8) as tally:
        for strike in range(3):
            before = tally[200]
            until(lambda before=before: tally[200] > before + 3)
            victims = [p for p in server.family() if any(is_worker(p, model) for model in MODELS)]
            if strike == 2:
                java_of(server).kill()
            elif victims:
                os.kill(victims[0].pid, signal.SIGKILL if strike % 2 else signal.SIGSTOP)
        before = tally[200]
        until(lambda: tally[200] > before + 10)
    # Every request had an answer in time: no time-out, no broken connection.
    assert set(tally) <= {200, "worker_died", "unavailable", "model_not_ready", "load_failed", "out_of_memory"}
    family = server.family()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert server.leftovers(family) == []


@pytest.fixture
def cache_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB where the unpacked archives go."""
    with small_disk(tmp_path / "cache") as disk:
        yield disk


def test_a_full_disk_fails_only_what_has_to_be_unpacked(cache_disk: Path, server: Server, tmp_path: Path) -> None:
    folder = write_archive(tmp_path / "elsewhere", "packed")
    (folder / "weights.bin").write_bytes(os.urandom(4 << 20))
    with tarfile.open(tmp_path / "store" / "packed.tar.gz", "w:gz") as tar:
        tar.add(folder, ".")
    with load(server, ("quick", "third")) as tally:
        answers = [ask(server, "packed") for _ in range(2)]
        before = tally[200]
        until(lambda: tally[200] > before + 5)
    assert [answer.status_code for answer in answers] == [507, 507]
    assert "No space left on device" in answers[0].json()["error"]["message"]
    assert set(tally) == {200}
    # Room again: the same file is served without a restart.
    subprocess.run(["mount", "-o", "remount,size=64m", cache_disk], check=True)
    until(lambda: ask(server, "packed").status_code == 200)


def test_clients_that_leave_and_a_killed_worker_leave_no_descriptor(server: Server, tmp_path: Path) -> None:
    write_archive(tmp_path / "store", "large", memory_mib=50, reply_bytes=8 << 20, predict="slow", seconds=0.02)

    def leave(number: int) -> None:
        with socket.create_connection(("127.0.0.1", server.port), 20) as line:
            size = 100_000
            line.sendall(f"POST /predictions/large HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
            line.sendall(bytes(size - (number % 4 == 1)))  # amid the body, or while it waits
            if number % 4 == 3:
                line.recv(1)  # amid the reply

    assert ask(server, "large").status_code == 200
    server.http.close()
    server.http = httpx.Client(base_url=server.http.base_url, timeout=DEADLINE, headers={"connection": "close"})
    until(lambda: not descriptors(server.process.pid)["memfd"])
    until((server.folder / "state" / "logs" / "palimpsest.log").exists)  # which stays open from the first line on
    before = descriptors(server.process.pid)
    for number in range(100):
        if number == 50:
            server.worker("large").kill()
        leave(number)
    assert ask(server, "large").status_code in (200, 503)
    assert ask(server, "large").status_code == 200
    until(lambda: not descriptors(server.process.pid)["memfd"])
    until(lambda: sum((descriptors(server.process.pid) - before).values()) == 0)
    model = server.http.get("/v1/models/large").json()
    assert (model["leases"], model["queue"]) == (0, 0)


def test_shutdown_lets_running_requests_finish(server: Server) -> None:
    assert ask(server, "slow").status_code == 200
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server, "slow")))
    thread.start()
    until(lambda: server.http.get("/v1/models/slow").json()["leases"] == 1)
    server.process.send_signal(signal.SIGTERM)
    thread.join(DEADLINE)
    assert answers[0].status_code == 200
    assert server.process.wait(60) == 0


def test_nothing_but_a_load_needs_the_disk_of_state_logs_and_temporary_files(
    tmp_path: Path, demo_store: Path, dog: bytes
) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        for name in ("state", "tmp"):
            (disk / name).mkdir()
            (tmp_path / name).symlink_to(disk / name)
        with serving(tmp_path, demo_store, cpu_only=True) as server:
            log = tmp_path / "serve.log"

            def click(path: str, model: str = "", **more: str) -> httpx.Response:
                fields = {"points": "[[750, 500]]", **({"model": model} if model else {}), **more}
                return server.http.post(path, data=fields, files={"image": dog})

            make_room = fill(disk)
            answers = [click("/v1/segment"), click("/v1/erase"), click("/v1/segment")]
            answers.append(server.http.post("/v1/images", files={"image": dog}))
            assert [answer.status_code for answer in answers] == [200, 200, 200, 201], answers
            until(lambda: " is full: " in log.read_text())
            state = {path for path in disk.rglob("*") if disk / "tmp" not in path.parents}
            assert not [path for path in state if path.suffix == ".new"]
            make_room()

            make_room = fill(disk, files=True)
            assert click("/v1/segment").status_code == 200
            for path in ("/v1/replace", "/predictions/sd"):
                refused = click(path, prompt="a cat") if path.startswith("/v1") else ask(server, "sd")
                assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
                assert "make room" in refused.json()["error"]["message"]
            make_room()

            assert click("/v1/replace", prompt="a cat", steps="1").status_code == 200  # at once
            until(lambda: " to again" in log.read_text())
            said = [line for line in log.read_text().splitlines() if "the disk of" in line]
            assert len(said) % 2 == 0, said
            assert all((" is full: " in line) == (number % 2 == 0) for number, line in enumerate(said)), said
            family = server.family()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            assert server.leftovers(family) == []
        assert (disk / "state" / "footprints.json").stat().st_size > 0
        assert not [*disk.rglob("*.new"), *disk.rglob("*.pid")]


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["to all, as a terminal does", "to the server alone"])
def test_a_second_ctrl_c_ends_what_does_not_end(
    send: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "store", "slow", predict="slow", seconds=600, response_timeout=700)
    monkeypatch.setenv("PALIMPSEST_STOP_TIMEOUT", "600")
    with serving(tmp_path, tmp_path / "store", "full", cpu_only=True) as server:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(ask(server, "slow")))
        thread.start()
        until(lambda: server.http.get("/v1/models/slow").json()["leases"] == 1)
        family = server.family()
        assert any(is_worker(process, "slow") for process in family)
        send(server.process.pid, signal.SIGINT)
        until(lambda: not listens(server.port))
        assert not answers  # it may end by itself
        assert server.process.poll() is None
        send(server.process.pid, signal.SIGINT)
        thread.join(DEADLINE)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "unavailable")
        assert int(answers[0].headers["retry-after"]) > 0
        assert server.process.wait(60) == 0
        assert server.leftovers(family) == []
    assert not [*(tmp_path / "state").glob("*.pid"), *(tmp_path / "state").rglob("*.new")]
    log = (tmp_path / "serve.log").read_text()
    assert log.endswith("Stopped.\n")
    assert "Traceback" not in log
    assert "ERROR" not in log


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return False
    return True
