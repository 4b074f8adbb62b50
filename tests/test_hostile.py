"""Clients that mean harm, at the running server with keys: what they send is refused or served, and breaks nothing."""

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

import door
import pytest
from door import Server, closed, post, read
from fakes import FakeTorchServe, make_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.gateway import body as bodies
from serve.gateway.access import keys
from serve.gateway.access.keys import Scope

PAGE = b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Studio(NamedTuple):
    server: Server
    key: str
    operator: str


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    store = make_store(tmp_path_factory.mktemp("store"), "sam", "lama", ours=False)
    file = store / ".state" / "keys.json"
    key, operator = (
        keys.add(file, name, [scope], keep=True)[0] for name, scope in (("e", Scope.EDIT), ("o", Scope.OPERATE))
    )
    with door.serving(FakeTorchServe(), store, max_request_mib=1, key_rate=1e9) as running:
        yield Studio(running, key, operator)


def replies(running: Server, sent: bytes) -> list[int]:
    """The statuses of all that is answered until the other side closes, which it must."""
    found = []
    with running.connect() as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while True:
                found.append(read(line).status)
    return found


# Smuggling: what one server takes for a body and another for a request

INNER = b"POST /v1/models/sam/unload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
SMUGGLED = {
    "length and chunks": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nX",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 50\r\n\r\n",
    "a length that is a list": b"Content-Length: 0, 50\r\n\r\n",
    "a length in hexadecimal": b"Content-Length: 0x0\r\n\r\n",
    "a length with a sign": b"Content-Length: +0\r\n\r\n",
    "a length with a space inside": b"Content-Length: 0 0\r\n\r\n",
    "a space before the colon": b"Content-Length : 50\r\n\r\n",
    "a coding of another name": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunks that are not last": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunks twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks, and something else": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunks behind a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a folded coding": b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a NUL in the coding": b"Transfer-Encoding: chunked\0\r\n\r\n0\r\n\r\n",
    "a bare LF between headers": b"X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bare CR between headers": b"X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk's size behind a sign": b"Transfer-Encoding: chunked\r\n\r\n+0\r\n\r\n",
    "a chunk's size as 0x0": b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n",
    "a chunk's size and a bare LF": b"Transfer-Encoding: chunked\r\n\r\n0\n\n",
    "a chunk longer than it says": b"Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n",
    "a chunk's size that overflows": b"Transfer-Encoding: chunked\r\n\r\n10000000000000000\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_nothing_behind_an_unclear_end_is_taken_for_a_request(studio: Studio, name: str) -> None:
    head = f"POST /predictions/sam HTTP/1.1\r\nHost: localhost\r\nx-api-key: {studio.key}\r\n".encode()
    own = INNER.replace(b"Host:", f"x-api-key: {studio.operator}\r\nHost:".encode())
    found = replies(studio.server, head + SMUGGLED[name] + own + PAGE)
    assert len(found) == 1
    assert found[0] in (400, 431)


# Headers that come twice


@pytest.mark.parametrize(
    "headers",
    [
        ("Authorization: Bearer {key}", "Authorization: Bearer {key}"),
        ("Authorization: Bearer {key}", "Authorization: Bearer wrong"),
        ("Authorization: Bearer {key}", "x-api-key: {key}"),
        ("x-api-key: {key}", "x-api-key: "),
        ("X-API-KEY: {key}", "AUTHORIZATION: Bearer {key}"),
        ("Authorization: ", "Authorization: Bearer {key}"),
    ],
)
def test_two_keys_are_none(studio: Studio, headers: tuple[str, ...]) -> None:
    reply = studio.server.send(post("/predictions/sam", b"", *(each.format(key=studio.key) for each in headers)))
    assert (reply.status, reply.code) == (400, "contradictory_keys")


@pytest.mark.parametrize(
    "headers",
    [
        ("Origin: https://evil.example",),
        ("Origin: null",),
        ("Origin: http://localhost.evil.example",),
        ("Origin: http://localhost", "Origin: https://evil.example"),
        ("Sec-Fetch-Site: cross-site",),
        ("Sec-Fetch-Site: same-site",),
        ("Sec-Fetch-Site: Same-Origin",),
        ("Sec-Fetch-Site: ", "Origin: http://localhost"),
        ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: cross-site"),
        ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-origin"),
        ("Origin: https://evil.example", "Origin: http://localhost"),
    ],
)
def test_pages_of_other_sites_change_nothing(studio: Studio, headers: tuple[str, ...]) -> None:
    for path in ("/predictions/sam", "/v1/models/sam/unload", "/login", "/v1/erase"):
        for key in (studio.key, studio.operator):
            reply = studio.server.send(post(path, b"", f"x-api-key: {key}", *headers))
            assert (reply.status, reply.code) == (403, "cross_site"), path


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "a b", "[::1", "@x.y"]
)
def test_names_that_are_not_the_servers_reach_nothing(studio: Studio, host: str) -> None:
    request = post("/predictions/sam", b"", f"x-api-key: {studio.key}").replace(b"localhost", host.encode())
    assert studio.server.send(request).status in (400, 421)


