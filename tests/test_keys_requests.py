"""Who may do what: keys, scopes and sessions over HTTP, in front of a TorchServe that is a function."""

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from fakes import FakeTorchServe, application, make_store
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from signing import signed
from starlette.routing import Match, Mount

from serve.gateway.access import credentials, keys, scopes, sessions
from serve.gateway.access.keys import Scope

EDIT, OPERATE = Scope.EDIT, Scope.OPERATE
TARGET = "X-Amzn-SageMaker-Target-Model"
HOST = "http://testserver"
# What is needed -> method and path as the router has them. open: nothing; any: a key; metrics: as is set.
ROUTES = {
    "open": [
        ("GET", "/"), ("OPTIONS", "/"), ("GET", "/web/{version}/{name:path}"), ("GET", "/docs"), ("GET", "/docs/files"),
        ("GET", "/openapi.json"), ("GET", "/api-description"), ("GET", "/ping"), ("GET", "/login"), ("POST", "/login"),
        ("POST", "/logout"),
    ],
    "metrics": [("GET", "/metrics")],
    "any": [("GET", "/v1/models"), ("GET", "/v1/models/{name:path}"), ("GET", "/v1/state")],
    "edit": [
        ("POST", "/predictions/{model:path}"), ("PUT", "/predictions/{model:path}"),
        ("OPTIONS", "/predictions/{model:path}"), ("POST", "/explanations/{model:path}"),
        ("POST", "/v2/models/{model:path}/{verb}"), ("POST", "/v1/images"), ("GET", "/v1/images/{image}"),
        ("POST", "/v1/images/edits"), ("POST", "/v1/segment"), ("POST", "/v1/erase"), ("POST", "/v1/replace"),
        ("DELETE", "/v1/jobs/{job}"), ("POST", "/endpoints/{name}/invocations"),
        ("POST", "/endpoints/{name}/invocations-response-stream"), ("POST", "/endpoints/{name}/async-invocations"),
    ],
    "operate": [
        ("POST", "/v1/models/{name:path}/load"), ("POST", "/v1/models/{name:path}/unload"),
        ("POST", "/v1/models/{name:path}/pin"), ("POST", "/v1/models/{name:path}/unpin"),
        ("POST", "/v1/models/{name:path}/warm"), ("POST", "/v1/models/{model:path}:{verb}"), ("POST", "/models"),
        ("GET", "/models"), ("GET", "/models/{name:path}"), ("DELETE", "/models/{name:path}"),
        ("POST", "/models/{name:path}/invoke"),
    ],
}  # fmt: skip
NEEDED = {
    "open": scopes.OPEN,
    "metrics": scopes.OPERATE,
    "any": scopes.ANY,
    "edit": scopes.EDIT,
    "operate": scopes.OPERATE,
}
BY_ROUTE = {route: NEEDED[kind] for kind, routes in ROUTES.items() for route in routes}


class Studio(NamedTuple):
    """A running server, and the file of its keys."""

    http: TestClient
    fake: FakeTorchServe
    file: Path

    def add(self, name: str, *allowed: Scope) -> tuple[str, str]:
        """Returns the key, and the id by which AWS clients call it."""
        text, key = keys.add(self.file, name, allowed or (EDIT,), keep=True)
        return text, str(key.access_key_id)

    def bearer(self, name: str, *allowed: Scope) -> dict[str, str]:
        return {"authorization": f"Bearer {self.add(name, *allowed)[0]}"}

    def session(self, key: str) -> dict[str, str]:
        answer = self.http.post("/login", json={"key": key})
        assert answer.status_code == 204
        self.http.cookies.clear()
        return {"cookie": answer.headers["set-cookie"].partition(";")[0]}


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.setattr(keys, "LOOK_EVERY", 0)
    fake = FakeTorchServe()
    file = make_store(tmp_path, "sam") / ".state" / "keys.json"
    app = application(fake, tmp_path, max_request_mib=1)
    with TestClient(app, HOST, raise_server_exceptions=False) as client:
        studio = Studio(client, fake, file)
        studio.add("first")
        yield studio


