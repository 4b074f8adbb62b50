"""What the image and compose.yaml say, where no engine is at hand; deploy/image-check.sh builds and runs them."""

import http.server
import ipaddress
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import yaml
from serving import ROOT, free_port, until

from serve import healthcheck
from serve.settings import Settings

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("palimpsest", "cpu", "box1", "box2")
BOXES = ("box1", "box2")
VARIABLES = re.compile(r"\$\{(\w+)")


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SERVICES[request.param]


def environment(name: str) -> dict[str, str]:
    return dict(SERVICES[name]["environment"])


def test_each_service_is_hardened(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]  # and nothing of seccomp, so that the default holds
    assert 0 < service["pids_limit"] <= 4096
    assert "mem_limit" in service
    assert all("size=" in each for each in service["tmpfs"])
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert "privileged" not in service
    assert "network_mode" not in service


@pytest.mark.parametrize("name", OURS)
def test_workers_can_be_started_by_the_program_in_the_temporary_folder(name: str) -> None:
    """Docker's tmpfs is noexec unless it is told otherwise, and workers then start slowly."""
    [options] = [each.partition(":")[2].split(",") for each in SERVICES[name]["tmpfs"] if each.startswith("/tmp:")]
    assert "exec" in options


def test_only_caddy_keeps_a_capability() -> None:
    assert {name: each["cap_add"] for name, each in SERVICES.items() if "cap_add" in each} == {
        "caddy": ["NET_BIND_SERVICE"]
    }


def test_each_image_has_a_version(service: dict[str, Any]) -> None:
    assert service["image"] == "palimpsest" or re.search(r":v?\d+\.\d+\.\d+", service["image"])


def test_what_is_mounted_is_there_and_nothing_of_it_is_written(service: dict[str, Any]) -> None:
    for volume in service["volumes"]:
        source, _, *mode = volume.split(":")
        if source.startswith("."):
            assert mode == ["ro"]
            assert (ROOT / source).exists()
        else:
            assert source in COMPOSE["volumes"]
            assert not mode


def test_ports_are_this_machines_alone_but_for_caddy(service: dict[str, Any]) -> None:
    for port in service["ports"]:
        inside = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", port)
        assert inside.startswith("127.0.0.1:") or service["image"].startswith("caddy:")


def test_a_proxys_address_is_the_only_one_that_is_trusted_and_no_other_can_have_it() -> None:
    (addresses,) = COMPOSE["networks"]["inner"]["ipam"]["config"]
    network, others = ipaddress.ip_network(addresses["subnet"]), ipaddress.ip_network(addresses["ip_range"])
    assert others.subnet_of(network)
    proxies = {name: SERVICES[name]["networks"]["inner"]["ipv4_address"] for name in ("caddy", "pool")}
    assert len({*proxies.values()}) == 2
    for address in map(ipaddress.ip_address, proxies.values()):
        assert address in network
        assert address not in others
    for name in OURS:
        assert environment(name)["PALIMPSEST_PROXIES"] == proxies["pool" if name in BOXES else "caddy"]
    assert {name for name, each in SERVICES.items() if "inner" in each["networks"]} == {*OURS, *proxies}


def test_only_the_pool_reaches_its_boxes_and_each_has_a_gpu_and_a_state_of_its_own() -> None:
    assert all(SERVICES[name]["ports"] == [] for name in BOXES)
    assert all("default" not in SERVICES[name]["networks"] for name in BOXES)
    devices = [SERVICES[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for name in BOXES]
    assert devices == [["0"], ["1"]]
    states = [each for name in BOXES for each in SERVICES[name]["volumes"] if each.endswith(":/state")]
    assert len({*states}) == len(BOXES)
    assert {*SERVICES["pool"]["depends_on"]} == {*BOXES}


def test_all_variables_are_described() -> None:
    head = (ROOT / "compose.yaml").read_text().split("\n\n")[0]
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "container.md").read_text(), re.M)
    used = set(VARIABLES.findall((ROOT / "compose.yaml").read_text())) | {*COMPOSE["x-build"]["args"]}
    assert used == set(re.findall(r"\b[A-Z_]{4,}\b", head.replace("GPU", ""))) == set(table)


def test_keys_come_as_a_file_and_an_empty_name_of_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OURS:
        assert environment(name)["PALIMPSEST_KEYS_FILE"] == "${KEYS_FILE:+/run/secrets/keys}"
        assert SERVICES[name]["secrets"] == ["keys"]
    monkeypatch.setenv("PALIMPSEST_KEYS_FILE", "")
    assert Settings().keys_file is None


