"""The gateway against a TorchServe that is a function: what it asks, and how it turns answers into HTTP."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest
from fakes import DIED, OWN_ERROR, RAISED, FakeTorchServe, gateway, make_store, refused


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, "sam", "demo/sam", "team/own")


def test_a_model_is_loaded_once_and_the_answer_passes_through(store: Path) -> None:
    fake = FakeTorchServe()
    with gateway(fake, store) as client:
        for path in ("/predictions/sam", "/models/sam/invoke"):
            answer = client.post(path, content=b"body", headers={"accept": "image/png", "x-mine": "1"})
            assert (answer.status_code, answer.content) == (200, b"png")
            assert answer.headers["x-palimpsest-seed"] == "7"
    assert fake.paths() == ["POST /models", "POST /predictions/p.sam", "POST /predictions/p.sam"]
    register, predict, _ = fake.calls
    query = dict(register.url.params)
    assert query.pop("model_name") == predict.url.path.rpartition("/")[2]
    assert query == {
        "url": str(store / "sam"), "initial_workers": "1", "synchronous": "true", "response_timeout": "86400",
    }  # fmt: skip
    assert predict.content == b"body"
    assert predict.headers["accept"] == "image/png"
    assert predict.headers["x-mine"] == "1"


def test_clients_cannot_bring_their_own_token(store: Path) -> None:
    fake = FakeTorchServe()
    with gateway(fake, store) as client:
        client.post("/predictions/sam", headers={"authorization": "Bearer stolen"})
    assert [call.headers["authorization"] for call in fake.calls] == ["Bearer key-m", "Bearer key-i"]


def test_clients_cannot_command_a_worker(store: Path) -> None:
    fake = FakeTorchServe()
    headers = {"x-palimpsest-command": "park", "X-Palimpsest-Key": "guessed", "x-palimpsest-job": "/etc/passwd"}
    with gateway(fake, store) as client:
        client.post("/predictions/sam", headers=headers)
        client.post("/models/sam/invoke", headers=headers)
        client.post(
            "/endpoints/x/invocations", headers=headers | {"X-Amzn-SageMaker-Target-Model": "sam"}, content=b"{}"
        )
    asked = [call for call in fake.calls if "/predictions/" in call.url.path]
    assert len(asked) == 3
    assert not [name for call in asked for name in call.headers if name.startswith("x-palimpsest")]


@pytest.mark.parametrize("name", ["sam", "sam.tar.gz", "/sam.tar.gz", "sam.mar", "team/own", "demo/sam"])
def test_names_of_every_spelling_find_their_archive(store: Path, name: str) -> None:
    with gateway(FakeTorchServe(), store) as client:
        assert client.post(f"/predictions/{name}").status_code == 200


def test_the_demo_set_stands_behind_the_bare_names(store: Path) -> None:
    fake = FakeTorchServe()
    with gateway(fake, store, demo=True) as client:
        client.post("/predictions/sam")
        client.post("/predictions/team/own")
    assert [call.url.params.get("url") for call in fake.calls[::2]] == [
        str(store / "demo/sam"),
        str(store / "team/own"),
    ]


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("none", 404),
        ("..%2fsam", 400),
        ("a%2f..%2fsam", 400),
        (".hidden", 400),
        ("a--b", 400),
        ("%00", 400),
        ("a b", 400),
    ],
)
def test_names_never_become_foreign_paths(store: Path, name: str, status: int) -> None:
    fake = FakeTorchServe()
    with gateway(fake, store) as client:
        answer = client.post(f"/predictions/{name}")
    assert answer.status_code == status
    assert answer.json()["error"]["field"] == "model"
    assert fake.calls == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "reply", "status", "code"),
    [
        ("POST /models", httpx.Response(507, json=OWN_ERROR), 507, "out_of_memory"),
        ("POST /models", httpx.Response(500, json=OWN_ERROR), 500, "load_failed"),
        ("POST /models", refused(), 503, "unavailable"),
        ("POST /predictions/p.sam", httpx.Response(503, json=OWN_ERROR), 503, "unavailable"),
        ("POST /predictions/p.sam", httpx.Response(507, json=OWN_ERROR), 507, "out_of_memory"),
        ("POST /predictions/p.sam", httpx.Response(507, json=DIED), 503, "unavailable"),
        ("POST /predictions/p.sam", httpx.Response(500, json=DIED), 503, "unavailable"),
        ("POST /predictions/p.sam", httpx.Response(503, json=RAISED), 500, "model_failed"),
        ("POST /predictions/p.sam", httpx.Response(512, json=RAISED), 500, "model_failed"),
        ("POST /predictions/p.sam", httpx.Response(422, json=RAISED), 400, "bad_request"),
        (
            "POST /predictions/p.sam",
            httpx.Response(500, json=OWN_ERROR | {"type": "ErrorDataDecoderException", "message": "empty name"}),
            400,
            "bad_request",
        ),
        ("POST /predictions/p.sam", TimeoutError(), 504, "deadline_exceeded"),
        ("POST /predictions/p.sam", aiohttp.ServerDisconnectedError(), 503, "unavailable"),
    ],
)
def test_torchserves_errors_become_ours(
    store: Path,
    call: str,
    reply: httpx.Response | Exception,
    status: int,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.engine.handlerlog.WRITTEN_WITHIN", 0)  # nobody writes a log here
    fake = FakeTorchServe()
    fake.replies[call] = reply
    with gateway(fake, store, queue_timeout=0.1) as client:
        answer = client.post("/predictions/sam")
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert (status == 503) == ("Retry-After" in answer.headers)


def test_a_handlers_error_passes_through(store: Path) -> None:
    fake = FakeTorchServe()
    body = {"error": {"code": "bad_request", "message": "image is missing", "field": "image"}}
    fake.replies["POST /predictions/p.sam"] = httpx.Response(400, json=body)
    with gateway(fake, store) as client:
        answer = client.post("/predictions/sam")
    assert (answer.status_code, answer.json()) == (400, body)


def test_a_failed_load_is_cleaned_up_and_not_hammered(store: Path) -> None:
    fake = FakeTorchServe()
    fake.replies["POST /models"] = httpx.Response(500, json=OWN_ERROR)
    with gateway(fake, store) as client:
        answers = [client.post("/predictions/sam") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [500] * 3
    # The scheduler pauses before it tries a failed model again.
    assert fake.paths() == ["POST /models", "DELETE /models/p.sam"]


def test_a_body_over_the_limit_is_refused_with_the_limit(store: Path) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(2**19)

    with gateway(FakeTorchServe(), store, max_request_mib=1) as client:
        for answer in (
            client.post("/predictions/sam", content=bytes(2**20 + 1)),
            client.post("/predictions/sam", content=chunks()),
        ):
            assert answer.status_code == 413
            assert "1 MiB" in answer.json()["error"]["message"]
        assert client.post("/predictions/sam", content=bytes(2**20)).status_code == 200


def test_unknown_routes_and_methods_have_the_same_error_shape(store: Path) -> None:
    with gateway(FakeTorchServe(), store) as client:
        assert client.get("/nowhere").json()["error"]["code"] == "not_found"
        assert client.get("/predictions/sam").json()["error"]["code"] == "method_not_allowed"


def test_ping_tells_whether_torchserve_answers(store: Path) -> None:
    fake = FakeTorchServe()
    with gateway(fake, store) as client:
        assert client.get("/ping").status_code == 200
        fake.replies["GET /ping"] = httpx.Response(500, json={"status": "Unhealthy"})
        assert client.get("/ping").status_code == 200
        fake.replies["GET /ping"] = refused()
        assert client.get("/ping").status_code == 503


def test_the_page_of_the_api_needs_no_other_server(store: Path) -> None:
    with gateway(FakeTorchServe(), store) as client:
        page = client.get("/docs").text
        addresses = re.findall(r"""(?:src|href)=["']([^"']+)|url: '([^']+)'""", page)
        used = {first or second for first, second in addresses}
        assert {"/openapi.json", "/docs/files/swagger-ui-bundle.js", "/docs/files/swagger-ui.css"} <= used
        assert all(address.startswith("/") and client.get(address).status_code == 200 for address in used)


def test_openapi_describes_the_prediction_routes(store: Path) -> None:
    with gateway(FakeTorchServe(), store) as client:
        paths = client.get("/openapi.json").json()["paths"]
    operation = next(item["post"] for path, item in paths.items() if path.startswith("/predictions/"))
    assert not [path for path, item in paths.items() for each in item.values() if "422" in each["responses"]]
    assert {"400", "404", "408", "413", "500", "503", "504", "507"} <= operation["responses"].keys()
    assert json.loads(operation["requestBody"]["content"]["application/json"]["example"]["gen_args"])