def test_without_keys_nothing_is_asked_for(tmp_path: Path) -> None:
    app = application(FakeTorchServe(), make_store(tmp_path, "sam"))
    with TestClient(app, HOST) as client:
        for headers in ({}, {"authorization": "Bearer x"}, {"x-api-key": "x", "authorization": "AWS4-HMAC-SHA256 x"}):
            assert client.post("/predictions/sam", headers=headers).status_code == 200
            assert client.post("/v1/models/sam/pin", headers=headers).status_code == 200
        answer = client.post("/login", json={"key": "x"})
        assert (answer.status_code, answer.headers.get("set-cookie")) == (204, None)


@pytest.mark.parametrize("path", ["/%0a", "/login%0a", "/ping%0a", "/docs%0a"])
def test_a_path_that_is_nearly_one_of_the_open_ones_is_no_error_of_the_servers(tmp_path: Path, path: str) -> None:
    with TestClient(application(FakeTorchServe(), make_store(tmp_path, "sam")), HOST) as client:
        assert client.get(path).status_code < 500


def test_off_means_that_keys_are_not_asked_for(tmp_path: Path) -> None:
    store = make_store(tmp_path, "sam")
    keys.add(store / ".state" / "keys.json", "a", (EDIT,), keep=False)
    with TestClient(application(FakeTorchServe(), store, keys="off"), HOST) as client:
        assert client.post("/predictions/sam").status_code == 200


# Each route has its scope


def _routes(app: FastAPI) -> Iterator[tuple[Any, str, str]]:
    """The router's own, in its order: what matches, and method and path."""
    for each in iter_route_contexts(app.router.routes):
        methods = {"GET"} if isinstance(each.route, Mount) else set(each.methods or ()) - {"HEAD"}
        for method in sorted(methods):
            yield each, method, str(each.path)


def test_every_route_has_the_scope_that_it_is_to_have(tmp_path: Path) -> None:
    """A new one is to be added here and in serve/gateway/access/scopes.py."""
    app = application(FakeTorchServe(), tmp_path)
    assert {(method, path) for _, method, path in _routes(app)} == set(BY_ROUTE)
    for (method, path), needed in BY_ROUTE.items():
        example = re.sub(r"{\w+(:path)?}", "x", path)
        assert scopes.needed(method, example, scopes.OPERATE) == needed, (method, path)


_PIECES = st.sampled_from(
    ["/", "//", "v1", "v2", "models", "images", "edits", "segment", "predictions", "endpoints", "x", "sam", "invoke",
     "invocations", "pin", "load", ":", ".", "..", "\n", "\t", "\0", "%2e", "ä", "ping", "metrics", "web", "docs",
     "files", "login", "openapi.json", "jobs", ";", "?", "#", "\\", "V1", "explanations", " "]
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=500, deadline=None, database=None)
@given(
    path=st.lists(_PIECES, max_size=9).map(lambda pieces: ("/" + "".join(pieces)).rstrip("/") or "/"),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"]),
)
def test_no_path_reaches_a_route_by_less_than_its_scope(path: str, method: str) -> None:
    scope = {"type": "http", "path": path, "method": method, "root_path": "", "headers": []}
    for route, own, template in ALL_ROUTES:
        if method == own and route.matches(scope)[0] is Match.FULL:
            allowed = scopes.needed(method, path, scopes.OPERATE)
            expected = BY_ROUTE[method, template]
            # Where no rule fits, any key is enough: such a path may lead to nothing.
            assert (scopes.ANY if allowed is None else allowed) == expected or expected == scopes.OPEN, template
            return


ALL_ROUTES = list(_routes(application(FakeTorchServe(), Path("nowhere"))))


# Credential, scope, route, state of the key


REQUESTS = {
    "open": ("GET", "/ping"),
    "any": ("GET", "/v1/models"),
    "edit": ("POST", "/predictions/sam"),
    "operate": ("POST", "/v1/models/sam/pin"),
    "metrics": ("GET", "/metrics"),
    "nowhere": ("GET", "/nowhere"),
}
KINDS = ("bearer", "x-api-key", "signature", "session", "none")
STATES = ("valid", "revoked", "unknown", "malformed")