# Slow ones


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SILENCE", 0.3)
    monkeypatch.setattr(bodies, "PACE", 10_000)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("path", ["/predictions/sam", "/v1/erase", "/v1/images"])
def test_a_body_that_trickles_gives_its_place_back(studio: Studio, path: str) -> None:
    """A byte now and then is no silence, and not within the time limit either."""
    used = studio.server.app.state.services.bodies
    with studio.server.connect() as line:
        line.sendall(post(path, bytes(900_000), f"x-api-key: {studio.key}")[:-899_000])
        door.until(lambda: used.used)
        with contextlib.suppress(OSError):
            for _ in range(200):
                line.sendall(b"x")
                time.sleep(0.02)  # it is slow
                if not used.used:
                    break
        reply = read(line)
        assert (reply.status, reply.code) == (408, "body_timeout")
        assert used.used == 0


@pytest.mark.usefixtures("hurried")
def test_a_body_that_is_slow_and_keeps_its_pace_is_served(studio: Studio) -> None:
    request = post("/predictions/sam", bytes(20_000), f"x-api-key: {studio.key}")
    with studio.server.connect() as line:
        for start in range(0, len(request), 2000):
            line.sendall(request[start : start + 2000])
            time.sleep(0.06)  # 33 kB a second
        assert read(line).status == 200


def test_many_slow_connections_of_one_address_leave_room_for_another(studio: Studio) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(150):
            line = stack.enter_context(studio.server.connect())
            line.sendall(post("/predictions/sam", bytes(100))[: 40 + number % 60])
        other = socket.create_connection(("127.0.0.1", studio.server.port), 10, source_address=("127.0.0.3", 0))
        with other:
            other.sendall(post("/predictions/sam", b"x", f"x-api-key: {studio.key}"))
            assert read(other).status == 200


# Whatever comes

NAMES = """Host Authorization
    x-api-key Cookie Content-Type Content-Encoding Accept Origin Sec-Fetch-Site Expect Connection
    Upgrade Range If-None-Match If-Modified-Since Forwarded X-Forwarded-For X-Forwarded-Proto X-Request-Id traceparent
    tracestate X-Amz-Date x-amz-content-sha256 X-Amzn-SageMaker-Target-Model X-Amzn-SageMaker-Accept TE Trailer
    X-Palimpsest-Command X-Palimpsest-Key Accept-Encoding X-HTTP-Method-Override"""
