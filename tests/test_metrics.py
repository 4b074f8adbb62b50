"""What /metrics says after scripted traffic, and that the number of its series is bounded by the store."""

import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import prometheus_client
import pytest
from fakes import OWN_ERROR, FakeDevice, FakeTorchServe, gateway, make_store, refused
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from serve.gateway import health, invocation, metrics
from serve.gateway.busiest import Busiest
from serve.gateway.histogram import Histogram

SIZE = 100 * 2**20
BAD_REQUEST = httpx.Response(400, json={"error": {"code": "bad_request", "message": "no image", "field": "image"}})

Samples = dict[tuple[str, tuple[str, ...]], float]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, "sam", "lama", "team/own", memory_mib=SIZE >> 20)


def pack(archive: Path) -> None:
    """Puts archive.tar.gz in the place of the folder."""
    with tarfile.open(f"{archive}.tar.gz", "w:gz") as packed:
        packed.add(archive, ".")
    shutil.rmtree(archive)


@pytest.fixture
def client(fake: FakeTorchServe, store: Path) -> Iterator[TestClient]:
    with gateway(fake, store, budget=10 * SIZE, minimum_stay=0) as running:
        yield running


def scrape(client: TestClient) -> Samples:
    """The value of every sample, by its name and the values of its labels by their names; each must be there once."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == health.CONTENT_TYPE
    found = [s for family in text_string_to_metric_families(answer.text) for s in family.samples]
    samples = {
        (s.name.removeprefix("palimpsest_"), tuple(value for _, value in sorted(s.labels.items()))): s.value
        for s in found
    }
    assert len(samples) == len(found)
    return samples


def engine_name(client: TestClient, name: str) -> str:
    return client.app.state.services.catalog.find(name).engine_name


class Clock:
    """Passes only where TorchServe is asked: 5 s for a load, 3 s for a prediction."""

    def __init__(self, fake: FakeTorchServe) -> None:
        self._fake = fake

    def perf_counter(self) -> float:
        paths = self._fake.paths()
        return 1.0 + 5 * paths.count("POST /models") + 3 * sum(path.startswith("POST /predictions") for path in paths)


def test_time_is_split_between_the_engine_and_everything_else(
    client: TestClient, fake: FakeTorchServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (metrics, invocation):
        monkeypatch.setattr(module, "time", Clock(fake))
    for _ in range(2):
        client.post("/predictions/sam")
    seen = scrape(client)
    assert seen["model_latency_seconds_count", ("sam",)] == 2
    assert seen["model_latency_seconds_sum", ("sam",)] == 6
    assert seen["overhead_latency_seconds_sum", ("sam",)] == 5
    # Only the first request had to wait for a load.
    assert seen["model_loading_wait_seconds_count", ("sam",)] == 1
    assert seen["model_loading_wait_seconds_sum", ("sam",)] == 5
    assert seen["model_loading_wait_seconds_bucket", ("2.5", "sam")] == 0
    assert seen["model_loading_wait_seconds_bucket", ("5.0", "sam")] == 1


def test_every_door_counts_and_hits_are_those_that_found_the_model_loaded(client: TestClient) -> None:
    client.post("/predictions/sam")
    client.post("/models/sam/invoke")
    client.post("/endpoints/any/invocations", headers={"X-Amzn-SageMaker-Target-Model": "/sam.tar.gz"})
    client.post("/predictions/team/own")
    seen = scrape(client)
    assert seen["invocations_total", ("sam",)] == 3
    assert seen["model_cache_lookups_total", ("sam",)] == 3
    assert seen["model_cache_hits_total", ("sam",)] == 2
    assert seen["model_cache_lookups_total", ("team/own",)] == 1
    assert ("model_cache_hits_total", ("team/own",)) not in seen
    assert seen["model_loading_seconds_count", ("sam", "total")] == 1
    assert seen["queue_wait_seconds_count", ()] == 4
    assert seen["loaded_models", ()] == 2


def test_a_replaced_archive_is_no_hit(client: TestClient, store: Path) -> None:
    client.post("/predictions/sam")
    (store / "sam" / "handler.py").write_text("new")
    client.post("/predictions/sam")
    seen = scrape(client)
    assert seen["model_cache_lookups_total", ("sam",)] == 2
    assert ("model_cache_hits_total", ("sam",)) not in seen
    assert seen["evictions_total", ("sam", "stale")] == 1


@pytest.mark.slow
def test_errors_count_by_their_side(client: TestClient, fake: FakeTorchServe) -> None:
    replies = [
        BAD_REQUEST,
        httpx.Response(500, json={"error": {"code": "internal", "message": "it failed"}}),
        httpx.Response(507, json=OWN_ERROR),
        TimeoutError(),
        httpx.Response(200),
    ]
    for reply in replies:
        fake.replies["POST /predictions/p.sam"] = reply
        client.post("/predictions/sam")
    seen = scrape(client)
    assert seen["invocations_total", ("sam",)] == 5
    assert seen["invocation_4xx_errors_total", ("sam",)] == 1
    assert seen["invocation_5xx_errors_total", ("sam",)] == 3
    # Each was in the engine.
    assert seen["model_latency_seconds_count", ("sam",)] == 5


@pytest.mark.slow
def test_a_request_that_is_tried_twice_is_one_invocation(client: TestClient, fake: FakeTorchServe) -> None:
    client.post("/predictions/sam")
    fake.replies["POST /predictions/p.sam"] = refused()
    assert client.post("/predictions/sam").status_code == 503
    assert fake.paths().count("POST /predictions/p.sam") == 3
    seen = scrape(client)
    assert seen["invocations_total", ("sam",)] == 2
    assert seen["invocation_5xx_errors_total", ("sam",)] == 1


def test_failed_loads_have_a_reason_and_no_model_latency(client: TestClient, fake: FakeTorchServe) -> None:
    fake.replies["POST /models"] = httpx.Response(500, json=OWN_ERROR)
    client.post("/predictions/sam")
    fake.replies["POST /models"] = httpx.Response(507, json=OWN_ERROR)
    client.post("/predictions/lama")
    seen = scrape(client)
    assert seen["model_load_failures_total", ("sam", "load_failed")] == 1
    assert seen["model_load_failures_total", ("lama", "out_of_memory")] == 1
    assert seen["model_load_out_of_memory_total", ("lama",)] == 1
    assert seen["invocation_5xx_errors_total", ("sam",)] == 1
    assert ("model_latency_seconds_count", ("sam",)) not in seen
    assert ("model_loading_seconds_count", ("sam", "total")) not in seen
    assert seen["loaded_models", ()] == 0


def test_evictions_and_the_memory_of_who_stays(fake: FakeTorchServe, store: Path) -> None:
    with gateway(fake, store, budget=2 * SIZE, minimum_stay=0) as client:
        for name in ("sam", "lama", "team/own"):
            assert client.post(f"/predictions/{name}").status_code == 200
        client.post("/v1/models/lama/unload")
        seen = scrape(client)
    assert seen["evictions_total", ("sam", "memory")] == 1
    assert seen["evictions_total", ("lama", "asked_for")] == 1
    assert seen["model_unloading_seconds_count", ("sam",)] == 1
    assert seen["memory_budget_bytes", ()] == 2 * SIZE
    assert seen["memory_used_bytes", ()] == seen["memory_reserved_bytes", ()] == SIZE
    assert seen["model_memory_bytes", ("team/own",)] == SIZE
    assert ("model_memory_bytes", ("sam",)) not in seen
    assert seen["device_free_bytes", ()] == FakeDevice.total


def test_unpacking_is_the_download(client: TestClient, store: Path) -> None:
    pack(store / "team" / "own")
    client.post("/v1/models/team/own/load")
    client.post("/v1/models/sam/load")
    seen = scrape(client)
    assert seen["model_downloading_seconds_count", ("team/own",)] == 1
    assert ("model_downloading_seconds_count", ("sam",)) not in seen


def test_a_dead_worker_is_no_eviction(client: TestClient) -> None:
    client.post("/predictions/sam")
    client.portal.call(client.app.state.services.scheduler.on_worker_lost, engine_name(client, "sam"))
    seen = scrape(client)
    assert seen["worker_deaths_total", ("sam",)] == 1
    assert not [key for key in seen if key[0] == "evictions_total"]


def test_restarts_of_torchserve(client: TestClient) -> None:
    host = client.app.state.services.host
    assert scrape(client)["torchserve_restarts_total", ()] == 0
    client.portal.call(host.on_lost)
    client.portal.call(host.on_ready)
    assert scrape(client)["torchserve_restarts_total", ()] == 1


@pytest.mark.slow
def test_what_nobody_has_leaves_no_series(client: TestClient) -> None:
    client.post("/predictions/sam")
    _ask_for_nobodys(client, 0)  # of routes and codes there are series, of names none
    before = scrape(client).keys()
    for number in range(1, 20):
        _ask_for_nobodys(client, number)
    assert {key for key in scrape(client).keys() - before if key != ("requests_total", ("/metrics", "200"))} == set()


def _ask_for_nobodys(client: TestClient, number: int) -> None:
    for name in (f"nobody{number}", f"sam{number}.tar.gz", "..%2fsam", 'x"y', "a b"):
        client.post(f"/predictions/{name}")
        client.post(f"/models/{name}/invoke")
        client.post("/endpoints/e/invocations", headers={"X-Amzn-SageMaker-Target-Model": name})
        client.post(f"/v1/models/{name}/load")
        client.post(f"/v1/models/{name}/pin")


def test_spellings_of_a_name_and_versions_of_an_archive_share_their_series(client: TestClient, store: Path) -> None:
    client.post("/predictions/sam")
    before = scrape(client).keys()
    for number in range(5):
        (store / "sam" / "handler.py").write_text(f"version {number}")
        for name in ("sam", "sam.tar.gz", "/sam.mar"):
            client.post(f"/predictions/{name}")
    new = {
        key
        for key in scrape(client).keys() - before
        if not key[0].startswith(("model_unloading_seconds", "stage_seconds", "requests_total"))
    }
    assert new == {("model_cache_hits_total", ("sam",)), ("evictions_total", ("sam", "stale"))}


TORCHSERVES = """\
# HELP ts_inference_requests_total Torchserve prometheus counter metric with unit: Count
# TYPE ts_inference_requests_total counter
ts_inference_requests_total{model_name="NEW",model_version="default",hostname="vm",} 4.0
ts_inference_requests_total{model_name="OLD",model_version="default",hostname="vm",} 3.0
ts_inference_requests_total{model_name="p.unknown.0",model_version="default",hostname="vm",} 9.0
# HELP PredictionTime Torchserve prometheus gauge metric with unit: ms
# TYPE PredictionTime gauge
PredictionTime{ModelName="NEW",Level="Model",Hostname="vm",} 0.14
# HELP WorkerLoadTime Torchserve prometheus gauge metric with unit: Milliseconds
# TYPE WorkerLoadTime gauge
WorkerLoadTime{WorkerName="W-9000-NEW_1.0",Level="Host",Hostname="vm",} 4358.0
# HELP Requests2XX Torchserve prometheus counter metric with unit: Count
# TYPE Requests2XX counter
Requests2XX{Level="Host",Hostname="vm",} 89.0
# HELP GPUMemoryUsed Torchserve prometheus gauge metric with unit: Megabytes
# TYPE GPUMemoryUsed gauge
"""


def test_torchserves_own_carry_our_names_and_nothing_that_grows(
    client: TestClient, fake: FakeTorchServe, store: Path
) -> None:
    client.post("/predictions/team/own")
    old = engine_name(client, "team/own")
    (store / "team" / "own" / "handler.py").write_text("new")
    client.post("/predictions/team/own")
    text = TORCHSERVES.replace("NEW", engine_name(client, "team/own")).replace("OLD", old)
    fake.replies["GET /metrics"] = httpx.Response(200, text=text)
    seen = {key: value for key, value in scrape(client).items() if not key[0].islower() or key[0].startswith("ts_")}
    assert seen == {
        ("ts_inference_requests_total", ("team/own",)): 7,
        ("PredictionTime", ("team/own",)): 0.14,
        ("Requests2XX_total", ()): 89,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "reply", [refused(), TimeoutError(), httpx.Response(503), httpx.Response(200, text='x{y="'), httpx.Response(404)]
)
def test_without_torchserves_metrics_ours_are_there(
    client: TestClient, fake: FakeTorchServe, reply: httpx.Response | Exception
) -> None:
    fake.replies["GET /metrics"] = reply
    client.post("/predictions/sam")
    assert scrape(client)["invocations_total", ("sam",)] == 1


def test_our_histogram_says_what_prometheus_own_says() -> None:
    prometheus_client.disable_created_metrics()
    registry, labels, bounds = prometheus_client.CollectorRegistry(), ("model", "phase"), (0.5, 2)
    ours = Histogram("wait_seconds", "Wait.", labels, bounds)
    theirs = prometheus_client.Histogram("wait_seconds", "Wait.", labels, buckets=bounds, registry=registry)
    for value, model in ((0.0, "a"), (0.5, "a"), (0.7, "b"), (2.0, "a"), (3.0, "a"), (120.25, "b")):
        ours.observe(value, model, "total")
        theirs.labels(model, "total").observe(value)
    assert ours.text() == prometheus_client.generate_latest(registry).decode()


@pytest.mark.slow
def test_with_many_models_the_busiest_are_named_and_no_series_ever_falls(
    fake: FakeTorchServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MAX_BYTES", 60_000)
    names = [f"model{number:02}" for number in range(40)]
    store = make_store(tmp_path, *names, memory_mib=1)
    before: dict[tuple[str, tuple[str, ...]], float] = {}
    draw = random.Random(1)
    with gateway(fake, store, budget=2**40) as client:
        for step in range(12):
            hot = names[3 * step : 3 * step + 3]  # others are busy each time
            for name in [*draw.sample(names, 20), *hot * 10]:
                client.post(f"/predictions/{name}")
            assert len(client.get("/metrics").content) <= 60_000
            now = {key: value for key, value in scrape(client).items() if key[0] == "invocations_total"}
            assert all(now[key] >= before[key] for key in now.keys() & before.keys())
            assert not before or ("invocations_total", ("(other)",)) in now
            # A series that has just begun has nothing of the past in it.
            assert all(value <= 31 for key, value in now.items() if key not in before and before and len(key[1][0]) > 7)
            before = now
        assert len(before) < 40


def test_the_busiest_take_the_place_of_the_rarest() -> None:
    left: list[str] = []
    busiest = Busiest(left.append)
    for name in ("a", "b", "c"):
        for _ in range(10):
            assert busiest.use(name) == name
    assert busiest.shrink()
    assert left == ["a"]
    assert [busiest.label(name) for name in "abc"] == ["(other)", "b", "c"]
    assert busiest.use("new") == "(other)"
    for _ in range(30):
        busiest.use("new")
    assert left == ["a", "b"]
    assert [busiest.label(name) for name in ("new", "b", "c")] == ["new", "(other)", "c"]
    for number in range(10_000):
        busiest.use(f"m{number}")
    assert len(busiest._uses) <= 2000
    assert busiest.label("new") == "new"
    assert busiest.shrink()
    assert not busiest.shrink()