@pytest.mark.slow
def test_who_may_do_what(studio: Studio) -> None:
    """Every combination; the answer to a key that is not valid never says why."""
    refusals = set()
    allowances = [(EDIT,), (OPERATE,), (EDIT, OPERATE)]
    for number, (kind, state, allowed) in enumerate(itertools.product(KINDS, STATES, allowances)):
        name = f"k{number}"
        text, access_key_id = studio.add(name, *allowed)
        session = studio.session(text)
        if state == "revoked":
            keys.revoke(studio.file, name)
        if state == "unknown":
            text, access_key_id = "pk_" + "x" * 43, "PK" + "A" * 18
            session = {"cookie": f"{credentials.COOKIE}={'x' * 43}"}
        for route, (method, path) in REQUESTS.items():
            shown: dict[str, dict[str, str]] = {
                "bearer": {"authorization": f"Bearer {text}"},
                "x-api-key": {"x-api-key": text},
                "signature": signed(method, HOST + path, access_key_id, text),
                "session": session,
                "none": {},
            }
            headers = shown[kind]
            if state == "malformed":
                headers = {header: value[:-1] for header, value in headers.items()}
            answer = studio.http.request(method, path, headers=headers)
            told = (kind, state, allowed, route, answer.status_code)
            if route in ("open", "metrics"):
                assert answer.status_code == 200, told
            elif kind == "none" or state != "valid":
                assert answer.status_code == 401, told
                refusals.add((answer.text, answer.headers["www-authenticate"]))
            elif route == "nowhere":
                assert answer.status_code == 404, told
            elif route == "any" or route in allowed:
                assert answer.status_code == 200, told
            else:
                assert answer.status_code == 403, told
                assert answer.json()["error"]["message"].startswith(f"this needs a key with the scope {route}")
        if state != "revoked":
            keys.revoke(studio.file, name)
    assert len(refusals) == 1


def test_metrics_ask_for_a_key_where_that_is_set(tmp_path: Path) -> None:
    store = make_store(tmp_path, "sam")
    file = store / ".state" / "keys.json"
    edit, operate = (keys.add(file, scope, (scope,), keep=False)[0] for scope in (EDIT, OPERATE))
    with TestClient(application(FakeTorchServe(), store, metrics="operate"), HOST) as client:
        statuses = [client.get("/metrics", headers={"x-api-key": each}).status_code for each in ("", edit, operate)]
    assert statuses == [401, 403, 200]


def test_a_key_that_is_made_now_is_asked_for_from_now_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOOK_EVERY", 0)
    store = make_store(tmp_path, "sam")
    with TestClient(application(FakeTorchServe(), store), HOST) as client:
        assert client.post("/predictions/sam").status_code == 200
        text, _ = keys.add(store / ".state" / "keys.json", "a", (EDIT,), keep=False)
        assert client.post("/predictions/sam").status_code == 401
        assert client.post("/predictions/sam", headers={"x-api-key": text}).status_code == 200


# The answers


def test_each_api_refuses_in_its_own_shape(studio: Studio) -> None:
    operate = studio.bearer("ops", OPERATE)
    for headers, status, code in (({}, 401, "unauthorized"), (operate, 403, "forbidden")):
        ours = studio.http.post("/v1/erase", headers=headers)
        assert (ours.status_code, ours.json()["error"]["code"]) == (status, code)
        openai = studio.http.post("/v1/images/edits", headers=headers)
        assert openai.status_code == status
        assert openai.json()["error"] | {"message": ""} == {
            "message": "", "type": "invalid_request_error", "param": None, "code": code,
        }  # fmt: skip
        sagemaker = studio.http.post("/endpoints/x/invocations", headers=headers | {TARGET: "sam"})
        assert sagemaker.status_code == status
        assert sagemaker.json().keys() == {"Message"}
        kind = {401: "UnrecognizedClientException", 403: "AccessDeniedException"}[status]
        assert sagemaker.headers["x-amzn-errortype"] == kind
        for answer in (ours, openai, sagemaker):
            assert ("www-authenticate" in answer.headers) == (status == 401)
    assert not any(call.url.path.startswith("/predictions") for call in studio.fake.calls)


