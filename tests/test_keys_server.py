"""Keys at a real listener, as a hostile client and boto3 meet them, and the login form in a real Chromium."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import palimpsest
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from browsing import Tab, chromium
from conftest import encoded
from door import Reply, Server, closed, read, serving
from fakes import FakeTorchServe, make_store
from playwright.sync_api import Page

from serve.gateway.access import keys
from serve.gateway.access.keys import Scope


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("listener"), "sam", "lama", "sd") / ".state" / "keys.json"


@pytest.fixture(scope="module")
def fake() -> FakeTorchServe:
    return FakeTorchServe()


@pytest.fixture(scope="module")
def server(file: Path, fake: FakeTorchServe) -> Iterator[Server]:
    keys.add(file, "first", [Scope.EDIT], keep=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(keys, "LOOK_EVERY", 0)
        with serving(fake, file.parent.parent) as running:
            yield running


@pytest.fixture
def key(file: Path) -> Iterator[str]:
    yield keys.add(file, "k", [Scope.EDIT], keep=False)[0]
    keys.revoke(file, "k")


def ask(server: Server, target: str, *headers: str, method: str = "GET", version: str = "1.1") -> Reply:
    lines = [f"{method} {target} HTTP/{version}", "Host: localhost", *headers, "", ""]
    return server.send("\r\n".join(lines).encode("latin-1"), method=method)


SPELLINGS = [
    "//v1/models", "/v1//models", "/v1/%6dodels", "/v1/models/", "/%76%31/models", "/v1/models%2f", "/V1/models",
    "/ping/../v1/models", "/web/../v1/models", "/ping%2f..%2fv1/models", "/ping%0a", "/v1/models%0a", "/v1/models%00",
    "/v1/models;x", "/docs/../models", "/logout/../models", "/docs%2ffiles/../../models", "/docs/files/../../models",
    "/docs/files/%2e%2e/%2e%2e/models", "/.", "/./v1/models", "/%2e%2e/models", "/%2e/v1/models", "/models//",
    "/login/..;/v1/models", "/web/x/../../v1/models", "http://localhost/v1/models",
    "http://localhost//v1/models", "/v1/models#/ping", "/ping/v1/models", "/%252e%252e/models", "/metrics/../models",
]  # fmt: skip


def test_the_python_client_shows_its_key(server: Server, key: str) -> None:
    with palimpsest.Client(f"http://127.0.0.1:{server.port}", key=key) as client:
        assert {model.name for model in client.models()} >= {"sam", "lama", "sd"}
    with palimpsest.Client(f"http://127.0.0.1:{server.port}", key="") as client, pytest.raises(palimpsest.NotAllowed):
        client.models()


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_spelling_of_a_path_gets_around_the_key(server: Server, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = ask(server, path, method=method)
        assert answer.status in (400, 401, 404, 405), (method, answer)
        assert b'"sam"' not in answer.body


@pytest.mark.parametrize(
    "path",
    ["/models%0a", "/models//", "//models", "/v1/models/sam/pin%0a", "/v1/models/sam/pin//", "/v1//models/sam/pin"],
)
def test_no_spelling_of_a_path_gets_around_a_scope(server: Server, key: str, path: str) -> None:
    body = '{"model_name": "x", "url": "sam"}' if path.strip("/").startswith("models") else ""
    request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nx-api-key: {key}\r\nContent-Length: {len(body)}\r\n"
    answer = server.send(f"{request}Content-Type: application/json\r\n\r\n{body}".encode())
    assert answer.status in (403, 404), answer


def test_headers_that_two_readers_would_read_differently_are_no_key(server: Server, key: str) -> None:
    good = f"Authorization: Bearer {key}"
    assert ask(server, "/v1/models", good).status == 200
    assert ask(server, "/v1/models", f"AUTHORIZATION:bearer {key}").status == 200
    for headers in (
        [good, good], [good, "Authorization: Bearer x"], ["authorization:", good], [good, f"X-API-KEY: {key}"],
        [f"Authorization : Bearer {key}"], [f" Authorization: Bearer {key}"], ["Authorization: Bearer", f" {key}"],
        [f"Authorization: Bearer {key}\x00"], [f"Authorization: Bearer {key}\x0b"], [f"Authorizatioñ: Bearer {key}"],
        [f"Authorization:\tBasic\t{key}"], [f"X: y\rAuthorization: Bearer {key}"],
        [f"X: y\nAuthorization: Bearer {key}x"], ["Transfer-Encoding: chunked", "Content-Length: 5", good],
        [f"Cookie: palimpsest_session={key}"],
        [f"Authorization: Bearer {'x' * 33_000}"], [*(f"X-{n}: y" for n in range(101)), good],
    ):  # fmt: skip
        assert ask(server, "/v1/models", *headers).status in (400, 401, 431), headers


def test_a_request_behind_one_with_a_key_needs_its_own(server: Server, key: str) -> None:
    first = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nx-api-key: {key}\r\n\r\n"
    with server.connect() as line:
        line.sendall((first + "GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n" + first).encode())
        assert [read(line).status for _ in range(3)] == [200, 401, 200]
    trailers = "POST /predictions/sam HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTrailer: x-api-key\r\n\r\n"
    assert server.send(f"{trailers}1\r\nx\r\n0\r\nx-api-key: {key}\r\n\r\n".encode()).status == 401


def test_who_is_refused_gets_the_answer_without_sending_the_body(server: Server) -> None:
    for path, expectation in (("/predictions/sam", ""), ("/endpoints/x/invocations", "Expect: 100-continue\r\n")):
        with server.connect() as line:
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n{expectation}\r\n"
            line.sendall(head.encode())
            first = line.recv(12)
            assert first == b"HTTP/1.1 401"
            assert closed(line)


def test_ping_is_open_and_old_clients_are_asked_as_well(server: Server, key: str) -> None:
    assert ask(server, "/ping", "Authorization: Bearer wrong").status == 200
    assert ask(server, "/v1/models", version="1.0").status == 401
    assert ask(server, "/v1/models", f"x-api-key: {key}", version="1.0").status == 200
    assert ask(server, "/v1/models", method="HEAD").status == 401


@pytest.mark.slow
def test_boto3_is_a_client_like_any_other(server: Server, file: Path, fake: FakeTorchServe) -> None:
    def client(access_key_id: str, secret: str) -> Any:
        return boto3.client(
            "sagemaker-runtime",
            endpoint_url=f"http://127.0.0.1:{server.port}",
            region_name="local",
            aws_access_key_id=access_key_id,
            aws_secret_access_key=secret,
            config=Config(retries={"total_max_attempts": 1}, proxies={}),
        )

    secret, made = keys.add(file, "boto", [Scope.EDIT], keep=True)
    call: dict[str, Any] = {"EndpointName": "any", "TargetModel": "/sam.tar.gz", "CustomAttributes": "a=b  c; d"}
    runtime = client(str(made.access_key_id), secret)
    body = bytes(3_000_000)
    for payload in (body, io.BytesIO(body), b""):
        assert runtime.invoke_endpoint(**call, Body=payload)["Body"].read() == b"png"
    (events,) = runtime.invoke_endpoint_with_response_stream(
        EndpointName="any", InferenceComponentName="sam", Body=b"x"
    )["Body"]
    assert events["PayloadPart"]["Bytes"] == b"png"
    assert fake.calls[-1].content == b"x"
    for wrong in (client(str(made.access_key_id), secret + "x"), client("-", "-")):
        with pytest.raises(ClientError) as refused:
            wrong.invoke_endpoint(**call, Body=b"x")
        assert refused.value.response["Error"]["Code"] == "UnrecognizedClientException"
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 401
    keys.revoke(file, "boto")
    with pytest.raises(ClientError, match="UnrecognizedClientException"):
        runtime.invoke_endpoint(**call, Body=b"x")


# The page notices that it is logged out while a job runs. Returns whether it went before that had ended.
AMID_A_JOB = """async () => {
    const module = (name) => import(document.querySelector("script[src]").src.replace("app.js", name));
    const [state, storage] = [await module("state.js"), await module("storage.js")];
    const turn = () => new Promise(done => setTimeout(done));
    let went = false;
    navigation.addEventListener("navigate", () => went = true);
    state.job.value = {kind: "erase", phase: "running", model: "lama", step: 1, steps: 2, ahead: 0, stop() {}};
    const noticed = new Promise(done => state.loggedOut.subscribe(out => out && done()));
    document.dispatchEvent(new Event("visibilitychange"));  // else it looks in five seconds
    await noticed;
    await turn();
    await storage.keepNow();  // after that of one who leaves
    await turn();
    setTimeout(() => state.job.value = null);
    return went;
}"""


def log_in(page: Page, key: str) -> None:
    page.wait_for_url("**/login")
    page.get_by_label("Your key for this server").fill(key)
    page.get_by_role("button", name="Log in").click()


@pytest.mark.slow
def test_the_login_form_leads_back_to_the_edit(server: Server, file: Path) -> None:
    """A key ends amid the work: the form comes, and after it the edit stands there as it was left."""
    first, second = (keys.add(file, name, [Scope.EDIT], keep=False)[0] for name in ("one", "two"))
    with chromium() as browser:
        tab = Tab(browser, f"http://127.0.0.1:{server.port}/", viewport={"width": 390, "height": 780})
        page = tab.page
        log_in(page, "wrong")
        page.wait_for_selector("#problem:not(:empty)")
        assert "does not know this key" in page.locator("#problem").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        log_in(page, first)
        page.wait_for_selector(".corner")
        assert page.evaluate("document.cookie") == ""
        assert [(each["httpOnly"], each["sameSite"]) for each in tab.context.cookies()] == [(True, "Strict")]
        tab.open("square.png", encoded(np.full((40, 60, 3), 200, np.uint8)))
        page.get_by_role("textbox").fill("a hamster")
        keys.revoke(file, "one")
        assert page.evaluate(AMID_A_JOB) is False
        log_in(page, second)
        page.wait_for_selector(".tools")
        assert tab.steps == ["Opened"]
        assert page.get_by_role("textbox").input_value() == "a hamster"
        page.locator(".corner summary").click()
        tab.get("Log out").click()
        page.wait_for_url("**/login")
        assert tab.context.cookies() == []
        tab.forgive()
        assert tab.problems == []
        tab.context.close()
