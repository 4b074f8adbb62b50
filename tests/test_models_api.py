"""What an operator sees and does through /v1/models and `palimpsest models`, on a TorchServe that is a function."""

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fakes import OWN_ERROR, FakeDevice, FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient
from rich.console import Console
from test_metrics import SIZE, pack
from typer.testing import CliRunner

from serve import cli, models_table
from serve.errors import PalimpsestError
from serve.residency.model import State, Taken
from serve.residency.scheduler import Scheduler

MODELS = "/v1/models"
LOADED = {"place": "memory", "state": "ready"}
ON_DISK = {"place": "disk", "state": "absent"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, "sam", "lama", "team/own", memory_mib=SIZE >> 20)


@pytest.fixture
def client(fake: FakeTorchServe, store: Path) -> Iterator[TestClient]:
    with gateway(fake, store, budget=2 * SIZE, minimum_stay=0) as running:
        yield running


def scheduler(client: TestClient) -> Scheduler:
    return client.app.state.services.scheduler


def status(client: TestClient, name: str) -> dict[str, Any]:
    answer = client.get(f"{MODELS}/{name}")
    assert answer.status_code == 200
    return answer.json()


def do(client: TestClient, name: str, what: str) -> dict[str, Any]:
    answer = client.post(f"{MODELS}/{name}/{what}")
    assert answer.status_code == 200, answer.text
    after = answer.json()
    assert status(client, name).items() >= {key: after[key] for key in ("name", "version", "state", "pinned")}.items()
    return after


def names(client: TestClient) -> list[str]:
    return [model["name"] for model in client.get(MODELS).json()["models"]]


def test_every_archive_is_listed_before_any_request(client: TestClient, fake: FakeTorchServe) -> None:
    listed = client.get(MODELS).json()
    assert [model["name"] for model in listed["models"]] == ["lama", "sam", "team/own"]
    assert listed["memory"] == {
        "device": "fake", "budget_bytes": 2 * SIZE, "reserved_bytes": 0, "standby_bytes": 0, "free_bytes": 2**40,
            "host_budget_bytes": 0, "host_reserved_bytes": 0,
    }  # fmt: skip
    assert listed["models"][1] == {
        "name": "sam", "version": None, **ON_DISK, "pinned": False, "footprint": None, "reserved_bytes": 0,
            "host_bytes": 0, "leases": 0, "queue": 0,
        "last_used": None, "idle_seconds": None, "requests": 0, "hits": 0, "loads": 0, "wakes": 0, "failures": 0,
        "last_error": None,
    }  # fmt: skip
    assert fake.calls == []


def test_requests_show_in_the_counts(client: TestClient) -> None:
    for _ in range(3):
        client.post("/predictions/team/own")
    seen = status(client, "team/own")
    assert seen.items() >= (LOADED | {"requests": 3, "hits": 2, "loads": 1, "reserved_bytes": SIZE}).items()
    assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(seen["last_used"]) < timedelta(minutes=1)
    assert 0 <= seen["idle_seconds"] < 60
    assert status(client, "team/own.tar.gz")["requests"] == 3
    assert client.get(MODELS).json()["memory"]["reserved_bytes"] == SIZE


def test_requests_that_run_and_wait(client: TestClient) -> None:
    async def ask() -> None:
        async with scheduler(client).lease(archive):
            pass

    archive = client.app.state.services.catalog.find("sam")
    with client.portal.wrap_async_context_manager(scheduler(client).lease(archive)):
        waiting = client.portal.start_task_soon(ask)
        seen = status(client, "sam")
        assert (seen["leases"], seen["queue"]) == (1, 1)
    waiting.result(timeout=60)
    seen = status(client, "sam")
    assert (seen["leases"], seen["queue"]) == (0, 0)


def test_load_and_unload(client: TestClient, fake: FakeTorchServe) -> None:
    assert do(client, "team/own", "load").items() >= LOADED.items()
    do(client, "team/own", "load")
    assert do(client, "/team/own.tar.gz", "unload").items() >= ON_DISK.items()
    assert do(client, "team/own", "unload").items() >= ON_DISK.items()
    assert fake.paths() == ["POST /models", "DELETE /models/p.team--own"]