def test_a_refusal_comes_before_the_body_and_before_its_size_is_looked_at(studio: Studio) -> None:
    def body() -> Iterator[bytes]:
        read.append(True)
        yield b"x"

    for path in ("/predictions/sam", "/v1/models/sam/pin", "/endpoints/x/invocations"):
        for headers in ({}, {"content-length": str(2**30)}, {"authorization": "Bearer x"}):
            read: list[bool] = []
            assert studio.http.post(path, content=body(), headers=headers).status_code == 401
    assert studio.http.app.state.services.bodies.used == 0  # type: ignore[attr-defined]


def test_hosts_and_origins_are_looked_at_with_keys_as_without(studio: Studio) -> None:
    key = studio.bearer("k", EDIT, OPERATE)
    assert studio.http.get("/v1/models", headers=key | {"host": "evil.example"}).status_code == 421
    for headers in (
        {"origin": "http://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        for path in ("/predictions/sam", "/v1/models/sam/pin", "/login", "/logout"):
            answer = studio.http.post(path, headers=key | headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
    preflight = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = studio.http.options("/v1/erase", headers=preflight)
    assert answer.status_code == 401
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_document_says_how_keys_are_sent(studio: Studio) -> None:
    document = studio.http.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "apiKey", "session", "awsSigV4"}
    assert [*document["security"]] == [{"bearer": []}, {"apiKey": []}, {"session": []}, {"awsSigV4": []}, {}]
    assert document["paths"]["/ping"]["get"]["security"] == []
    erase = document["paths"]["/v1/erase"]["post"]
    assert "security" not in erase
    assert {"401", "403"} <= erase["responses"].keys()


# A hostile client


def test_more_than_one_key_is_none(studio: Studio) -> None:
    text, _ = studio.add("k")
    bearer = ("authorization", f"Bearer {text}")
    for pair in (
        [bearer, bearer], [bearer, ("x-api-key", text)], [("x-api-key", text), ("x-api-key", "y")],
        [bearer, ("authorization", "Basic eDp5")], [("authorization", "Bearer "), bearer],
        [("x-api-key", ""), bearer],
    ):  # fmt: skip
        answer = studio.http.post("/predictions/sam", headers=pair)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "contradictory_keys")
    sagemaker = studio.http.post("/endpoints/x/invocations", headers=[bearer, bearer])
    assert (sagemaker.status_code, sagemaker.headers["x-amzn-errortype"]) == (400, "ValidationError")


def test_a_key_counts_before_a_session_and_two_sessions_are_none(studio: Studio) -> None:
    text, _ = studio.add("k")
    session = studio.session(text)
    wrong = studio.http.get("/v1/models", headers=session | {"x-api-key": "wrong"})
    assert wrong.status_code == 401
    twice = session["cookie"] + "; " + session["cookie"]
    assert studio.http.get("/v1/models", headers={"cookie": twice}).status_code == 401
    with_others = "a=b; " + session["cookie"] + "; palimpsest_session_=x"
    assert studio.http.get("/v1/models", headers={"cookie": with_others}).status_code == 200


ODD: list[Callable[[str], dict[str, str | bytes]]] = [
    lambda key: {"authorization": key},
    lambda key: {"authorization": f"Basic {key}"},
    lambda key: {"authorization": f"Bearer:{key}"},
    lambda key: {"authorization": f"Bearer{key}"},
    lambda key: {"authorization": f"Bearer {key},{key}"},
    lambda key: {"authorization": f"Bearer {key.upper()}"},
    lambda key: {"authorization": f"Bearer {key[:-1]}"},
    lambda key: {"authorization": f"Bearer {key}x"},
    lambda key: {"authorization": f"Bearer {key} x"},
    lambda key: {"authorization": f"Bearer {key}".encode() + b"\xc3\xa4"},
    lambda key: {"authorization": f"Bearer {key}".encode() + b"\xa0"},
    lambda key: {"authorization": b"\xff" * 30_000},
    lambda key: {"authorization": "Bearer " + "x" * 30_000},
    lambda key: {"authorization": "AWS4-HMAC-SHA256 " + "x" * 30_000},
    lambda key: {"authorization": "AWS4-HMAC-SHA256"},
    lambda key: {"x_api_key": key},
    lambda key: {"x-api-key": f"Bearer {key}"},
    lambda key: {"proxy-authorization": f"Bearer {key}"},
    lambda key: {"cookie": f"palimpsest_session={key}"},
    lambda key: {"cookie": ";" * 30_000},
    lambda key: {"cookie": "palimpsest_session"},
    lambda key: {"cookie": b"palimpsest_session=\xff\xfe"},
]


@pytest.mark.slow
@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_is_no_key(studio: Studio, odd: Callable[[str], dict[str, Any]]) -> None:
    text, _ = studio.add("k")
    assert studio.http.get("/v1/models", headers=odd(text)).status_code == 401


def test_the_schemes_name_has_no_case_and_spaces_around_a_key_are_none(studio: Studio) -> None:
    text, _ = studio.add("k")
    for value in (f"bearer {text}", f"BEARER  {text}", f" Bearer {text} "):
        assert studio.http.get("/v1/models", headers={"authorization": value}).status_code == 200


# Sessions


def test_logging_in_gives_a_cookie_that_no_script_and_no_other_site_has(studio: Studio) -> None:
    text, _ = studio.add("k")
    cookie = studio.http.post("/login", json={"key": f" {text}\n"}).headers["set-cookie"]
    name, *attributes = cookie.split("; ")
    assert {each.lower() for each in attributes} == {"httponly", "max-age=43200", "path=/", "samesite=strict"}
    assert text not in cookie
    assert len(name.partition("=")[2]) == 43
    with TestClient(studio.http.app, "https://testserver") as secure:
        assert "; Secure" in secure.post("/login", json={"key": text}).headers["set-cookie"]


@pytest.mark.parametrize("key", ["wrong", "", "x" * 512, "x" * 5000, "ä", "\ud800", "\0"])
def test_a_wrong_key_logs_nobody_in(studio: Studio, key: str) -> None:
    answer = studio.http.post("/login", content=json.dumps({"key": key}), headers={"content-type": "application/json"})
    assert answer.status_code in (400, 401)
    assert "set-cookie" not in answer.headers
    assert len(studio.http.app.state.services.guard._sessions) == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"key": 1}', b'{"key": "marker", "x": 1}', b'{"Key": "marker"}'])