AWS = "AWS4-HMAC-SHA256 Credential=PKX/20200101/us-east-1/sagemaker/aws4_request, SignedHeaders=host, Signature="
WORDS = (
    """
*|null|gzip|identity|br, gzip|100-continue|close|keep-alive|upgrade|h2c|localhost|evil.example|application/json
application/json; charset=utf-7|multipart/form-data|text/event-stream|multipart/form-data; boundary=x|image/png
image/*;q=0.5, */*;q=2|bytes=0-|bytes=5-1,-|Bearer|Bearer x|Basic eDp5|AWS4-HMAC-SHA256|sam|/sam.tar.gz|../../etc
palimpsest_session=x|palimpsest_session=x; palimpsest_session=y|=|;;;|20200101T000000Z|99999999T999999Z|UNSIGNED-PAYLOAD
%00|"|q=;|,,,|-1|1e999||\xff\xfe""".strip()
    .replace("\n", "|")
    .split("|")
)
LONG = [
    AWS + "0" * 64,
    "multipart/form-data; boundary=" + "y" * 300,
    "00-" + "f" * 32 + "-" + "f" * 16 + "-01",
    "a" * 5000,
]
VALUES = st.sampled_from(WORDS + LONG) | st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60)
PATHS = """/ /ping /login /logout /predictions/sam /predictions/sam/1.0 /predictions/none /v1/images /v1/images/img_0
    /v1/images/edits /v1/segment /v1/erase /v1/replace /v1/jobs/x /v1/models /v1/models?limit=-1&next_page_token=%ff
    /v1/models/sam/load /v1/models/sam/pin /models /models?limit=x /models/sam/invoke /endpoints/x/invocations
    /endpoints/x/invocations-response-stream /endpoints/%00/x /endpoints/x/async-invocations /metrics /docs
    /openapi.json
    /api-description /web/x/app.js /web/../serve /%2e%2e/%2e%2e/etc/passwd /explanations/sam /v2/models/sam/infer //
    /%ff
    /?%00=%ff"""
FORM = b"--x\r\nContent-Disposition: form-data; name="
BODIES = (
    st.sampled_from(
        [b"", b"{}", b"[]", b"null", b'"', b'{"key": 1}', b'{"key": "\\ud800"}', b"[" * 999, b"\0" * 70_000]
    )
    | st.sampled_from([b'{"image": "x", "points": [[1, 2]]}', b'{"image": {"a": 1}, "box": [1e999, NaN, 1, 2]}'])
    | st.sampled_from([b'{"model_name": "sam", "url": "s3://x"}', b"--x\r\n\r\n--x--", b"\x1f\x8b\x08\0\0\0\0\0"])
    | st.sampled_from([FORM + b'"image"\r\n\r\n\x89PNG\r\n--x--', FORM + b"a; filename*=utf-8''%ff\r\n\r\n1"])
    | st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8" + b"\xff" * 5000, b"BM" + b"\xff" * 60])
    | st.binary(max_size=300)
)
METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "QUERY", "PROPFIND"])
TOKENS = [b"\r\n", b"\n", b"GET ", b"POST ", b"/ping", b" HTTP/1.1\r\n", b"Host: localhost\r\n", b": ", b"5"]
TOKENS += [b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"Upgrade: h2c\r\n"]
OURS = (501, 505)  # what is not served, and says so


@pytest.mark.slow
@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    method=METHODS,
    path=st.sampled_from(PATHS.split()),
    headers=st.lists(st.tuples(st.sampled_from(NAMES.split()), VALUES), max_size=6),
    body=BODIES,
    who=st.sampled_from(["nobody", "key", "operator"]),
    chunks=st.booleans(),
)
def test_no_header_and_no_body_is_an_error_of_the_servers(
    studio: Studio, method: str, path: str, headers: list[tuple[str, str]], body: bytes, who: str, chunks: bool
) -> None:
    key = {"nobody": "", "key": studio.key, "operator": studio.operator}[who]
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"x-api-key: {key}"] if key else []
    lines += [f"{name}: {value}" for name, value in headers]
    lines.append("Transfer-Encoding: chunked" if chunks else f"Content-Length: {len(body)}")
    sent = "\r\n".join([*lines, "", ""]).encode("latin-1")
    sent += (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n" if chunks else body
    with studio.server.connect() as line:
        with contextlib.suppress(ConnectionError):
            line.sendall(sent)
        reply = read(line, method)
        assert reply.status < 500 or reply.status in OURS, (sent[:2000], reply)
        assert closed(line)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.binary(max_size=80) | st.sampled_from(TOKENS),
        max_size=12,
    )
)
def test_no_bytes_are_an_error_of_the_servers(studio: Studio, pieces: list[bytes]) -> None:
    for status in replies(studio.server, b"".join(pieces)):
        assert status < 500 or status in OURS


def test_after_all_that_nothing_is_left(studio: Studio) -> None:
    """Runs last: no lease, no waiter, no byte of a body, no share of a key."""
    services = studio.server.app.state.services
    door.until(lambda: not studio.server.running.server_state.tasks)
    assert not any(model.leases or model.waiters for model in services.scheduler.models())
    assert (services.bodies.used, services.fair_use._busy) == (0, {})
    assert studio.server.ping()
