"""Who may say for whom a request is: the proxies that are named, and nobody else."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import door
import pytest
from door import PING, Server, post, read
from fakes import FakeTorchServe, make_store
from hypothesis import given
from hypothesis import strategies as st

from serve import preflight
from serve.gateway import server as servers
from serve.gateway.access import keys
from serve.gateway.access.keys import Scope
from serve.gateway.connections import Doorkeeper, household
from serve.gateway.proxies import among, networks
from serve.settings import Settings

PROXY, STRANGER = "127.0.0.1", "127.0.0.2"


@contextlib.contextmanager
def served(tmp_path: Path, **settings: object) -> Iterator[Server]:
    with door.serving(FakeTorchServe(), make_store(tmp_path, "sam"), **settings) as running:
        yield running


def ask(running: Server, source: str, *headers: str, path: str = "/predictions/sam", body: bytes = b"") -> door.Reply:
    with socket.create_connection(("127.0.0.1", running.port), 10, source_address=(source, 0)) as line:
        line.sendall(post(path, body, *headers))
        return read(line)


def test_only_the_proxy_says_whose_a_request_is(tmp_path: Path) -> None:
    with served(tmp_path, proxies=PROXY, key_rate=1) as running:
        said = [f"X-Forwarded-For: 10.0.0.{number}" for number in range(3)]
        assert [ask(running, PROXY, each).status for each in said] == [200] * 3
        assert [ask(running, PROXY, each).status for each in said] == [429] * 3
        # What its own client says, and it passes on before its own word, counts for nothing.
        assert ask(running, PROXY, "X-Forwarded-For: 10.0.0.77, 10.0.0.1").status == 429
        assert ask(running, PROXY, "X-Forwarded-For: 10.0.0.78", said[1]).status == 429
        assert [ask(running, STRANGER, each).status for each in said] == [200, 429, 429]
        for odd in ("", "x", "a:b:c", "1.2.3.4:99", "[::1]:x", "[", "," * 500, "\xff"):
            assert ask(running, PROXY, f"X-Forwarded-For: {odd}").status in (200, 429), odd


def test_nobody_is_believed_where_no_proxy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    with served(tmp_path, key_rate=1) as running:
        assert ask(running, PROXY, "X-Forwarded-For: 10.0.0.1").status == 200
        assert ask(running, PROXY, "X-Forwarded-For: 10.0.0.2").status == 429


@pytest.mark.slow
@pytest.mark.parametrize(("source", "secure"), [(PROXY, True), (STRANGER, False)])
def test_only_the_proxy_says_that_it_is_https(tmp_path: Path, source: str, secure: bool) -> None:
    key, _ = keys.add(tmp_path / ".state" / "keys.json", "page", [Scope.EDIT], keep=False)
    with served(tmp_path, proxies=PROXY) as running:
        body = b'{"key": "%s"}' % key.encode()
        sent = ("Content-Type: application/json", "X-Forwarded-Proto: https")
        reply = ask(running, source, *sent, path="/login", body=body)
        assert ("secure" in reply.headers["set-cookie"].lower()) == secure
        for odd in ("gopher", "https, http", "", "\xff"):
            sent = ("Content-Type: application/json", f"X-Forwarded-Proto: {odd}")
            assert "secure" not in ask(running, source, *sent, path="/login", body=body).headers["set-cookie"].lower()


def test_all_connections_may_come_from_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "most_connections", lambda descriptors: 8)
    unfinished = post("/predictions/sam", b"x" * 100)[:-1]
    with served(tmp_path, proxies=PROXY) as running, contextlib.ExitStack() as stack:
        busy = [stack.enter_context(running.connect()) for _ in range(7)]
        for line in busy:
            line.sendall(unfinished)
        door.until(lambda: len(running.running.server_state.tasks) == 7)
        assert running.send(PING).status == 200


class Guest:
    def unsent(self) -> int:
        return 0

    def drop(self) -> None:
        raise AssertionError


def test_the_share_is_that_of_an_address_and_not_of_a_proxy() -> None:
    keeper = Doorkeeper(4, networks("10.0.0.0/8,fd00::1"))
    for address, most in (("10.1.2.3", 4), ("fd00::1", 4), ("fd00::2", 2), ("11.0.0.1", 2)):
        guests = [Guest() for _ in range(4)]
        admitted = 0
        for guest in guests:
            if keeper.admit(guest, address):
                keeper.busy(guest)
                admitted += 1
        assert admitted == most, address
        for guest in guests:
            keeper.gone(guest)


@pytest.mark.parametrize("text", ["*", "0.0.0.0/0", "::/0", "proxy", "10.0.0.1/8", "10.0.0.1;10.0.0.2", "1.2.3", "x,*"])
def test_what_would_let_everybody_say_so_is_refused(text: str) -> None:
    with pytest.raises(preflight.Unusable, match=r"PALIMPSEST_PROXIES.*no address and no network"):
        preflight.require_proxies(Settings(proxies=text))


def test_addresses_and_networks_are_read() -> None:
    named = networks(" 10.0.0.5, 172.18.0.0/16 ,fd00::/8,")
    for address in ("10.0.0.5", "172.18.3.4", "fd00::9"):
        assert among(address, named)
    for address in ("10.0.0.6", "172.19.0.1", "::1", "", "x", "10.0.0.5:80"):
        assert not among(address, named)
    assert networks("") == ()


@given(st.text(max_size=40))
def test_whatever_is_said_to_be_an_address_counts_as_one(text: str) -> None:
    assert isinstance(household(text), str)
