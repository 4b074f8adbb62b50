"""What every reply carries, who may ask, and the corners of TorchServe's and SageMaker's APIs that clients do visit."""

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore
import httpx
import pytest
from fakes import FakeTorchServe, gateway, make_store, refused
from fastapi.testclient import TestClient

from serve.gateway.door import HEADERS, SMALL_BODY, Hosts

TARGET = "X-Amzn-SageMaker-Target-Model"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = make_store(tmp_path_factory.mktemp("store"), "sam", "lama", "team/own", "two", "two/2.0")
    manifest = store / "lama" / "MAR-INF" / "MANIFEST.json"
    manifest.write_text(json.dumps({"model": {"modelName": "lama", "modelVersion": "3.1"}}))
    return store


@pytest.fixture(scope="module")
def shared(store: Path) -> Iterator[tuple[TestClient, FakeTorchServe]]:
    fake = FakeTorchServe()
    with gateway(fake, store, hosts="pictures.example.org, .example.net") as client:
        yield client, fake


@pytest.fixture
def client(shared: tuple[TestClient, FakeTorchServe]) -> TestClient:
    return shared[0]


@pytest.fixture
def fake(shared: tuple[TestClient, FakeTorchServe]) -> Iterator[FakeTorchServe]:
    yield shared[1]
    shared[1].replies.clear()


# Browsers

OUR_HOSTS = [
    "localhost", "localhost:8080", "LOCALHOST", "localhost.", "app.localhost", "127.0.0.1", "127.0.0.1:1", "10.1.2.3",
    "[::1]", "[::1]:8080", "[fe80::1]", "palimpsest", "gpu-1:8080", "pictures.example.org", "PICTURES.example.org.:80",
    "a.example.net", "a.b.example.net:8080", "gpu-1.local", "palimpsest.default.svc.cluster.local",
    "host.docker.internal",
]  # fmt: skip
OTHER_HOSTS = [
    "evil.example", "evil.example:8080", "127.0.0.1.evil.example", "127.0.0.1.nip.io", "localhost.evil.example",
    "a.pictures.example.org", "example.net", "evilexample.net", "pictures.example.org.evil.example", "", ":80",
    "evil.example@localhost", "localhost@evil.example", "localhost/evil.example", "localhost evil.example",
    "localhost:80:80", "localhost:port", "[evil.example]", "[::1", "::1", "[]", "[::1].evil.example",
    "evil.example#localhost",
    "evil.example?localhost", "evil.example\\localhost", "0x7f.1", "127.1", "evil.\u0131nternal", "xn--local-.com",
]  # fmt: skip


