"""Two boxes of one machine behind one door, as `palimpsest cluster up` starts them."""

import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from ray.core.generated import (
    core_worker_pb2,
    core_worker_pb2_grpc,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    node_manager_pb2,
    node_manager_pb2_grpc,
    ray_client_pb2,
    ray_client_pb2_grpc,
)
from serving import ROOT, environment, free_port, name_full_set, palimpsest, until
from zoo import write_archive

# A call to each of Ray's services that has one for others.
CALLS: dict[str, tuple[Any, str, Any]] = {
    "head": (gcs_service_pb2_grpc.NodeInfoGcsServiceStub, "CheckAlive", gcs_service_pb2.CheckAliveRequest()),
    "machine": (node_manager_pb2_grpc.NodeManagerServiceStub, "GetNodeStats", node_manager_pb2.GetNodeStatsRequest()),
    "process": (
        core_worker_pb2_grpc.CoreWorkerServiceStub,
        "GetCoreWorkerStats",
        core_worker_pb2.GetCoreWorkerStatsRequest(),
    ),
    "client": (ray_client_pb2_grpc.RayletDriverStub, "ClusterInfo", ray_client_pb2.ClusterInfoRequest()),
}
pytestmark = [pytest.mark.torchserve, pytest.mark.alone, pytest.mark.slow]

QUICK = [f"m{number}" for number in range(6)]
MEMORY_MIB = 100  # of each; each box has room for four
START_SECONDS, LOST_SECONDS = 240.0, 5.0


class Cluster:
    def __init__(self, process: subprocess.Popen[str], port: int, environ: dict[str, str]) -> None:
        self.process, self._environ = process, environ
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    def boxes(self) -> list[psutil.Process]:
        return [each for each in self.family() if _title(each).startswith("ray::ServeReplica")]

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def open_ports(self) -> set[tuple[str, int]]:
        """Those of all its processes that other machines reach."""
        found = set()
        for process in self.family():
            with suppress(psutil.Error):
                listening = [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
                found |= {(each.ip.removeprefix("::ffff:"), each.port) for each in listening}
        others = {("127.0.0.1" if host in ("::", "0.0.0.0") else host, port) for host, port in found}
        assert len(others - found) > 5
        return others - {each for each in found if each[0] == "127.0.0.1"}

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [*palimpsest(), "cluster", *words], cwd=ROOT, env=self._environ, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, model: str, **options: Any) -> httpx.Response:
        return self.http.post(f"/predictions/{model}", **{"content": b"x"} | options)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    store = folder / "store"
    for name in QUICK:
        write_archive(store, name, memory_mib=MEMORY_MIB, ballast_mib=70)
    write_archive(store, "slow", memory_mib=MEMORY_MIB, ballast_mib=70, predict="slow", seconds=0.5)
    name_full_set(store)
    port = free_port()
    environ = environment(port, folder, store, "full") | {
        "CUDA_VISIBLE_DEVICES": "",
        "PALIMPSEST_MEMORY_BUDGET": str(4 * MEMORY_MIB + 50),
        "COLUMNS": "200",
    }
    log, before = (folder / "log").open("w+"), set(Path("/tmp").glob("ray-*"))
    process = subprocess.Popen(
        [*palimpsest(), "cluster", "up", "--boxes", "2", "--port", str(free_port())],
        cwd=ROOT, env=environ, stdout=log, stderr=log, text=True, process_group=0,
    )  # fmt: skip
    running = Cluster(process, port, environ)
    try:
        until(lambda: process.poll() is not None or "is ready" in (folder / "log").read_text(), START_SECONDS)
        assert process.poll() is None, (folder / "log").read_text()
        yield running
    finally:
        family = running.family() if process.poll() is None else []
        process.terminate()
        process.wait(120)
        running.http.close()
        _, alive = psutil.wait_procs(family, timeout=30)
        log.close()
    assert process.returncode == 0
    assert not alive
    assert not [*(folder / "tmp").iterdir(), *(set(Path("/tmp").glob("ray-*")) - before)]


def test_requests_reach_the_box_that_has_their_model(cluster: Cluster) -> None:
    for name in QUICK:
        assert cluster.ask(name).content == b"x"
    time.sleep(2)  # what boxes tell is a second old at most
    draw = random.Random(1)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(cluster.ask, draw.choices(QUICK, k=150)))
    assert all(answer.status_code == 200 for answer in answers)
    found_ready = sum(not answer.headers["server-timing"].startswith("load") for answer in answers)
    assert found_ready >= 0.95 * len(answers)
    assert all(len(answer.headers.get_list("x-request-id")) == 1 for answer in answers)


