"""The SageMaker container API, on a TorchServe that is a function."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fakes import OWN_ERROR, FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient

HASH = "0f3a9c"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    # The last one as SageMaker lays archives out: /opt/ml/models/<hash>/model.
    make_store(tmp_path, *("store/sam", "store/lama", "store/team/own", f"store/{HASH}/model", "elsewhere"))
    return tmp_path / "store"


@pytest.fixture
def client(fake: FakeTorchServe, store: Path) -> Iterator[TestClient]:
    with gateway(fake, store) as running:
        yield running


def load(client: TestClient, name: str, url: str) -> httpx.Response:
    return client.post("/models", json={"model_name": name, "url": url})


def names(client: TestClient) -> list[str]:
    return [model["modelName"] for model in client.get("/models").json()["models"]]


def test_a_models_life_under_the_platforms_name(client: TestClient, fake: FakeTorchServe, store: Path) -> None:
    url = str(store / HASH / "model")
    entry = {"modelName": HASH, "modelUrl": url}
    assert load(client, HASH, url).status_code == 200
    assert load(client, HASH, url).status_code == 409
    assert client.get("/models").json() == {"models": [entry]}
    assert client.get(f"/models/{HASH}").json() == entry
    headers = {"X-Amzn-SageMaker-Target-Model": "any/sam.tar.gz", "accept": "image/png"}
    answer = client.post(f"/models/{HASH}/invoke", content=b"body", headers=headers)
    assert (answer.status_code, answer.content) == (200, b"png")
    assert fake.calls[-1].content == b"body"
    assert client.delete(f"/models/{HASH}").status_code == 200
    assert fake.paths() == [
        "POST /models", f"POST /predictions/p.{HASH}--model", f"DELETE /models/p.{HASH}--model",
    ]  # fmt: skip
    assert client.get("/models").json() == {"models": []}


def test_a_model_that_is_not_loaded_is_404_and_never_loaded_on_the_way(
    client: TestClient, fake: FakeTorchServe
) -> None:
    for name in ("sam", "team/own", "nobody", "..%2fsam", "a--b"):
        for answer in (
            client.get(f"/models/{name}"),
            client.delete(f"/models/{name}"),
            client.post(f"/models/{name}/invoke"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert fake.calls == []


def test_an_unloaded_model_is_404_until_it_is_loaded_again(client: TestClient) -> None:
    for _ in range(2):
        assert load(client, "sam", "sam").status_code == 200
        assert client.post("/models/sam/invoke").status_code == 200
        assert client.delete("/models/sam").status_code == 200
        assert client.post("/models/sam/invoke").status_code == 404
        assert client.delete("/models/sam").status_code == 404


def test_what_a_request_loaded_is_listed_by_its_own_name(client: TestClient, store: Path) -> None:
    client.post("/predictions/sam")
    client.post("/predictions/team/own")
    assert client.get("/models").json()["models"] == [
        {"modelName": "sam", "modelUrl": str(store / "sam")},
        {"modelName": "team/own", "modelUrl": str(store / "team" / "own")},
    ]
    assert load(client, "sam", "sam").status_code == 409
    for spelling in ("team/own", "team/own.tar.gz"):
        assert client.get(f"/models/{spelling}").json()["modelName"] == "team/own"
        assert client.post(f"/models/{spelling}/invoke").status_code == 200
    assert client.delete("/models/team/own").status_code == 200
    assert names(client) == ["sam"]


def test_a_given_name_stands_for_its_archive_also_when_a_request_loads_it_again(client: TestClient) -> None:
    load(client, "abc", "lama")
    client.post("/predictions/sam")
    assert names(client) == ["abc", "sam"]
    # By its archive's name, the platform's name goes with it.
    assert client.delete("/models/lama").status_code == 200
    assert client.get("/models/abc").status_code == 404
    client.post("/predictions/lama")
    assert names(client) == ["lama", "sam"]


@pytest.mark.slow
@pytest.mark.parametrize("url", ["sam", "/sam.tar.gz", "sam.mar", "{store}/sam", "{store}/sam/", "{store}/sam.tar.gz"])
def test_an_archive_is_named_or_pointed_at(client: TestClient, fake: FakeTorchServe, store: Path, url: str) -> None:
    answer = load(client, "x", url.format(store=store))
    if url == "/sam.tar.gz":  # here a leading slash means the root
        assert answer.status_code == 400
    else:
        assert answer.status_code == 200
        assert fake.calls[0].url.params["url"] == str(store / "sam")


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "{store}",
        "{store}/../elsewhere",
        "{store}/sam/../../elsewhere",
        "{store}-other/sam",
        "../elsewhere",
        "file://{store}/sam",
        "s3://bucket/sam.tar.gz",
        "https://example.com/sam.mar",
        "{store}/nobody",
        "nobody",
        "",
    ],
)
def test_nothing_outside_the_store_is_loaded(client: TestClient, fake: FakeTorchServe, store: Path, url: str) -> None:
    answer = load(client, "x", url.format(store=store))
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "url")
    assert fake.calls == []


def test_a_path_means_the_archive_that_lies_there_not_the_demo_set(fake: FakeTorchServe, store: Path) -> None:
    demo = store / "demo" / "sam" / "MAR-INF"
    demo.mkdir(parents=True)
    (demo / "MANIFEST.json").write_text("{}")
    with gateway(fake, store, demo=True) as client:
        assert load(client, "a", str(store / "sam")).status_code == 400
        assert load(client, "b", str(store / "demo" / "sam")).status_code == 200
        assert client.get("/models/sam").json()["modelName"] == "b"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "sam"}, "model_name"),
        ({"model_name": "x"}, "url"),
        ({"model_name": "../x", "url": "sam"}, "model_name"),
        ({"model_name": "a b", "url": "sam"}, "model_name"),
        ({"model_name": "", "url": "sam"}, "model_name"),
    ],
)
def test_a_wrong_load_request_names_its_field(client: TestClient, body: dict[str, str], field: str) -> None:
    answer = client.post("/models", json=body)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 507])
def test_a_failed_load_is_reported_and_not_listed(client: TestClient, fake: FakeTorchServe, status: int) -> None:
    fake.replies["POST /models"] = httpx.Response(status, json=OWN_ERROR)
    assert load(client, "x", "sam").status_code == status
    assert names(client) == []
    assert client.get("/models/x").status_code == 404


def test_too_little_memory_for_a_request_is_507(client: TestClient, fake: FakeTorchServe) -> None:
    load(client, "x", "sam")
    fake.replies["POST /predictions/p.sam"] = httpx.Response(507, json=OWN_ERROR)
    assert client.post("/models/x/invoke").status_code == 507


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
def test_pages_show_every_model_once_and_the_last_has_no_token(client: TestClient, limit: int) -> None:
    loaded = ["a", "b", "c", "d"]
    for name, url in zip(loaded, ("sam", "lama", "team/own", f"{HASH}/model"), strict=True):
        load(client, name, url)
    seen: list[str] = []
    pages = 0
    query: dict[str, str | int] = {"limit": limit}
    while True:
        page = client.get("/models", params=query).json()
        seen += [model["modelName"] for model in page["models"]]
        pages += 1
        if "nextPageToken" not in page:
            break
        query["next_page_token"] = page["nextPageToken"]
    assert seen == loaded
    assert pages == -(-len(loaded) // limit)


def test_a_model_that_goes_between_two_pages_hides_no_other(client: TestClient) -> None:
    for name, url in (("a", "sam"), ("b", "lama"), ("c", "team/own")):
        load(client, name, url)
    first = client.get("/models", params={"limit": 1}).json()
    client.delete("/models/a")
    rest = client.get("/models", params={"next_page_token": first["nextPageToken"]}).json()
    assert [model["modelName"] for model in rest["models"]] == ["b", "c"]


def test_openapi_describes_the_container_api(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"400", "409", "429", "500", "507"} <= paths["/models"]["post"]["responses"].keys()
    for method in ("get", "delete"):
        assert "404" in paths["/models/{name}"][method]["responses"]
    assert "404" in paths["/models/{name}/invoke"]["post"]["responses"]