@pytest.mark.parametrize("host", OUR_HOSTS)
def test_the_server_goes_by_names_of_its_own(client: TestClient, host: str) -> None:
    assert client.get("/ping", headers={"host": host}).status_code == 200
    assert client.post("/v1/models/sam/pin", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_a_name_that_an_attackers_dns_may_answer_is_refused(client: TestClient, host: str) -> None:
    """Reading, too: such a page is of this server's own origin as far as a browser can tell."""
    for method, path in (
        ("GET", "/ping"),
        ("GET", "/v1/models"),
        ("POST", "/predictions/sam"),
        ("DELETE", "/models/sam"),
    ):
        answer = client.request(method, path, headers={"host": host.encode()})
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host")
        assert "PALIMPSEST_HOSTS" in answer.json()["error"]["message"]


CHANGING = [
    ("POST", "/predictions/sam"), ("PUT", "/predictions/sam"), ("POST", "/models"), ("DELETE", "/models/sam"),
    ("POST", "/models/sam/invoke"), ("POST", "/v1/models/sam/unload"), ("POST", "/v1/models/sam/load"),
    ("POST", "/v1/images"), ("POST", "/v1/segment"), ("POST", "/v1/erase"), ("POST", "/v1/replace"),
    ("DELETE", "/v1/jobs/x"), ("POST", "/endpoints/x/invocations"), ("POST", "/nowhere"), ("PATCH", "/ping"),
]  # fmt: skip
FOREIGN: list[dict[str, str]] = [
    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"sec-fetch-site": "odd"},
    {"sec-fetch-site": ""}, {"sec-fetch-site": "cross-site", "origin": "http://testserver"},
    {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://testserver.evil.example"},
    {"origin": "http://testserver:8080"}, {"origin": "https://testserver:80"}, {"origin": "file://testserver"},
    {"origin": "testserver"}, {"origin": ""}, {"origin": "chrome-extension://testserver"},
]  # fmt: skip
OWN: list[dict[str, str]] = [
    {}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}, {"origin": "http://testserver"},
    {"origin": "http://testserver:80"}, {"origin": "https://testserver"}, {"origin": "HTTP://TestServer"},
    {"sec-fetch-site": "same-origin", "origin": "null"},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_site_changes_nothing(
    client: TestClient, fake: FakeTorchServe, headers: dict[str, str]
) -> None:
    calls = len(fake.calls)
    for method, path in CHANGING:
        answer = client.request(method, path, headers=headers | {"content-type": "text/plain", TARGET: "sam"})
        assert answer.status_code == 403, (method, path)
        said = answer.json()
        assert said.keys() == {"Message"} if path.startswith("/endpoints") else said["error"]["code"] == "cross_site"
    assert len(fake.calls) == calls
    assert client.get("/ping", headers=headers).status_code == 200


@pytest.mark.parametrize("headers", OWN, ids=str)
def test_clients_that_are_no_page_and_pages_of_its_own_may(client: TestClient, headers: dict[str, str]) -> None:
    for method, path in CHANGING:
        assert client.request(method, path, headers=headers).status_code != 403, (method, path)


def test_no_page_is_let_read(client: TestClient) -> None:
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    for method, path in (("OPTIONS", "/predictions/sam"), ("OPTIONS", "/v1/segment"), ("GET", "/v1/models")):
        answer = client.request(method, path, headers=asked)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_every_reply_says_what_browsers_must_not_do(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.app.state.services.scheduler, "lease", _broken)
    answers = {
        200: client.get("/docs"),
        201: client.post("/v1/images", content=b"\xff\xd8\xff", headers={"content-type": "image/jpeg"}),
        204: client.options("/ping"),
        400: client.post("/models"),
        403: client.post("/models", headers={"origin": "null"}),
        404: client.get("/nowhere"),
        405: client.delete("/ping"),
        413: client.post("/models", content=bytes(SMALL_BODY + 1)),
        421: client.get("/ping", headers={"host": "evil.example"}),
        500: client.post("/predictions/sam"),
        501: client.post("/explanations/sam"),
    }
    files = client.get("/docs/files/swagger-ui.css"), client.get("/metrics"), client.get("/v1/models")
    for status, answer in [*answers.items(), *((200, answer) for answer in files)]:
        assert answer.status_code in (status, 400 if status == 201 else status)
        for name, value in HEADERS:
            assert answer.headers[name.decode()] == value.decode(), (status, name)
    # The page has a script of its own in it, which no policy may forbid.
    page = answers[200]
    assert re.search(r"<script>\s*const ui = SwaggerUIBundle", page.text)
    assert not re.search("script-src|default-src", page.headers["content-security-policy"])


def _broken(*_: Any, **__: Any) -> Any:
    raise OSError("odd")


def test_hosts_may_be_many_or_none() -> None:
    assert not Hosts([""]).knows("evil.example")
    assert Hosts(["a.example", " ", ".b.example"]).knows("a.example")


# TorchServe


def test_curl_sends_a_file_by_put(client: TestClient, fake: FakeTorchServe) -> None:
    for method, path in itertools.product(
        ("PUT", "POST"), ("/predictions/sam", "/predictions/sam/", "/predictions/team/own")
    ):
        assert client.request(method, path, content=b"body").status_code == 200
        assert fake.calls[-1].content == b"body"


@pytest.mark.parametrize(
    ("path", "archive"),
    [
        ("sam/1.0", "sam"), ("sam/1.0/", "sam"), ("lama/3.1", "lama"), ("team/own/1.0", "team--own"),
        ("two/1.0", "two"), ("two/2.0", "two--2.0"), ("sam.tar.gz/1.0", "sam"),
    ],
)  # fmt: skip
def test_a_version_may_follow_the_name(client: TestClient, fake: FakeTorchServe, path: str, archive: str) -> None:
    assert client.post(f"/predictions/{path}").status_code == 200
    assert fake.paths()[-1] == f"POST /predictions/p.{archive}"


@pytest.mark.parametrize("path", ["sam/2.0", "lama/1.0", "nobody/1.0", "sam/one", "sam/1.", "sam/1.0/1.0", "1.0"])
def test_a_version_that_there_is_not_is_404(client: TestClient, fake: FakeTorchServe, path: str) -> None:
    calls = len(fake.calls)
    answer = client.post(f"/predictions/{path}")
    assert (answer.status_code, answer.json()["error"]["field"]) == (404, "model")
    assert len(fake.calls) == calls
    if path == "lama/1.0":
        assert "3.1" in answer.json()["error"]["message"]


def test_the_api_describes_itself(client: TestClient) -> None:
    openapi = client.get("/openapi.json").json()
    for method, path in (("OPTIONS", "/"), ("GET", "/api-description"), ("OPTIONS", "/predictions/sam")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()) == (200, openapi)
    assert client.options("/predictions/nobody").status_code == 404


@pytest.mark.parametrize(
    "path", ["/ping", "/v1/models", "/models", "/openapi.json", "/docs", "/metrics", "/api-description"]
)
def test_whatever_can_be_got_has_a_head_and_a_slash_does_no_harm(client: TestClient, path: str) -> None:
    get = client.get(path)
    assert client.get(path + "/", follow_redirects=False).status_code == get.status_code == 200
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


@pytest.mark.parametrize(
    "path",
    [
        "/explanations/sam",
        "/explanations/sam/1.0",
        "/v1/models/sam:predict",
        "/v1/models/sam:explain",
        "/v2/models/sam/infer",
    ],
)
def test_what_is_not_served_says_what_is(client: TestClient, path: str) -> None:
    answer = client.post(path, json={"instances": []})
    assert (answer.status_code, answer.json()["error"]["code"]) == (501, "not_implemented")
    assert "/predictions/" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/models", "GET, HEAD, OPTIONS, POST"),
        ("/models/sam", "DELETE, GET, HEAD, OPTIONS"),
        ("/models/sam/invoke", "DELETE, GET, HEAD, OPTIONS, POST"),
        ("/predictions/sam", "OPTIONS, POST, PUT"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/sam/load", "GET, HEAD, OPTIONS, POST"),
        ("/v1/images", "OPTIONS, POST"),
        ("/v1/jobs/x", "DELETE, OPTIONS"),
        ("/endpoints/x/invocations", "OPTIONS, POST"),
        ("/ping", "GET, HEAD, OPTIONS"),
        ("/docs", "GET, HEAD, OPTIONS"),
        ("/docs/files/swagger-ui.css", "GET, HEAD, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_405_names_every_method_that_there_is(client: TestClient, path: str, allowed: str) -> None:
    answer = client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert client.options(path).headers["allow"] == allowed
    missing = {"DELETE", "GET", "HEAD", "POST", "PUT"} - set(allowed.split(", "))
    for method in missing:
        assert client.request(method, path).headers["allow"] == allowed
    for method in {"GET", "HEAD"} - missing:
        assert client.request(method, path).status_code != 405
    assert client.options("/nowhere").status_code == 404


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        (b"", {}, None),
        (b"", JSON, None),
        (b"{", JSON, None),
        (b"[" * 20_000, JSON, None),
        (b"\xff", JSON, None),
        (b'"sam"', JSON, None),
        (b"[]", JSON, None),
        (b"sam", {"content-type": "text/plain"}, None),
        (b"url=sam", {"content-type": "application/x-www-form-urlencoded"}, "model_name"),
        (b"{}", JSON, "model_name"),
        (b'{"model_name": "x"}', JSON, "url"),
        (b'{"model_name": 1, "url": "sam"}', JSON, "model_name"),
        (b'{"model_name": "..", "url": "sam"}', JSON, "model_name"),
        (b'{"model_name": "x", "url": null}', JSON, "url"),
        (b'{"model_name": "x", "url": "\\ud83d"}', JSON, "url"),
        (b'{"model_name": "\\ud83d", "url": "sam"}', JSON, "model_name"),
    ],
)
def test_a_load_that_cannot_be_read_is_told_what_to_send(
    client: TestClient, body: bytes, headers: dict[str, str], field: str | None
) -> None:
    answer = client.post("/models", content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error.get("field")) == (415 if body == b"sam" else 400, field)
    assert '"model_name"' in error["message"] or field == "url"


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_a_load_is_json_whatever_it_is_called_and_may_begin_with_a_byte_order_mark(
    client: TestClient, kind: str
) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        body = json.dumps({"model_name": encoding, "url": "sam"}).encode(encoding)
        assert client.post("/models", content=body, headers={"content-type": kind}).status_code == 200
        assert client.delete(f"/models/{encoding}").status_code == 200


# Try again

BUSY = {"error": {"code": "busy", "message": "a handler's own"}}


@pytest.mark.parametrize("status", [429, 503])
def test_every_busy_reply_says_when_to_try_again(client: TestClient, fake: FakeTorchServe, status: int) -> None:
    """A handler's own, too."""
    fake.replies["POST /predictions/p.sam"] = httpx.Response(status, json=BUSY)
    assert client.post("/predictions/sam").headers["retry-after"] == "5"
    fake.replies["GET /ping"] = refused()
    assert client.get("/ping").headers["retry-after"] == "5"


def test_the_gateways_own_busy_says_when(store: Path) -> None:
    with gateway(FakeTorchServe(), store, queue_total=1, queue_per_model=1) as client:
        client.app.state.services.scheduler.lease = _full
        for path, status in (("/predictions/sam", 429), ("/endpoints/x/invocations", 503)):
            answer = client.post(path, headers={TARGET: "sam"})
            assert (answer.status_code, answer.headers["retry-after"]) == (status, "17")


def _full(*_: Any, **__: Any) -> Any:
    from serve.errors import QueueFull

    raise QueueFull("full", retry_after=17)


# SageMaker's runtime

SERVICE = Path(botocore.__file__).parent / "data" / "sagemaker-runtime"
PATHS = {
    "InvokeEndpoint": "/endpoints/x/invocations",
    "InvokeEndpointWithResponseStream": "/endpoints/x/invocations-response-stream",
}
# What becomes of each parameter: it is honoured (tests/test_sagemaker.py), makes no difference where there is one
# instance and nothing is captured, or is refused.
HONOURED = {
    "EndpointName", "Body", "ContentType", "Accept", "CustomAttributes", "TargetModel", "TargetVariant",
    "InferenceComponentName",
}  # fmt: skip
INDIFFERENT = {"InferenceId", "PrefixAwareId"}
REFUSED = {"SessionId", "TargetContainerHostname", "EnableExplanations"}


def _operations() -> dict[str, dict[str, Any]]:
    """Name -> {parameter: (its header, its longest value)}, from AWS' own description of the API."""
    (file,) = SERVICE.glob("*/service-2.json*")
    model = json.loads(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
    shapes = model["shapes"]
    return {
        name: {
            parameter: (member.get("locationName"), shapes[member["shape"]].get("max"))
            for parameter, member in shapes[operation["input"]["shape"]]["members"].items()
        }
        for name, operation in model["operations"].items()
    }


@pytest.mark.parametrize("operation", PATHS)
def test_no_parameter_of_the_runtime_api_is_ignored(client: TestClient, operation: str) -> None:
    parameters = _operations()[operation]
    assert parameters.keys() <= HONOURED | INDIFFERENT | REFUSED
    own = {TARGET: "sam"}
    for name in (REFUSED | INDIFFERENT) & parameters.keys():
        header, longest = parameters[name]
        for value in ("a", "NEW_SESSION") if name == "SessionId" else ("a",):
            answer = client.post(PATHS[operation], headers=own | {header: value})
            if name in INDIFFERENT:
                assert answer.status_code == 200
                assert client.post(PATHS[operation], headers=own | {header: "a" * (longest + 1)}).status_code == 400
                continue
            assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (400, "ValidationError")
            assert name in answer.json()["Message"]
            assert "x-amzn-RequestId" in answer.headers


def test_boto3s_other_operations_are_told_what_there_is(client: TestClient) -> None:
    assert _operations().keys() == PATHS.keys() | {"InvokeEndpointAsync"}
    answer = client.post("/endpoints/x/async-invocations", headers={"X-Amzn-SageMaker-InputLocation": "s3://a/b"})
    assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (400, "ValidationError")
    assert "invoke_endpoint" in answer.json()["Message"]
    for method, path, status in (
        ("POST", "/endpoints/x/nothing", 404), ("GET", "/endpoints/x", 404), ("GET", "/endpoints/x/invocations", 405),
    ):  # fmt: skip
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["x-amzn-ErrorType"]) == (status, "UnknownOperationException")
        assert answer.json()["Message"]
        assert "x-amzn-RequestId" in answer.headers


@pytest.mark.parametrize(
    ("status", "side"), [(400, "client"), (413, "client"), (499, "client"), (500, "server"), (507, "server")]
)
def test_a_model_error_says_whose_it_is(client: TestClient, fake: FakeTorchServe, status: int, side: str) -> None:
    fake.replies["POST /predictions/p.sam"] = httpx.Response(status, json=BUSY)
    answer = client.post("/endpoints/x/invocations", headers={TARGET: "sam"})
    assert answer.json()["Message"].startswith(f"Received {side} error ({status}) from primary")