def test_large_bodies_pass(cluster: Cluster) -> None:
    body = os.urandom(30 << 20)
    answer = cluster.ask("m0", content=body, headers={"content-type": "application/octet-stream"})
    assert answer.content == body


def test_a_model_that_many_want_is_at_both_boxes(cluster: Cluster) -> None:
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(cluster.ask, ["slow"] * 24))
    assert [answer.status_code for answer in answers] == [200] * 24
    table = cluster.run("status")
    assert sum("slow" in line for line in table.splitlines()) == 2, table


def test_events_arrive_one_by_one(cluster: Cluster) -> None:
    picture = (ROOT / "tests" / "data" / "dog-on-bench.png").read_bytes()
    fields = {"points": "[[1, 1]]", "model": "slow"}
    headers = {"accept": "text/event-stream", "x-palimpsest-model": "slow"}
    with cluster.http.stream("POST", "/v1/segment", data=fields, files={"image": picture}, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.iter_lines() if line.startswith("event:")]
    assert events[0] == "event: job"
    assert "event: progress" in events
    assert events[-1] in ("event: result", "event: error")  # what a handler of another make echoes is no mask


def test_all_boxes_find_what_one_of_them_keeps(cluster: Cluster) -> None:
    picture = (ROOT / "tests" / "data" / "dog-on-bench.png").read_bytes()
    uploads = [
        cluster.http.post("/v1/images", content=picture, headers={"content-type": "image/png"}) for _ in range(4)
    ]
    names = {answer.json()["id"] for answer in uploads}
    for name, _ in product(names, range(4)):
        fields = {"image": name, "points": [[1, 1]], "model": "m0"}
        answer = cluster.http.post("/v1/segment", json=fields)
        # The handler is of another make: it echoes the form that the gateway makes of them.
        assert answer.status_code != 404, answer.text
    lost = cluster.http.post("/v1/segment", json={"image": f"{names.pop().split('.')[0]}x.gone", "points": [[1, 1]]})
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "image_not_found")


def test_who_leaves_waits_no_longer(cluster: Cluster) -> None:
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(cluster.ask, "slow") for _ in range(8)]
        with pytest.raises(httpx.ReadTimeout):
            cluster.ask("slow", timeout=0.3)
        assert all(each.result().status_code == 200 for each in running)
    until(lambda: _busy(cluster) == 0, 10)


def _busy(cluster: Cluster) -> int:
    """Requests that run or wait at a box: at another one each time, as it comes."""
    state = cluster.http.get("/v1/state").json()
    return int(state["leases"] + state["queue"])


def test_nobody_comes_in_by_rays_ports_without_its_token(cluster: Cluster) -> None:
    """Who does may run anything."""
    codes: dict[str, set[grpc.StatusCode]] = {}
    for host, port in cluster.open_ports():
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            for name, (stub, method, request) in CALLS.items():
                with pytest.raises(grpc.RpcError) as refused:
                    getattr(stub(channel), method)(request, timeout=10)
                codes.setdefault(name, set()).add(refused.value.code())
    assert all(grpc.StatusCode.UNAUTHENTICATED in each for each in codes.values()), codes
    assert codes.keys() == CALLS.keys()


def test_a_lost_box_costs_what_was_inside_it(cluster: Cluster) -> None:
    lost, *others = cluster.boxes()
    theirs = lost.children(recursive=True)
    answers: list[tuple[float, httpx.Response]] = []
    ended = threading.Event()

    def ask_on(name: str) -> None:
        while not ended.is_set():
            answers.append((time.monotonic(), cluster.ask(name)))

    with ThreadPoolExecutor(len(QUICK)) as pool:
        asking = [pool.submit(ask_on, name) for name in QUICK]
        until(lambda: len(answers) > 50, 30)
        lost.kill()
        killed = time.monotonic()
        until(lambda: answers[-1][0] > killed + LOST_SECONDS, 60)
        until(lambda: len(cluster.boxes()) == len(others) + 1 and lost not in cluster.boxes(), 60)
        ended.set()
        for each in asking:
            each.result()
    refused = [(when, answer) for when, answer in answers if answer.status_code != 200]
    assert Counter(answer.json()["error"]["code"] for _, answer in refused) <= Counter(unavailable=len(QUICK))
    assert all("retry-after" in answer.headers for _, answer in refused)
    assert all(when < killed + LOST_SECONDS for when, _ in refused)
    _, alive = psutil.wait_procs(theirs, timeout=30)
    assert not alive
