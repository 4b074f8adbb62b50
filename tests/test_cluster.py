"""Two boxes of one machine behind one door, as `palimpsest cluster up` starts them."""

import os
import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import product
from pathlib import Path
from shutil import copytree, ignore_patterns, make_archive
from tempfile import TemporaryDirectory
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
from serving import ROOT, environment, free_port, name_full_set, own_path, palimpsest, until
from zoo import write_archive

from serve import __version__

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
START_SECONDS, LOST_SECONDS, PACE = 240.0, 5.0, 0.1


class Cluster:
    """What `palimpsest cluster up` serves, with the code of a tree of its own, which tests may change."""

    def __init__(self, folder: Path) -> None:
        self.store, self.tree = folder / "store", folder / "tree"
        self.state, self._folder, self._log = folder / "state", folder, folder / "log"
        port, join = free_port(), free_port()
        self._environ = own_path(self.tree) | environment(port, folder, self.store, "full") | {
            "CUDA_VISIBLE_DEVICES": "",
            "PALIMPSEST_MEMORY_BUDGET": str(4 * MEMORY_MIB + 50),
            "PALIMPSEST_PREDICT_TIMEOUT": "60",  # for so long, too, Ray may wait for a box that ends
            "COLUMNS": "200",
        }  # fmt: skip
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)
        self.process = self.start("up", "--boxes", "2", "--port", str(join))

    def start(self, *words: str, state: str = "state") -> subprocess.Popen[str]:
        with self._log.open("a") as log:
            return subprocess.Popen(
                [*palimpsest(self.tree), "cluster", *words], cwd=self.tree, stdout=log, stderr=log, text=True,
                env=self._environ | {"PALIMPSEST_STATE": str(self._folder / state)}, process_group=0,
            )  # fmt: skip

    def says(self, text: str, process: subprocess.Popen[str], seconds: float = START_SECONDS) -> None:
        """Waits until one of its processes has."""
        until(lambda: text in self._log.read_text() or process.poll() is not None, seconds)
        assert text in self._log.read_text(), self._log.read_text()

    def run(self, *words: str) -> str:
        """What the command says, which must end well."""
        before = len(self._log.read_text())
        code = self.start(*words).wait(START_SECONDS)
        said = self._log.read_text()[before:]
        assert code == 0, said
        return said

    def boxes(self) -> list[psutil.Process]:
        return [each for each in self.family() if _title(each).startswith("ray::ServeReplica")]

    def at_the_heads_door(self) -> httpx.Client:
        """A client with one connection. A machine's door has the same address where one machine plays two."""
        (door,) = [each for each in self.family() if _title(each).startswith("ray::ProxyActor")]
        while True:
            http = httpx.Client(base_url=self.url, timeout=120, limits=httpx.Limits(max_connections=1))
            stream = http.get("/v1/state").extensions["network_stream"]
            if stream.get_extra_info("client_addr") in [each.raddr for each in door.net_connections("tcp")]:
                return http
            http.close()

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
    for name in QUICK:
        pack(folder / "store", name)
    write_archive(folder / "store", "slow", memory_mib=MEMORY_MIB, ballast_mib=70, predict="slow", seconds=0.5)
    name_full_set(folder / "store")
    for package in ("contract", "handlers", "serve"):
        copytree(ROOT / package, folder / "tree" / package, ignore=ignore_patterns("__pycache__"))
    before = set(Path("/tmp").glob("palimpsest-*"))
    running = Cluster(folder)
    try:
        running.says("is ready", running.process)
        yield running
    finally:
        family = running.family() if running.process.poll() is None else []
        running.process.terminate()
        running.process.wait(120)
        running.http.close()
        _, alive = psutil.wait_procs(family, timeout=30)
    assert running.process.returncode == 0
    assert not alive
    assert not [*(folder / "tmp").iterdir(), *(set(Path("/tmp").glob("palimpsest-*")) - before)]


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