def test_a_pinned_model_stays_until_it_is_unpinned(client: TestClient) -> None:
    assert do(client, "sam", "pin").items() >= (ON_DISK | {"pinned": True}).items()
    for name in ("sam", "lama", "team/own"):
        client.post(f"/predictions/{name}")
    assert (status(client, "sam")["state"], status(client, "lama")["state"]) == ("ready", "absent")
    assert do(client, "sam", "unpin").items() >= (LOADED | {"pinned": False}).items()
    client.post("/predictions/lama")
    assert status(client, "sam")["state"] == "absent"


def test_unloading_ends_a_pin(client: TestClient) -> None:
    do(client, "sam", "load")
    do(client, "sam", "pin")
    assert do(client, "sam", "unload").items() >= (ON_DISK | {"pinned": False}).items()


def test_a_failed_load_says_why_in_the_answer_and_later(client: TestClient, fake: FakeTorchServe) -> None:
    fake.replies["POST /models"] = httpx.Response(500, json=OWN_ERROR)
    answer = client.post(f"{MODELS}/sam/load")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "load_failed")
    seen = status(client, "sam")
    assert seen.items() >= {"place": "disk", "state": "failed", "loads": 0, "failures": 1}.items()
    assert seen["last_error"] == answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_model_that_cannot_fit_is_507(client: TestClient) -> None:
    do(client, "sam", "pin")
    do(client, "sam", "load")
    do(client, "lama", "pin")
    do(client, "lama", "load")
    answer = client.post(f"{MODELS}/team/own/load")
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "out_of_memory")


def test_an_archive_that_left_the_store_is_listed_while_it_is_in_memory(client: TestClient, store: Path) -> None:
    do(client, "sam", "load")
    (store / "sam").rename(store / ".gone")
    assert names(client) == ["lama", "sam", "team/own"]
    assert status(client, "sam")["state"] == "ready"
    assert client.post(f"{MODELS}/sam/unload").json()["state"] == "absent"
    assert names(client) == ["lama", "team/own"]
    assert client.get(f"{MODELS}/sam").status_code == 404


def test_both_versions_are_listed_while_the_old_one_runs(client: TestClient, store: Path) -> None:
    catalog = client.app.state.services.catalog
    old = client.portal.call(catalog.prepare, catalog.find("sam"))
    with client.portal.wrap_async_context_manager(scheduler(client).lease(old)):
        (store / "sam" / "handler.py").write_text("new")
        do(client, "sam", "load")
        listed = [model for model in client.get(MODELS).json()["models"] if model["name"] == "sam"]
        assert {model["version"] for model in listed} == {old.version, status(client, "sam")["version"]}
        assert len(listed) == 2
        assert old.version
    listed = [model["version"] for model in client.get(MODELS).json()["models"] if model["name"] == "sam"]
    assert listed == [status(client, "sam")["version"]]


def test_a_packed_archive_gets_its_version_when_it_is_unpacked(client: TestClient, store: Path) -> None:
    pack(store / "sam")
    assert status(client, "sam")["version"] is None
    pinned = do(client, "sam", "pin")
    assert pinned["version"]
    assert do(client, "sam", "load").items() >= (LOADED | {"version": pinned["version"], "pinned": True}).items()
    assert names(client) == ["lama", "sam", "team/own"]


def test_only_what_requests_can_name_is_listed(fake: FakeTorchServe, store: Path) -> None:
    make_store(store, "demo/sam")
    with gateway(fake, store, demo=True) as client:
        assert names(client) == ["demo/sam", "lama", "team/own"]
        assert status(client, "sam")["name"] == "demo/sam"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["", "/load", "/unload", "/pin", "/unpin"])
@pytest.mark.parametrize(("name", "code"), [("nobody", 404), ("a/nobody", 404), ("..%2fsam", 400), ("a b", 400)])
def test_unknown_and_impossible_names(
    client: TestClient, fake: FakeTorchServe, what: str, name: str, code: int
) -> None:
    answer = client.request("POST" if what else "GET", f"{MODELS}/{name}{what}")
    assert (answer.status_code, answer.json()["error"]["field"]) == (code, "model")
    assert fake.calls == []
    assert scheduler(client).models() == []