def test_settings_of_compose_exist() -> None:
    known = {f"PALIMPSEST_{name.upper()}" for name in Settings.model_fields}
    for name in OURS:
        assert {each for each in environment(name) if each.startswith("PALIMPSEST_")} <= known


def test_the_image_is_built_in_a_stage_that_stays_behind() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.M)[1:]
    assert [stage.split("\n")[0] for stage in stages] == ["$BASE_IMAGE AS base", "base AS build", "base"]
    build, final = stages[1:]
    assert "deploy/install.sh" in build
    assert re.search(r"^ARG TORCH_INDEX=$", build, re.M)
    assert "pip" not in re.sub("^#.*", "", final, flags=re.M)
    assert re.findall(r"^USER (\d+)", final, re.M) == ["10001"]
    assert all(line.startswith("COPY --from=build ") for line in final.splitlines() if line.startswith("COPY"))


def test_what_the_build_copies_is_let_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / path).exists() for path in let_through)
    build = (ROOT / "Dockerfile").read_text()
    named = {*re.findall(r"requirements\S*\.lock", build), "deploy/install.sh"}
    assert named <= let_through


class Ping(http.server.BaseHTTPRequestHandler):
    status = 200
    forwarded: ClassVar[list[str | None]] = []
    """For whom it was asked."""

    def do_GET(self) -> None:
        self.forwarded.append(self.headers["X-Forwarded-For"])
        self.send_response(self.status if self.path == "/ping" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class Unwell(Ping):
    status = 503


@pytest.fixture(params=[Ping, Unwell])
def pinged(request: pytest.FixtureRequest) -> Iterator[http.server.HTTPServer]:
    Ping.forwarded.clear()
    with http.server.HTTPServer(("127.0.0.1", 0), request.param) as server:
        yield server


@pytest.mark.parametrize("encrypted", [False, True])
def test_the_health_check_asks_in_plain_or_by_tls(
    pinged: http.server.HTTPServer, encrypted: bool, tmp_path: Path
) -> None:
    environ = {"PALIMPSEST_PORT": str(pinged.server_port)}
    if encrypted:
        # For another name, and signed by nobody.
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=edit.example.org"
        files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
        subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=60)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        pinged.socket = context.wrap_socket(pinged.socket, server_side=True)
        environ["PALIMPSEST_TLS_CERT"] = str(tmp_path / "cert.pem")
    threading.Thread(target=pinged.serve_forever, daemon=True).start()
    assert healthcheck.healthy(environ) is (pinged.RequestHandlerClass is Ping)
    pinged.shutdown()


def test_a_server_that_is_not_there_is_not_well() -> None:
    environ = os.environ | {"PALIMPSEST_PORT": str(free_port())}
    assert (
        subprocess.run([sys.executable, "-m", "serve.healthcheck"], env=environ, cwd=ROOT, timeout=60).returncode == 1
    )


@pytest.fixture(params=["off", ""])
def caddy(request: pytest.FixtureRequest, tmp_path: Path, pinged: http.server.HTTPServer) -> Iterator[tuple[str, str]]:
    """Runs Caddy as compose.yaml would. The value of KEYS, and its address."""
    threading.Thread(target=pinged.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{free_port()}"
    config = tmp_path / "Caddyfile"
    text = (ROOT / "deploy" / "caddy" / "Caddyfile").read_text()
    config.write_text(text.replace("server:8080", f"127.0.0.1:{pinged.server_port}"))
    environ = os.environ | {"SITE": address, "KEYS": request.param, "HOME": str(tmp_path)}
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", config]
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as process:
        yield request.param, address
        process.terminate()
    pinged.shutdown()


@pytest.mark.skipif(shutil.which("caddy") is None, reason="needs Caddy")
@pytest.mark.parametrize("pinged", [Ping], indirect=True)
def test_caddy_passes_nothing_on_while_no_key_is_asked_for(
    caddy: tuple[str, str], pinged: http.server.HTTPServer
) -> None:
    keys, address = caddy
    with httpx.Client(transport=httpx.HTTPTransport(), timeout=10) as client:
        until(lambda: answers(client, address))
        answer = client.get(f"{address}/ping", headers={"X-Forwarded-For": "1.2.3.4"})
    if keys == "off":
        assert (answer.status_code, "KEYS=off" in answer.text) == (503, True)
        assert Ping.forwarded == []
    else:
        assert answer.status_code == 200
        assert Ping.forwarded[-1] == "127.0.0.1"


def answers(client: httpx.Client, address: str) -> bool:
    try:
        return client.get(f"{address}/ping").status_code in (200, 503)
    except httpx.ConnectError:
        return False
