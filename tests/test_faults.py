"""One tiny archive per failure, through a real TorchServe: the right answer in time, and nobody else harmed."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from serving import Server, descriptors, serving, until
from zoo import write_archive

pytestmark = pytest.mark.torchserve

ZOO: dict[str, dict[str, Any]] = {
    "echo": {},
    "load-fails": {"load": "fail"},
    "load-fails-oddly": {"load": "fail oddly"},
    "load-memory": {"load": "memory error"},
    "load-hangs": {"load": "hang", "startup_timeout": 3},
    "load-dies": {"load": "die"},
    "predict-fails": {"predict": "fail"},
    "predict-memory": {"predict": "memory error"},
    "predict-hangs": {"predict": "hang", "response_timeout": 3},
    "predict-exits": {"predict": "exit"},
    "predict-dies": {"predict": "die"},
    "predict-refuses": {"predict": "refuse"},
    "too-much": {"reply_bytes": 600 << 20},
    "large": {"reply_bytes": 20 << 20},
    "small": {"reply_bytes": 10},
    "slow": {"predict": "slow", "seconds": 1.0},
    "huge": {"memory_mib": 10_000_000},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    for name, behaviour in ZOO.items():
        write_archive(folder / "store", name, **behaviour)
    with serving(folder, folder / "store", "full", cpu_only=True) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "status", "code", "within"),
    [
        ("load-fails", 500, "load_failed", 30),
        ("load-fails-oddly", 500, "load_failed", 30),
        ("load-memory", 507, "out_of_memory", 30),
        ("load-hangs", 500, "load_failed", 60),
        ("predict-fails", 500, "model_failed", 30),
        ("predict-memory", 507, "out_of_memory", 30),
        ("predict-hangs", 504, "deadline_exceeded", 30),
        ("predict-exits", 503, "worker_died", 30),
        ("predict-dies", 503, "worker_died", 30),
        ("predict-refuses", 400, "bad_request", 30),
        ("too-much", 503, "worker_died", 60),
    ],
)
def test_every_failure_has_its_answer(server: Server, name: str, status: int, code: str, within: float) -> None:
    server.http.post("/predictions/echo", content=b"warm").raise_for_status()
    began = time.monotonic()
    answer = server.http.post(f"/predictions/{name}", content=b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert time.monotonic() - began < within
    assert "secret" not in answer.text
    assert server.http.post("/predictions/echo", content=b"still here").content == b"still here"


def test_a_handler_that_misses_a_library_is_told_from_others(server: Server) -> None:
    store = server.folder / "store"
    for name in ("misses", "misses-listed"):
        handler = write_archive(store, name) / "handler.py"
        handler.write_text(f"import nowhere_to_be_found\n{handler.read_text()}")
    (store / "misses-listed" / "requirements.txt").write_text("nowhere_to_be_found==1\n")
    messages = {
        name: server.http.post(f"/predictions/{name}", content=b"x").json()["error"]["message"]
        for name in ("misses", "misses-listed", "load-fails-oddly")
    }
    for name in ("misses", "misses-listed"):
        assert "No module named 'nowhere_to_be_found'" in messages[name]
        assert ("requirements.txt" in messages[name]) == (name == "misses-listed")
        assert str(store) not in messages[name]
    assert "KeyError" in messages["load-fails-oddly"]
    assert "odd" not in messages["load-fails-oddly"].replace("load-fails-oddly", "")


def test_a_worker_that_is_killed_while_it_loads_says_nothing_against_its_model(server: Server) -> None:
    answer = server.http.post("/predictions/load-dies", content=b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_died")
    assert int(answer.headers["retry-after"]) > 0
    assert server.http.post("/predictions/echo", content=b"still here").content == b"still here"


@pytest.mark.parametrize("name", ["predict-dies", "predict-hangs"])
def test_a_failing_model_fails_alike_the_next_time(server: Server, name: str) -> None:
    answers = [server.http.post(f"/predictions/{name}", content=b"x") for _ in range(2)]
    assert answers[0].status_code == answers[1].status_code
    assert answers[0].json()["error"]["code"] == answers[1].json()["error"]["code"]


def test_a_large_reply_comes_whole(server: Server) -> None:
    assert server.http.post("/predictions/large", content=b"x").content == bytes(20 << 20)


def test_large_bodies_for_an_archive_of_another_make_take_turns_in_torchserve(server: Server) -> None:
    """Each is there several times over, so that six of 100 MiB at once would be more than it has."""
    size, answers = 100 * 2**20, list[httpx.Response]()
    server.http.post("/predictions/small", content=b"warm").raise_for_status()
    gateway = psutil.Process(server.process.pid)
    before = gateway.memory_info().rss

    def pieces() -> Iterator[bytes]:
        for _ in range(size // 2**20):
            yield bytes(2**20)

    def send() -> None:
        headers = {"content-length": str(size)}
        answers.append(server.http.post("/predictions/small", content=pieces(), headers=headers))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    for answer in answers:
        assert answer.status_code == 200 or (
            answer.status_code in (429, 503) and int(answer.headers["retry-after"]) > 0
        )
    assert any(answer.content == bytes(10) for answer in answers)
    until(lambda: not descriptors(gateway.pid)["memfd"])
    assert gateway.memory_info().rss < before + size  # bodies are memory files: of the process itself they take nothing


def test_a_guess_past_the_budget_refuses_nobody(server: Server) -> None:
    """The archive says ten million MiB; it takes few, which its first load shows."""
    assert server.http.post("/predictions/huge", content=b"served").status_code == 200