@pytest.mark.parametrize(
    ("method", "path", "arguments", "field"),
    [
        ("GET", MODELS, {"params": {"page": "2"}}, "page"),
        ("GET", MODELS, {"params": {"limit": "1001"}}, "limit"),
        ("GET", f"{MODELS}/sam", {"params": {"limit": "5"}}, "limit"),
        ("GET", f"{MODELS}/sam", {"params": {"verbose": ""}}, "verbose"),
        ("POST", f"{MODELS}/sam/load", {"params": {"wait": "5"}}, "wait"),
        ("POST", f"{MODELS}/sam/load", {"json": {"wait": 5}}, "body"),
        ("POST", f"{MODELS}/sam/pin", {"json": {}}, "body"),
    ],
)
def test_what_would_be_ignored_is_refused(
    client: TestClient, method: str, path: str, arguments: dict[str, Any], field: str
) -> None:
    answer = client.request(method, path, **arguments)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)
    assert status(client, "sam")["state"] == "absent"


def test_openapi_describes_every_answer(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    expected = {
        ("", "get"): {"200", "400"},
        ("/{name}", "get"): {"200", "400", "404"},
        ("/{name}/load", "post"): {"200", "400", "404", "429", "500", "503", "504", "507"},
        ("/{name}/unload", "post"): {"200", "400", "404", "429"},
        ("/{name}/pin", "post"): {"200", "400", "404", "500", "503"},
        ("/{name}/unpin", "post"): {"200", "400", "404", "500", "503"},
    }
    for (path, method), codes in expected.items():
        responses = document["paths"][MODELS + path][method]["responses"]
        assert codes <= responses.keys()
        for code in codes - {"200"}:
            schema = responses[code]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert schemas[schema]["required"] == ["error"]


def transport_to(client: TestClient) -> httpx.MockTransport:
    """Requests of the command go to the application without a socket."""

    def forward(request: httpx.Request) -> httpx.Response:
        answer = client.request(request.method, str(request.url))
        return httpx.Response(answer.status_code, content=answer.content)

    return httpx.MockTransport(forward)


def connection(transport: httpx.MockTransport) -> httpx.Client:
    return models_table.connection("http://testserver", transport=transport)


def table(client: TestClient, **options: bool) -> str:
    """What `palimpsest models` prints."""
    console = Console(file=io.StringIO(), width=160)
    arguments = {"once": False, "as_json": False} | options
    with connection(transport_to(client)) as http:
        models_table.show(http, **arguments, console=console)
    return console.file.getvalue()


@pytest.mark.slow
def test_the_table_shows_every_model_and_every_error(client: TestClient, fake: FakeTorchServe) -> None:
    do(client, "team/own", "pin")
    client.post("/predictions/team/own")
    fake.replies["POST /models"] = httpx.Response(500, json=OWN_ERROR)
    client.post("/predictions/lama")
    memory, heading, lama, sam, own, error = table(client, once=True).rstrip().splitlines()
    assert memory == "fake: 100 of 200 MiB held for models, 1,048,576 MiB free"
    assert heading.split()[:3] == ["model", "place", "state"]
    assert lama.startswith("lama")
    assert "failed" in lama
    assert "absent" in sam
    assert own.startswith("team/own (pinned)")
    assert "memory" in own
    assert error.startswith("lama: 'p.lama")


def test_a_pipe_gets_one_table_and_no_control_characters(client: TestClient) -> None:
    assert table(client) == table(client, once=True)
    assert "\x1b" not in table(client)


def test_json_is_the_servers_answer(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    table(client, as_json=True)
    assert json.loads(capsys.readouterr().out) == client.get(MODELS).json()


def test_the_live_table_follows_until_ctrl_c(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        if status(client, "sam")["state"] == "ready":
            raise KeyboardInterrupt
        do(client, "sam", "load")

    monkeypatch.setattr(models_table, "time", SimpleNamespace(sleep=sleep))
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=client.get(request.url.path).content))
    with connection(transport) as http, pytest.raises(KeyboardInterrupt):
        models_table.show(http, once=False, as_json=False, console=console)
    before, found, _ = console.file.getvalue().partition("ready")
    assert "absent" in before
    assert found


def test_without_a_server_the_message_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_PORT", "1")
    monkeypatch.setenv("PALIMPSEST_HOST", "::1")
    result = CliRunner().invoke(cli.app, ["models", "--once"])
    assert isinstance(result.exception, SystemExit)
    assert "http://[::1]:1" in str(result.exception)
    assert "make serve" in str(result.exception)


@pytest.mark.parametrize(
    "answer", [httpx.Response(404), httpx.Response(200, text="<html>"), httpx.Response(200, json={})]
)
def test_another_server_is_told_apart(answer: httpx.Response) -> None:
    transport = httpx.MockTransport(lambda request: answer)
    with connection(transport) as http, pytest.raises(PalimpsestError, match="no Palimpsest of this version"):
        models_table.show(http, once=True, as_json=False, console=Console())


@pytest.mark.slow
def test_warm_reads_the_archive_within_the_host_budget(fake: FakeTorchServe, store: Path) -> None:
    (store / "sam" / "weights").write_bytes(bytes(3 << 20))
    with gateway(fake, store, host_budget=2 << 20) as client:
        answer = client.post(f"{MODELS}/sam/warm")
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "out_of_memory")
        assert "3 MiB" in answer.json()["error"]["message"]
    with gateway(fake, store, host_budget=4 << 20) as client:
        assert client.post(f"{MODELS}/sam/warm").json()["bytes"] > 3 << 20
        assert client.post(f"{MODELS}/none/warm").status_code == 404
        # What `palimpsest models warm` prints, and what it raises.
        console = Console(file=io.StringIO(), width=160)
        with connection(transport_to(client)) as http:
            models_table.warm(http, "sam", console)
            assert "sam: 3 MiB read in" in console.file.getvalue()
            with pytest.raises(PalimpsestError, match="no model"):
                models_table.warm(http, "none", console)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 1000])
