"""TLS, spoken by the server itself: the handshake is one more thing that is bounded, and certificates are renewed."""

import contextlib
import io
import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import door
import httpx
import pytest
from certificates import Authority, Pair
from cryptography import x509
from door import PING, Server, closed, post, read
from fakes import FakeTorchServe, make_store
from palimpsest import Client, Unreachable
from rich.console import Console

from serve import healthcheck, models_table, preflight
from serve.gateway import server as servers
from serve.gateway import tls
from serve.gateway.access import keys
from serve.gateway.access.keys import Scope
from serve.gateway.tls import Certificate, TlsError
from serve.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder)


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.issue("server")


@pytest.fixture(scope="module")
def store(folder: Path) -> Path:
    return make_store(folder / "store", "sam")


@pytest.fixture(scope="module")
def shared(store: Path, pair: Pair) -> Iterator[tuple[Server, FakeTorchServe]]:
    fake = FakeTorchServe()
    with door.serving(fake, store, tls_cert=pair.certificate, tls_key=pair.key) as running:
        yield running, fake


@pytest.fixture
def running(shared: tuple[Server, FakeTorchServe]) -> Server:
    return shared[0]


@pytest.fixture
def fake(shared: tuple[Server, FakeTorchServe]) -> FakeTorchServe:
    return shared[1]


def trusting(authority: Authority, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.file))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


@contextlib.contextmanager
def secure(running: Server, authority: Authority, version: ssl.TLSVersion | None = None) -> Iterator[ssl.SSLSocket]:
    with (
        running.connect() as plain,
        trusting(authority, version).wrap_socket(plain, server_hostname="localhost") as line,
    ):
        yield line


def serial(line: ssl.SSLSocket) -> int:
    return x509.load_der_x509_certificate(line.getpeercert(binary_form=True) or b"").serial_number


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_requests_are_served_within_tls(
    running: Server, fake: FakeTorchServe, authority: Authority, pair: Pair, version: ssl.TLSVersion
) -> None:
    body = bytes(range(256)) * 4000
    with secure(running, authority, version) as line:
        assert serial(line) == pair.serial
        for _ in range(3):
            line.sendall(post("/predictions/sam", body) + PING)
            assert [read(line).status, read(line).status] == [200, 200]
            assert [each.content for each in fake.calls if each.url.path.startswith("/predictions")][-1] == body
        line.sendall(post("/predictions/sam", b"x", "Connection: close"))
        assert read(line).body == b"png"
        assert closed(line)


def test_what_is_no_longer_safe_is_not_spoken(running: Server, authority: Authority) -> None:
    context = trusting(authority)
    with warnings.catch_warnings(action="ignore"):
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    weak = trusting(authority, ssl.TLSVersion.TLSv1_2)
    weak.set_ciphers("AES128-SHA:AES256-SHA:ECDHE-ECDSA-AES128-SHA:@SECLEVEL=0")
    for each in (context, weak):
        with running.connect() as plain, pytest.raises((ssl.SSLError, ConnectionError)):
            each.wrap_socket(plain, server_hostname="localhost")


def test_a_large_reply_and_its_end_arrive_whole(running: Server, fake: FakeTorchServe, authority: Authority) -> None:
    fake.replies["POST /predictions/p.sam"] = httpx.Response(200, content=bytes(12 << 20))
    try:
        for request in (
            post("/predictions/sam", b"", "Connection: close"),
            post("/predictions/sam").replace(b"HTTP/1.1", b"HTTP/1.0"),
        ):
            with secure(running, authority) as line:
                line.sendall(request)
                size = 0
                while piece := line.recv(1 << 16):
                    size += len(piece)
                assert size > 12 << 20
    finally:
        del fake.replies["POST /predictions/p.sam"]


def test_the_sender_of_a_refused_body_sees_the_answer(running: Server, authority: Authority) -> None:
    head = post("/models", b"", "Content-Type: application/octet-stream").replace(
        b"Content-Length: 0", b"Content-Length: %d" % (50 << 20)
    )
    with secure(running, authority) as line:
        line.sendall(head + bytes(1 << 20))
        reply = read(line)
        assert (reply.status, reply.headers["connection"]) == (413, "close")


def test_who_speaks_no_tls_is_let_go(running: Server) -> None:
    for sent in (PING, b"\0" * 500, b"\x16\x03\x01\x02\0" + b"\xff" * 600, b"\x16\x03\x01"):
        with running.connect() as line:
            line.sendall(sent)
            line.shutdown(socket.SHUT_WR)
            assert closed(line)
    assert not [each for each in running.running.server_state.connections if isinstance(each, tls.Handshake)]