def pack(store: Path, name: str, **behaviour: Any) -> None:
    """Puts the archive into the store, or in the place of the one that is there, as one file."""
    with TemporaryDirectory(dir=store.parent) as folder:
        made = write_archive(Path(folder), name, memory_mib=MEMORY_MIB, ballast_mib=70, **behaviour)
        packed = make_archive(folder, "gztar", made)
        store.mkdir(exist_ok=True)
        Path(packed).replace(store / f"{name}.tar.gz")


class Asking:
    """Everybody's requests, one after another for each model, all through the head's door, until it is left."""

    def __init__(self, cluster: Cluster) -> None:
        self.answers: list[tuple[float, httpx.Response]] = []
        self._cluster, self._ended = cluster, threading.Event()
        self._pool = ThreadPoolExecutor(len(QUICK))

    def __enter__(self) -> "Asking":
        self._asking = [self._pool.submit(self._ask_on, name) for name in QUICK]
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._pool.shutdown()
        for each in self._asking:
            each.result()

    def go_on(self, answers: int) -> None:
        """Waits for so many more."""
        wanted = len(self.answers) + answers
        until(lambda: len(self.answers) >= wanted or any(each.done() for each in self._asking))

    def refused(self) -> list[tuple[float, httpx.Response]]:
        return [(when, answer) for when, answer in self.answers if answer.status_code != 200]

    def _ask_on(self, name: str) -> None:
        with closing(self._cluster.at_the_heads_door()) as http:
            while not self._ended.wait(PACE):  # or there is no core left for Ray to start anything with
                answer = http.post(f"/predictions/{name}", content=b"x")
                self.answers.append((time.monotonic(), answer))


def test_a_lost_box_costs_what_was_inside_it(cluster: Cluster) -> None:
    lost, *others = cluster.boxes()
    theirs = lost.children(recursive=True)
    with Asking(cluster) as asking:
        asking.go_on(50)
        lost.kill()
        killed = time.monotonic()
        until(lambda: asking.answers[-1][0] > killed + LOST_SECONDS, 60)
        until(lambda: len(cluster.boxes()) == len(others) + 1 and lost not in cluster.boxes(), 60)
    refused = asking.refused()
    assert Counter(answer.json()["error"]["code"] for _, answer in refused) <= Counter(unavailable=len(QUICK))
    assert all("retry-after" in answer.headers for _, answer in refused)
    assert all(when < killed + LOST_SECONDS for when, _ in refused)
    _, alive = psutil.wait_procs(theirs, timeout=30)
    assert not alive


def test_a_machine_comes_and_goes_and_costs_no_request(cluster: Cluster) -> None:
    """Nor do the boxes that are there start anew."""
    before = cluster.boxes()
    with Asking(cluster) as asking:
        asking.go_on(50)
        head, token = (cluster.state / "cluster.address").read_text(), str(cluster.state / "cluster.token")
        joined = cluster.start("join", head, "--token-file", token, "--boxes", "1", state="joined")
        cluster.says(f"This machine belongs to {head}", joined)
        until(lambda: cluster.run("status").count(socket.gethostname()) == 3, START_SECONDS)
        asking.go_on(100)
        family = psutil.Process(joined.pid).children(recursive=True)
        joined.terminate()
        assert joined.wait(120) == 0
        asking.go_on(100)
    assert asking.refused() == []
    assert cluster.boxes() == before
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_new_code_and_a_new_archive_cost_no_request(cluster: Cluster) -> None:
    before = cluster.boxes()
    version = cluster.tree / "serve" / "__init__.py"
    with Asking(cluster) as asking:
        asking.go_on(50)
        version.write_text(version.read_text().replace(f'"{__version__}"', '"99.0"'))
        assert "99.0" in cluster.run("update")
        pack(cluster.store, "m0", reply_bytes=7)
        until(lambda: all(len(cluster.ask("m0").content) == 7 for _ in range(8)), 60)
        asking.go_on(50)
    assert asking.refused() == []
    assert not set(before) & set(cluster.boxes())
    assert len(cluster.boxes()) == len(before)
    assert {cluster.http.get("/openapi.json").json()["info"]["version"] for _ in range(8)} == {"99.0"}