def test_pages_show_everything_once(client: TestClient, store: Path, limit: int) -> None:
    """What is in memory but left the store included."""
    do(client, "sam", "load")
    (store / "sam").rename(store / ".gone")
    make_store(store, "another", "zebra")
    seen: list[str] = []
    token: str | None = ""
    while token is not None:
        page = client.get(MODELS, params={"limit": limit, "next_page_token": token}).json()
        assert len(page["models"]) <= limit
        seen += [model["name"] for model in page["models"]]
        token = page["next_page_token"]
    assert seen == ["another", "lama", "sam", "team/own", "zebra"]


def test_the_table_follows_the_pages(fake: FakeTorchServe, tmp_path: Path) -> None:
    names = [f"m{number:03}" for number in range(150)]
    with gateway(fake, make_store(tmp_path, *names)) as client:
        assert len(client.get(MODELS).json()["models"]) == 100
        assert [line.split()[0] for line in table(client).splitlines()[2:]] == names


def test_a_model_that_wakes_is_where_its_weights_are(client: TestClient) -> None:
    do(client, "sam", "load")
    model = scheduler(client).models()[0]
    model.state, model.parking = State.WAKING, Taken(0, 1)
    assert status(client, "sam")["place"] == "parked"
    model.state = State.LOADING
    assert status(client, "sam")["place"] == "disk"
    model.state = State.READY


def test_a_gpus_standby_worker_is_listed_and_counted(
    fake: FakeTorchServe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDevice, "gpu", 0)
    monkeypatch.setattr(FakeDevice, "standby_worker", SIZE)
    with gateway(fake, make_store(tmp_path, "sam"), budget=10 * SIZE) as client:
        warm = client.app.state.services.host.warm

        def prepare() -> None:
            warm.standby = warm.standby_is_ready = True

        warm.prepare_standby = prepare
        assert client.get("/v1/models").json()["memory"]["standby_bytes"] == 0
        # The zygote has just become ready.
        client.portal.call(warm.on_standby)
        assert client.get("/v1/models").json()["memory"]["standby_bytes"] == SIZE
        assert "palimpsest_standby_workers 1" in client.get("/metrics").text
