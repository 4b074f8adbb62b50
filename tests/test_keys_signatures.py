"""AWS signatures: what botocore's own signer makes is accepted, and nothing that differs from it in any way."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from conftest import encoded
from fakes import FakeTorchServe, application, make_store
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from signing import signed

from serve.errors import Unauthenticated
from serve.gateway.access import guard, keys, sigv4
from serve.gateway.access.credentials import Contradictory
from serve.gateway.access.keys import Scope

HOST = "http://testserver"
INVOKE = "/endpoints/any/invocations"
TARGET = "X-Amzn-SageMaker-Target-Model"
SAM = {TARGET: "sam", "Content-Type": "text/plain"}


class Signer:
    """A client with a key, of a running server."""

    def __init__(self, http: TestClient, fake: FakeTorchServe, secret: str, access_key_id: str) -> None:
        self.http, self.fake, self.secret, self.id = http, fake, secret, access_key_id

    def sign(self, body: bytes = b"body", headers: dict[str, str] | None = None, **options: Any) -> dict[str, str]:
        own = SAM if headers is None else headers
        return signed("POST", HOST + INVOKE, self.id, self.secret, body, own, **options)

    def send(self, headers: dict[str, str], body: bytes = b"body", path: str = INVOKE, method: str = "POST") -> int:
        status = self.http.request(method, HOST + path, content=body, headers=headers).status_code
        assert self.bodies_used() == 0
        return int(status)

    def bodies_used(self) -> int:
        return int(self.http.app.state.services.bodies.used)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("signatures"), "sam", "lama")


@pytest.fixture(scope="module")
def signer(store: Path) -> Iterator[Signer]:
    secret, key = keys.add(store / ".state" / "keys.json", "boto", [Scope.EDIT], keep=True)
    fake = FakeTorchServe()
    with TestClient(application(fake, store, max_request_mib=8), HOST) as client:
        yield Signer(client, fake, secret, str(key.access_key_id))


def test_what_is_signed_reaches_the_model_whole(signer: Signer) -> None:
    body = bytes(range(256)) * 8_000  # 2 MB
    assert signer.send(signer.sign(body), body) == 200
    assert signer.fake.calls[-1].content == body
    assert signer.send(signer.sign(b""), b"") == 200


def test_a_large_body_is_hashed_beside_the_event_loop(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    class Hashes:
        @staticmethod
        def sha256(content: Any) -> Any:
            hashed.append((threading.current_thread().name, len(content)))
            return hashlib.sha256(content)

    monkeypatch.setattr(guard, "hashlib", Hashes)
    body = bytes(4_000_000)
    assert signer.send(signer.sign(body), body) == 200
    ((thread, size),) = hashed
    assert size == len(body)
    assert thread.startswith("asyncio_")  # of the pool, which the loop's own is not in


_TEXT = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), max_size=12)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None)
@given(
    body=st.binary(max_size=200),
    pairs=st.lists(st.tuples(_TEXT, _TEXT), max_size=4),
    attributes=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=40),
    name=st.text(
        st.characters(codec="utf-8", categories=["L", "N", "P", "S"], exclude_characters="/\\.?#"), min_size=1
    ),
)
def test_whatever_botocore_signs_is_understood(
    signer: Signer, body: bytes, pairs: list[tuple[str, str]], attributes: str, name: str
) -> None:
    """Spaces, repeated and empty parameters, reserved and other characters in paths, queries and headers."""
    query = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in pairs)
    path = f"/endpoints/{quote(name, safe='')}/invocations"
    url = str(signer.http.build_request("POST", f"{HOST}{path}?{query}" if query else HOST + path).url)
    headers = SAM | {"X-Amzn-SageMaker-Custom-Attributes": attributes.strip() or "x"}
    own = signed("POST", url, signer.id, signer.secret, body, headers)
    assert signer.http.post(url, content=body, headers=own).status_code in (200, 400)  # 400: no name of an endpoint
    foreign = signed("POST", url, signer.id, signer.secret + "x", body, headers)
    assert signer.http.post(url, content=body, headers=foreign).status_code == 401


@pytest.mark.parametrize("late", [0, 290, -290])
def test_a_clock_may_be_five_minutes_wrong(signer: Signer, late: float) -> None:
    assert signer.send(signer.sign(late=late)) == 200


@pytest.mark.parametrize("late", [310, -310, 86_400, -86_400, 10**9])
def test_and_no_more_so_that_a_copy_is_soon_worth_nothing(signer: Signer, late: float) -> None:
    headers = signer.sign(late=late)
    assert signer.send(headers) == 401


def test_within_these_a_copy_is_answered_again_but_nothing_else(signer: Signer) -> None:
    headers = signer.sign()
    assert [signer.send(headers), signer.send(headers)] == [200, 200]
    assert signer.send(headers, b"Body") == 401
    assert signer.send(headers, b"") == 401
    assert signer.send(headers, path=INVOKE + "?x=1") == 401
    assert signer.send(headers, path="/endpoints/other/invocations") == 401
    assert signer.send(headers, path="/predictions/sam") == 401
    assert signer.send(headers, path="/endpoints/any/invocation%73") == 401
    assert signer.send(headers, path="/endpoints/any//invocations") == 401
    assert signer.send(headers, path=INVOKE + "/") == 401
    assert signer.send(headers, method="PUT") == 401
    assert signer.send(headers | {TARGET: "other"}) == 401
    assert signer.send(headers | {"host": "localhost"}) == 401
    assert signer.send(headers | {"X-Amzn-SageMaker-Inference-Id": "added"}) == 401
    assert signer.send(headers | {"X-Amz-Security-Token": "added"}) == 401
    assert signer.send({name: value for name, value in headers.items() if name != "Content-Type"}) == 401
    assert signer.send(headers | {"User-Agent": "any", "Accept": "image/png"}) == 200  # proxies change these


def changed(headers: dict[str, str], old: str, new: str) -> dict[str, str]:
    assert old in headers["Authorization"]
    return headers | {"Authorization": headers["Authorization"].replace(old, new)}


def test_no_part_of_the_header_may_be_changed_or_left_out(signer: Signer) -> None:
    headers = signer.sign()
    value = headers["Authorization"]
    signature = value.rpartition("=")[2]
    broken = [
        changed(headers, signature, signature[:-1]),
        changed(headers, signature, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        changed(headers, signature, signature.upper()),
        changed(headers, signature, ""),
        changed(headers, signature, signature + "0"),
        changed(headers, "us-east-1", "us-east-2"),
        changed(headers, "/sagemaker/", "/s3/"),
        changed(headers, "/aws4_request", "/aws5_request"),
        changed(headers, "AWS4-HMAC-SHA256", "AWS4-HMAC-SHA512"),
        changed(headers, "host;", ""),
        changed(headers, "host;", "host;host;"),
        changed(headers, "content-type;host", "host;content-type"),
        changed(headers, "SignedHeaders=", "SignedHeaders=;"),
        changed(headers, "content-type;", ""),
        changed(headers, ";x-amz-date", ""),
        changed(headers, "x-amz-date", "x-amz-date;x-nothing"),
        changed(headers, signer.id, "PK" + "A" * 18),
        changed(headers, signer.id, signer.id.lower()),
        changed(headers, signer.id, ""),
        headers | {"Authorization": value + ", Signature=" + signature},
        headers | {"Authorization": value.replace(", ", " ")},
        headers | {"Authorization": f"Bearer {signature}"},
        headers | {"X-Amz-Date": headers["X-Amz-Date"][:-1]},
        headers | {"X-Amz-Date": headers["X-Amz-Date"].replace("T", "T9")[:16]},
        headers | {"X-Amz-Date": "20269999T999999Z"},
        {name: each for name, each in headers.items() if name != "X-Amz-Date"},
        {name: each for name, each in headers.items() if name != "Authorization"},
    ]
    assert [signer.send(each) for each in broken] == [401] * len(broken)
    assert signer.send(headers | {"Authorization": value.replace(", ", ",")}) == 200


@pytest.mark.parametrize("name", ["X-Amz-Date", "X-Amz-Content-SHA256", TARGET, "Content-Type"])
def test_a_header_that_is_sent_twice_is_not_the_one_that_was_signed(signer: Signer, name: str) -> None:
    headers = signer.sign(headers=SAM | {"X-Amz-Content-SHA256": hashlib.sha256(b"body").hexdigest()})
    assert signer.send(headers) == 200
    for twice in ([(name, headers[name])], [(name, "other")]):
        assert signer.http.post(HOST + INVOKE, content=b"body", headers=[*headers.items(), *twice]).status_code == 401


_BYTES = st.binary(max_size=60) | st.text("AWS4-HMAC256Credential=/,;Signature0f x\u00e4\u0660", max_size=200).map(
    lambda text: text.encode("utf-8")
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, database=None)
@given(
    values=st.lists(
        st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"cookie", b"x-amz-date", b"host"]), _BYTES),
        max_size=5,
    ),
    cut=st.integers(0, 300),
    junk=_BYTES,
    at=st.integers(0, 300),
)
def test_no_header_is_an_error_of_the_servers(
    signer: Signer, values: list[tuple[bytes, bytes]], cut: int, junk: bytes, at: int
) -> None:
    """Anything at all, and a good signature with something cut off or put in."""
    good = {name.lower().encode(): value.encode() for name, value in signer.sign().items()}
    authorization = good[b"authorization"]
    broken = [authorization[:cut], authorization[:at] + junk + authorization[at:]]
    asked = [values, *([*(good | {b"authorization": each}).items()] for each in broken if each != authorization)]
    for headers in asked:
        scope = {
            "type": "http", "method": "POST", "path": INVOKE, "raw_path": INVOKE.encode(), "query_string": junk,
            "headers": headers,
        }  # fmt: skip
        with suppress(Unauthenticated, Contradictory):
            unproven = signer.http.app.state.services.guard.admit(scope, dict(scope))  # type: ignore[attr-defined]
            # It still reads as a signature: of another region, say, or with one more space.
            assert unproven.claim.holds(signer.secret, sigv4.UNSIGNED) is False


def test_a_hash_that_is_declared_is_checked(signer: Signer) -> None:
    declared = SAM | {"X-Amz-Content-SHA256": hashlib.sha256(b"body").hexdigest()}
    assert signer.send(signer.sign(headers=declared)) == 200
    assert signer.send(signer.sign(headers=declared), b"Body") == 401
    assert signer.send(signer.sign(headers=declared) | {"X-Amz-Content-SHA256": sigv4.UNSIGNED}) == 401
    for odd in ("STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "", "x", "0" * 63):
        assert signer.send(signer.sign(headers=SAM | {"X-Amz-Content-SHA256": odd})) == 401
    added = signer.sign() | {"X-Amz-Content-SHA256": hashlib.sha256(b"body").hexdigest()}
    assert signer.send(added) == 401


def test_a_body_may_be_left_unsigned_where_the_client_signs_that_it_is(signer: Signer) -> None:
    unsigned = signer.sign(headers=SAM | {"X-Amz-Content-SHA256": sigv4.UNSIGNED})
    assert signer.send(unsigned) == 200
    assert signer.send(unsigned, b"other") == 200
    assert signer.send(unsigned, path="/endpoints/other/invocations") == 401


def test_no_body_is_read_of_whom_nobody_knows(signer: Signer) -> None:
    read = []

    def body() -> Iterator[bytes]:
        read.append(True)
        yield b"body"

    stranger = signed("POST", HOST + INVOKE, "PK" + "A" * 18, "secret", b"body", SAM)
    declared = {"X-Amz-Content-SHA256": hashlib.sha256(b"body").hexdigest()}
    wrong = signed("POST", HOST + INVOKE, signer.id, "wrong", b"body", SAM | declared)
    for headers in (stranger, wrong, signer.sign(late=1000)):
        assert signer.http.post(HOST + INVOKE, content=body(), headers=headers).status_code == 401
    assert read == []


def test_routes_that_take_no_picture_are_signed_for_as_well(signer: Signer, store: Path) -> None:
    secret, key = keys.add(store / ".state" / "keys.json", "operator", [Scope.OPERATE], keep=True)
    body = b'{"model_name": "x", "url": "sam"}'
    kind = {"Content-Type": "application/json"}
    headers = signed("POST", HOST + "/models", str(key.access_key_id), secret, body, kind)
    signer.http.app.state.services.guard._keys._due = 0  # type: ignore[attr-defined]
    assert signer.send(headers, body.replace(b"x", b"y"), "/models") == 401
    assert signer.send(headers, body, "/models") == 200
    pin = signed("POST", HOST + "/v1/models/sam/pin", str(key.access_key_id), secret)
    assert signer.send(pin, b"", "/v1/models/sam/pin") == 200
    head = signed("HEAD", HOST + "/v1/models", str(key.access_key_id), secret)
    assert signer.send(head, b"", "/v1/models", "HEAD") == 200
    assert signer.send(head, b"", "/v1/models", "GET") == 401
    assert signer.send(signed("POST", HOST + INVOKE, str(key.access_key_id), secret, b"body", SAM)) == 403


def test_calls_that_are_watched_until_the_client_leaves_are_signed_for_as_well(signer: Signer) -> None:
    picture = encoded(np.full((8, 8, 3), 200, np.uint8))
    kind = {"Content-Type": "image/png"}
    upload = signed("POST", HOST + "/v1/images", signer.id, signer.secret, picture, kind)
    answer = signer.http.post("/v1/images", content=picture, headers=upload)
    assert answer.status_code == 201
    fields = json.dumps({"image": answer.json()["id"], "mask": answer.json()["id"]}).encode()
    kind = {"Content-Type": "application/json"}
    erase = signed("POST", HOST + "/v1/erase", signer.id, signer.secret, fields, kind)
    assert signer.http.post("/v1/erase", content=fields, headers=erase).content == b"png"


def test_a_key_that_was_not_made_for_it_signs_nothing(signer: Signer, store: Path) -> None:
    secret, key = keys.add(store / ".state" / "keys.json", "plain", [Scope.EDIT], keep=False)
    signer.http.app.state.services.guard._keys._due = 0  # type: ignore[attr-defined]
    assert key.access_key_id is None
    for name in ("plain", key.sha256[:20].upper(), "None"):
        assert signer.send(signed("POST", HOST + INVOKE, name, secret, b"body", SAM)) == 401


def test_a_body_that_is_too_large_is_refused_as_ever(signer: Signer) -> None:
    body = bytes(9 << 20)
    assert signer.send(signer.sign(body), body) in (400, 413)  # SageMaker's own code for it
    small = bytes(100_000)
    headers = signed("POST", HOST + "/v1/models/sam/pin", signer.id, signer.secret, small)
    assert signer.send(headers, small, "/v1/models/sam/pin") == 413
