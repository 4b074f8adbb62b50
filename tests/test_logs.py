"""A line per request: its id, what it says, and what it never says; in front of a TorchServe that is a function."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from door import read, serving
from fakes import FakeTorchServe, application, gateway, make_store
from fastapi.testclient import TestClient
from logged import everything, lines, logged, requests, text
from test_edit_jobs import FIELDS, World

from serve.gateway.access import keys
from serve.gateway.access.keys import Scope
from serve.logs import record

ID = {"X-Request-Id": "studio-7.a:b/c=d@e+f_1"}
NEW = re.compile(r"[0-9a-f]{32}")
TARGET = {"X-Amzn-SageMaker-Target-Model": "sam"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path, "sam", "lama", "sd")


@pytest.fixture
def state(store: Path) -> Path:
    return store / ".state"


@pytest.fixture
def client(fake: FakeTorchServe, store: Path) -> Iterator[TestClient]:
    with gateway(fake, store) as running:
        yield running


def one(state: Path) -> dict[str, Any]:
    [found] = requests(state)
    return found


ASKED = [
    ("GET", "/ping", 200), ("GET", "/metrics", 200), ("GET", "/", 200), ("GET", "/nothing", 404),
    ("GET", "/predictions/sam", 405), ("OPTIONS", "/v1/segment", 204), ("HEAD", "/ping", 200),
    ("POST", "/predictions/sam", 200), ("POST", "/predictions/none", 404), ("POST", "/v1/segment", 400),
    ("POST", "/v1/images/edits", 400), ("POST", "/endpoints/a/invocations", 400),
    ("POST", "/endpoints/a/nothing", 404), ("POST", "/v2/models/sam/infer", 501),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "status"), ASKED)
def test_every_answer_has_the_id_that_the_client_gave(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path, headers=ID)
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, [ID["X-Request-Id"]])


@pytest.mark.parametrize(
    "given",
    [
        "", " ", "a b", "a\tb", "-a", "a" * 129, "a\x1b[31m", "é", 'a"b', "a;b", "a,b", "<a>", "{}", "%0a", "a\\nb",
        "pk_" + "A" * 43, "a\x00", "a\x85b",
    ],
)  # fmt: skip
def test_an_id_that_cannot_stand_in_a_line_is_replaced(client: TestClient, given: str) -> None:
    answer = client.get("/ping", headers={"X-Request-Id": given.encode("latin-1")})
    assert NEW.fullmatch(answer.headers["x-request-id"])


def test_of_two_ids_none_is_believed_and_new_ones_differ(client: TestClient) -> None:
    answers = [client.get("/ping", headers=[("x-request-id", "a"), ("x-request-id", "b")]), client.get("/ping")]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 2
    assert all(map(NEW.fullmatch, ids))


def test_sagemakers_clients_find_it_under_their_name(client: TestClient) -> None:
    for headers in (TARGET, {}):
        answer = client.post("/endpoints/a/invocations", headers=ID | headers)
        assert answer.headers["x-amzn-requestid"] == ID["X-Request-Id"]


REFUSED = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    "too many headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
    "a huge header": (b"GET / HTTP/1.1\r\nHost: a\r\nX-Request-Id: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    "a long address": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "no host": (b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\n\r\n", 400),
}


def test_what_is_refused_before_the_application_has_an_id_and_a_line(
    fake: FakeTorchServe, store: Path, state: Path
) -> None:
    with logged(state), serving(fake, store) as server:
        answers = {name: server.send(sent) for name, (sent, _) in REFUSED.items()}
        unknown = server.send(b"GET / HTTP/1.1\r\nHost: evil.example.org\r\nX-Request-Id: mine\r\n\r\n")
        metrics = server.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").body.decode()
    assert {name: answer.status for name, answer in answers.items()} == {
        name: each[1] for name, each in REFUSED.items()
    }
    told = requests(state)
    assert [line["request"] for line in told] == [
        *(answer.headers["x-request-id"] for answer in answers.values()), "mine"
    ]  # fmt: skip
    assert unknown.headers["x-request-id"] == "mine"
    assert [line["code"] for line in told] == [
        "bad_request", "headers_too_large", "headers_too_large", "address_too_long", "bad_request", "unknown_host"
    ]  # fmt: skip
    assert 'palimpsest_errors_total{code="headers_too_large"} 2.0' in metrics


def test_a_prediction_is_one_line_with_all_that_there_is_to_say(fake: FakeTorchServe, store: Path, state: Path) -> None:
    key, _ = keys.add(state / "keys.json", "studio", [Scope.EDIT], keep=False)
    with logged(state), gateway(fake, store) as client:
        client.post("/predictions/sam?secret=1", content=b"12345", headers={"x-api-key": key, **ID})
    line = one(state)
    times = {name: line.pop(name) for name in ("time", "ms", "load_ms", "engine_ms")}
    assert line == {
        "level": "info", "source": "request", "request": ID["X-Request-Id"], "key": "studio", "method": "POST",
        "route": "/predictions/{model:path}", "status": 200, "outcome": "ok", "model": "sam", "bytes_in": 5,
        "bytes_out": 3,
    }  # fmt: skip
    assert times["ms"] >= times["load_ms"] + times["engine_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(times["time"]))


def test_errors_have_their_code_and_health_checks_a_line_only_where_they_fail(
    client: TestClient, fake: FakeTorchServe, state: Path
) -> None:
    bad = {"error": {"code": "bad_request", "message": "SECRET", "field": "image"}}
    with logged(state):
        client.get("/ping")
        client.get("/metrics")
        client.post("/predictions/none")
        fake.replies["POST /predictions/p.sam"] = httpx.Response(400, json=bad)
        client.post("/predictions/sam")
        client.post("/endpoints/a/invocations", headers=TARGET)
        fake.replies["POST /predictions/p.sam"] = httpx.Response(418, text="SECRET")
        client.post("/predictions/sam")
        fake.replies["GET /ping"] = httpx.Response(503)
        client.get("/ping")
    assert [(line["route"], line["status"], line["code"]) for line in requests(state)] == [
        ("/predictions/{model:path}", 404, "model_not_found"),
        ("/predictions/{model:path}", 400, "bad_request"),
        ("/endpoints/{name}/invocations", 424, "bad_request"),
        ("/predictions/{model:path}", 418, "handler"),
        ("/ping", 503, "unavailable"),
    ]
    assert "SECRET" not in text(state)


def test_a_fault_is_logged_with_its_requests_id_and_without_its_text(
    fake: FakeTorchServe, store: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = application(fake, store)

    def breaks(*args: Any) -> None:
        raise ValueError("SECRET")

    with logged(state), serving(fake, store, app) as server:
        monkeypatch.setattr(app.state.services.catalog, "find", breaks)
        inside = server.send(b"POST /predictions/sam HTTP/1.1\r\nHost: a\r\nX-Request-Id: inside\r\n\r\n")
        monkeypatch.setattr(app.state.services.guard, "admit", breaks)
        outside = server.send(b"GET /ping HTTP/1.1\r\nHost: a\r\nX-Request-Id: outside\r\n\r\n")
    for name, answer in (("inside", inside), ("outside", outside)):
        assert (answer.status, answer.code, answer.headers["x-request-id"]) == (500, "internal", name)
        [fault] = [line for line in lines(state) if line["level"] == "error" and line.get("request") == name]
        assert fault["frames"][-1] == "ValueError"
        assert any(frame.endswith(" breaks") for frame in fault["frames"])
    assert {line["request"]: line["code"] for line in requests(state)} == {"inside": "internal", "outside": "internal"}
    assert "SECRET" not in text(state)


def test_who_leaves_is_told_from_who_is_answered(fake: FakeTorchServe, store: Path, state: Path) -> None:
    with logged(state), serving(fake, store) as server:
        with server.connect() as line:
            line.sendall(b"POST /predictions/sam HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nX-Request-Id: a\r\n\r\n1")
        with server.connect() as line:
            line.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\nX-Request-Id: b\r\n\r\n")
            read(line)
    assert {line["request"]: line["outcome"] for line in requests(state)} == {"a": "client_left", "b": "ok"}


@pytest.mark.anyio
async def test_streams_end_with_what_became_of_them(tmp_path: Path) -> None:
    store = make_store(tmp_path, "sam", "sd", ours=True)
    app = application(FakeTorchServe(), store)
    transport = httpx.ASGITransport(app)

    async def fails(job: Any) -> tuple[int, dict[str, Any]]:
        return 400, {"error": {"code": "bad_request", "message": "SECRET", "field": "prompt"}}

    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        world = World(client, app.state.services)
        world.work = fails
        with logged(store / ".state"):
            stream = {"accept": "text/event-stream"}
            answer = await client.post("/v1/replace", json=FIELDS, headers=ID | stream)
    assert "event: error" in answer.text
    assert answer.headers["x-request-id"] == ID["X-Request-Id"]
    line = one(store / ".state")
    assert (line["status"], line["code"], line["model"]) == (200, "bad_request", "sd")


# Who asks may not write lines of his own, nor move a terminal's cursor.
EVIL = "\r\n2026-01-01T00:00:00.000Z info    request forged\x1b[2K\x9b2J\u2028\u202e\ud800"


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_line_can_be_forged(client: TestClient, fake: FakeTorchServe, state: Path, form: str) -> None:
    fake.replies["POST /predictions/p.sam"] = httpx.Response(
        400, content=json.dumps({"error": {"code": EVIL, "message": EVIL}})
    )
    with logged(state, form) as log:
        client.post("/predictions/sam")
        client.post("/predictions/x%0d%0a2026%1b%5b2K", headers={"x-request-id": b"a\x1b[2K", "x\x0b": b"\x0cy"})
        client.request("FORGED", "/ping")
        # Not the half of a character: what pytest shows of a log could not be written.
        logging.getLogger("serve.x").warning("it said %s", EVIL.removesuffix("\ud800"))
        log.engine_said(f"2026-11-28T22:19:30,945 [WARN ] main org.X - {EVIL}\n".encode(errors="surrogatepass"))
    written = text(state)
    assert len(written.splitlines()) == 6  # what TorchServe itself writes as two lines is two, and both TorchServe's
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", written)
    if form == "console":
        assert all(re.match(r"\d{4}-\d\d-\d\dT\S+Z (info|warning) +(request|serve\.x|torchserve) ", line)
                   for line in written.splitlines())  # fmt: skip
    else:
        assert [line["source"] for line in lines(state)] == ["request"] * 3 + ["serve.x"] + ["torchserve"] * 2


def test_handlers_are_told_the_id_and_no_keys(fake: FakeTorchServe, store: Path, state: Path) -> None:
    key, _ = keys.add(state / "keys.json", "studio", [Scope.EDIT], keep=False)
    with gateway(fake, store) as client:
        sent = {"x-api-key": key, "cookie": "a=SECRET", "x-palimpsest-request": "SECRET", "tracestate": "a=SECRET"}
        client.post("/predictions/sam", headers=sent | ID)
    [asked] = [call for call in fake.calls if "/predictions/" in call.url.path]
    assert asked.headers["x-request-id"] == ID["X-Request-Id"]
    assert not [value for value in asked.headers.values() if "SECRET" in value or key in value]


def test_a_load_is_no_single_requests(client: TestClient, fake: FakeTorchServe, state: Path) -> None:
    """What a load logs must not name whoever happened to bring it about."""

    def replied(request: httpx.Request) -> httpx.Response:
        logging.getLogger("serve.test").warning("%s", record.current())
        return httpx.Response(200, json={})

    fake.replies["POST /models"] = replied
    with logged(state):
        client.post("/predictions/sam", headers=ID)
    [told] = [line for line in lines(state) if line["source"] == "serve.test"]
    assert told["text"] == "None"
    assert "request" not in told


MARK = "MaRkEr"


def planted(number: int) -> str:
    return f"{MARK}{number:02}"


def test_nothing_of_what_clients_send_is_written_anywhere(
    fake: FakeTorchServe, store: Path, state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In every place of good and of failing requests."""
    key, _ = keys.add(state / "keys.json", "studio", [Scope.EDIT], keep=True)
    wrong = f"pk_{planted(1)}{'x' * 40}"
    headers = {
        "authorization": f"Bearer {key}", "cookie": f"palimpsest={planted(2)}", "user-agent": planted(3),
        "referer": f"http://testserver/{planted(4)}", "x-odd": planted(5), "content-type": "application/json",
        "x-amzn-sagemaker-custom-attributes": planted(6), "tracestate": f"a={planted(7)}", "baggage": planted(8),
        "x-forwarded-for": planted(9), "x-request-id": f"{planted(10)} {key}", "traceparent": planted(11),
    }  # fmt: skip
    body = {"prompt": planted(20), "image": planted(21), "points": planted(22), planted(23): 1}
    form = {"image": (f"{planted(24)}.png", b"\x89PNG\r\n\x1a\n" + planted(25).encode(), f"image/{planted(26)}")}
    signature = f"AWS4-HMAC-SHA256 Credential={planted(12)}/20260101/us-east-1/sagemaker/aws4_request"
    error = httpx.Response(500, json={"code": 500, "type": planted(40), "message": planted(41)})
    with logged(state), gateway(fake, store) as client:
        for reply in (None, httpx.Response(400, text=planted(42)), error, httpx.ReadError(planted(43))):
            fake.replies |= {} if reply is None else {f"POST /predictions/p.{name}": reply for name in ("sam", "sd")}
            for path in ("/predictions/sam", "/v1/segment", "/v1/replace", "/v1/images/edits", "/v1/images"):
                client.post(f"{path}?{planted(30)}={planted(31)}", json=body, headers=headers)
                plain = {name: value for name, value in headers.items() if name != "content-type"}
                client.post(path, data={"prompt": planted(32)}, files=form, headers=plain)
                client.post(path, content=b"{" + planted(33).encode(), headers=headers)
                client.post(path, content=planted(34), headers=plain | {"content-type": planted(35)})
        for path in (
            f"/{planted(36)}",
            f"/predictions/{planted(37)}",
            f"/v1/jobs/{planted(38)}",
            f"/v1/images/{planted(39)}",
        ):
            client.get(path, headers=headers)
            client.post(path, headers=headers)
            client.delete(path, headers=headers)
        client.post(
            f"/endpoints/{planted(13)}/invocations", headers=headers | {"x-amzn-sagemaker-target-model": planted(14)}
        )
        client.post("/login", json={"key": wrong})
        client.post("/predictions/sam", headers={"authorization": f"Bearer {wrong}"})
        client.post("/predictions/sam", headers={"authorization": f"{signature}, Signature={planted(15)}"})
        client.post("/predictions/sam", headers={"host": f"{planted(16)}.example.org"})
        metrics = client.get("/metrics").text
    (state / "keys.json").unlink()
    seen = capfd.readouterr()
    written = everything(state).decode() + seen.out + seen.err + metrics
    assert len(requests(state)) > 50
    assert MARK.lower() not in written.lower()
    assert key not in written


@pytest.mark.slow
def test_each_request_has_one_line_under_load_and_none_is_lost(client: TestClient, state: Path) -> None:
    with logged(state):
        ids = [client.post("/predictions/none").headers["x-request-id"] for _ in range(200)]
    assert [line["request"] for line in requests(state)] == ids


def test_json_lines_are_one_object_each(client: TestClient, state: Path) -> None:
    with logged(state):
        client.post("/predictions/sam")
        logging.getLogger("serve.x").error("wrong", exc_info=KeyError("SECRET"))
    assert [json.loads(line)["level"] for line in text(state).splitlines()] == ["info", "error"]