def test_a_handshake_has_a_time_limit(running: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.2)
    with running.connect() as silent, running.connect() as half:
        half.sendall(b"\x16\x03\x01\x02\0\x01")
        assert closed(silent)
        assert closed(half)
    door.until(lambda: not any(isinstance(each, tls.Handshake) for each in running.running.server_state.connections))


def test_handshakes_count_as_connections_and_the_longest_waits_end(
    store: Path, pair: Pair, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "most_connections", lambda descriptors: 8)
    with (
        door.serving(FakeTorchServe(), store, tls_cert=pair.certificate, tls_key=pair.key) as running,
        contextlib.ExitStack() as stack,
    ):
        for i in range(100):
            stack.enter_context(running.connect()).sendall(b"\x16\x03" if i % 2 else b"")
        with secure(running, authority) as line:
            line.sendall(PING)
            assert read(line).status == 200
            assert len(running.running.server_state.connections) <= 4
        busy = [stack.enter_context(secure(running, authority)) for _ in range(4)]
        for each in busy:
            each.sendall(post("/predictions/sam", b"x" * 100)[:-1])
        door.until(lambda: len(running.running.server_state.tasks) == 4)
        with running.connect() as refused:
            assert closed(refused)
        for each in busy:
            each.sendall(b"x")
            assert read(each).status == 200


def test_a_stop_waits_for_no_handshake(store: Path, pair: Pair) -> None:
    with door.serving(FakeTorchServe(), store, tls_cert=pair.certificate, tls_key=pair.key) as running:
        line = running.connect()
        door.until(lambda: running.running.server_state.connections)
    assert closed(line)
    line.close()


def test_many_at_once_are_all_served(running: Server, authority: Authority) -> None:
    served: list[int] = []

    def ask() -> None:
        with secure(running, authority) as line:
            line.sendall(PING)
            served.append(read(line).status)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert served == [200] * 40


# Renewal


def link(folder: Path, pair: Pair) -> tuple[Path, Path]:
    """As renewals do: names that lead to the files, exchanged one after the other."""
    found = []
    for name, target in (("live.pem", pair.certificate), ("live.key", pair.key)):
        (folder / "new").unlink(missing_ok=True)
        (folder / "new").symlink_to(target)
        (folder / "new").replace(folder / name)
        found.append(folder / name)
    return found[0], found[1]


def test_a_renewed_certificate_serves_new_connections_and_old_ones_stay(
    tmp_path: Path, store: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "LOOK_EVERY", 0)
    first, second = authority.issue("first"), authority.issue("second")
    certificate, key = link(tmp_path, first)

    def served() -> int:
        with secure(running, authority) as line:
            line.sendall(PING)
            assert read(line).status == 200
            return serial(line)

    with (
        door.serving(FakeTorchServe(), store, tls_cert=certificate, tls_key=key) as running,
        secure(running, authority) as old,
    ):
        assert serial(old) == first.serial
        (tmp_path / "live.pem").unlink()
        assert [served() for _ in range(3)] == [first.serial] * 3
        assert "PALIMPSEST_TLS_CERT" in caplog.text
        (tmp_path / "live.pem").symlink_to(second.certificate)  # and the key is not there yet
        assert [served() for _ in range(3)] == [first.serial] * 3
        assert caplog.text.count("the key is not that of the certificate") == 1
        link(tmp_path, second)
        assert [served() for _ in range(3)][1:] == [second.serial] * 2
        assert "renewed" in caplog.text
        second.key.write_text("no key")
        assert [served() for _ in range(3)] == [second.serial] * 3
        assert "PEM" in caplog.text
        old.sendall(PING)
        assert read(old).status == 200


def test_a_pair_that_is_being_written_is_waited_for(tmp_path: Path, authority: Authority) -> None:
    first, second = authority.issue("third"), authority.issue("fourth")
    certificate, key = link(tmp_path, first)
    pair = Certificate(certificate, key)
    before = pair.context()
    (tmp_path / "live.pem").unlink()
    pair._look()
    link(tmp_path, second)
    pair._look()
    assert pair._context is before
    pair._look()
    assert pair._context is not before
    after = pair._context
    pair._look()
    assert pair._context is after


# Settings