def test_a_login_that_is_none_is_not_quoted(studio: Studio, body: bytes) -> None:
    answer = studio.http.post("/login", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "marker" not in answer.text
    assert studio.http.post("/login", content=bytes(2**20)).status_code in (400, 413)


def test_a_session_ends_by_itself_by_logging_out_and_with_its_key(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(session: dict[str, str]) -> int:
        return int(studio.http.get("/v1/models", headers=session).status_code)

    text, _ = studio.add("k")
    first, second, third = (studio.session(text) for _ in range(3))
    assert [status(each) for each in (first, second, third)] == [200, 200, 200]
    answer = studio.http.post("/logout", headers=first)
    assert 'palimpsest_session=""; ' in answer.headers["set-cookie"]
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert [status(each) for each in (first, second, third)] == [401, 200, 200]
    later = time.monotonic() + sessions.SECONDS + 1
    with monkeypatch.context() as patched:
        patched.setattr(sessions, "time", SimpleNamespace(monotonic=lambda: later))
        assert status(second) == 401
    keys.revoke(studio.file, "k")
    studio.add("k")  # another, of the same name
    assert status(third) == 401


def test_of_many_sessions_of_a_key_the_oldest_ends_and_nobody_elses(studio: Studio) -> None:
    own, other = studio.add("own")[0], studio.add("other")[0]
    others = studio.session(other)
    first = studio.session(own)
    for _ in range(sessions.MOST):
        last = studio.session(own)
    answers = [studio.http.get("/v1/models", headers=each).status_code for each in (others, first, last)]
    assert answers == [200, 401, 200]
    assert len(studio.http.app.state.services.guard._sessions) == sessions.MOST + 1  # type: ignore[attr-defined]