@pytest.mark.parametrize(
    ("break_", "words"),
    [
        (lambda pair: pair.certificate.unlink(), "PALIMPSEST_TLS_CERT=.*No such file"),
        (lambda pair: pair.key.unlink(), "PALIMPSEST_TLS_KEY=.*No such file"),
        (lambda pair: pair.key.write_text("x"), "PEM"),
        (lambda pair: pair.certificate.write_text("x"), "PEM"),
        (lambda pair: pair.certificate.write_bytes(pair.key.read_bytes()), "PEM"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, break_: object, words: str) -> None:
    pair = Authority(tmp_path).issue("x")
    break_(pair)  # type: ignore[operator]
    with pytest.raises(TlsError, match=words):
        tls.load(pair.certificate, pair.key)
    with pytest.raises(preflight.Unusable, match=words):
        preflight.require_tls(Settings(tls_cert=pair.certificate, tls_key=pair.key))


def test_an_encrypted_or_another_key_is_told_and_nobody_is_asked(
    tmp_path: Path, authority: Authority, pair: Pair
) -> None:
    hidden = Authority(tmp_path).issue("hidden", password=b"secret")
    with pytest.raises(TlsError, match="encrypted"):
        tls.load(hidden.certificate, hidden.key)
    with pytest.raises(TlsError, match="not that of the certificate"):
        tls.load(pair.certificate, authority.issue("other").key)


def test_certificate_and_key_belong_together(pair: Pair) -> None:
    for settings in (Settings(tls_cert=pair.certificate), Settings(tls_key=pair.key)):
        with pytest.raises(preflight.Unusable, match="set both, or neither"):
            preflight.require_tls(settings)
    preflight.require_tls(Settings())
    preflight.require_tls(Settings(tls_cert=pair.certificate, tls_key=pair.key))


# Who asks on this machine


def test_the_server_is_known_by_its_own_certificate_and_no_other(
    running: Server, pair: Pair, authority: Authority, tmp_path: Path
) -> None:
    settings = Settings(tls_cert=pair.certificate, tls_key=pair.key, port=running.port)
    assert preflight.url(settings) == f"https://127.0.0.1:{running.port}"
    url = f"{preflight.url(settings)}/ping"
    assert httpx.get(url, verify=preflight.trust(settings)).status_code == 200
    other, stranger = authority.issue("sibling"), Authority(tmp_path).issue("stranger")
    for wrong in (other, stranger):
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url, verify=preflight.trust(Settings(tls_cert=wrong.certificate, tls_key=wrong.key)))
    for unusable in (pair.key, tmp_path / "none"):
        with pytest.raises(preflight.Unusable, match="PALIMPSEST_TLS_CERT"):
            preflight.trust(Settings(tls_cert=unusable, tls_key=pair.key))


def test_this_machine_knows_it_by_any_name(store: Path, authority: Authority) -> None:
    elsewhere = authority.issue("elsewhere", "studio.example.org")
    console = Console(file=io.StringIO(), width=200)
    with door.serving(FakeTorchServe(), store, tls_cert=elsewhere.certificate, tls_key=elsewhere.key) as running:
        settings = Settings(tls_cert=elsewhere.certificate, tls_key=elsewhere.key, port=running.port)
        with models_table.connection(preflight.url(settings), trust=preflight.trust(settings)) as http:
            models_table.show(http, True, False, console)
        assert healthcheck.healthy({"PALIMPSEST_PORT": str(running.port), "PALIMPSEST_TLS_CERT": "x"})
        assert not healthcheck.healthy({"PALIMPSEST_PORT": str(running.port)})
    assert isinstance(console.file, io.StringIO)
    assert "sam" in console.file.getvalue()


def test_the_client_works_with_an_authority_of_ones_own(
    running: Server, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"https://localhost:{running.port}"
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with Client(url) as client, pytest.raises(Unreachable):
        client.models()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with Client(url) as client:
        assert [each.name for each in client.models()] == ["sam"]


def test_the_cookie_is_for_tls_alone(pair: Pair, authority: Authority, store: Path) -> None:
    file = store / ".state" / "keys.json"
    key, _ = keys.add(file, "page", [Scope.EDIT], keep=False)
    with (
        door.serving(FakeTorchServe(), store, tls_cert=pair.certificate, tls_key=pair.key) as own,
        secure(own, authority) as line,
    ):
        line.sendall(post("/login", b'{"key": "%s"}' % key.encode(), "Content-Type: application/json"))
        assert "secure" in read(line).headers["set-cookie"].lower()
    file.unlink()
