"""What a user can set wrongly: every message names the setting and says what to do."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving import PALIMPSEST, free_port
from typer.testing import CliRunner

from serve import cli, preflight, startup
from serve.settings import Settings


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PALIMPSEST_")]:
        monkeypatch.delenv(name)
    values = {
        "STORE": tmp_path / "store",
        "STATE": tmp_path / "state",
        "CACHE": tmp_path / "cache",
        "PORT": free_port(),
        "MODELS": "demo",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"PALIMPSEST_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_serve", lambda *_: pytest.fail("it would have served"))
    monkeypatch.setattr(startup.build, "ensure_demo", lambda *_: None)
    (tmp_path / "file").touch()


def complaint() -> str:
    result = CliRunner().invoke(cli.app, ["serve"])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    return result.stderr.strip()


@pytest.mark.parametrize("value", ["abc", "", "inf", "nan", "-1", "101%", "8GiB", "8 GiB", "1e400", "9" * 400, "%"])
@pytest.mark.parametrize("setting", ["MEMORY_BUDGET", "HOST_BUDGET"])
def test_a_budget_is_mib_or_a_percentage(setting: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PALIMPSEST_{setting}", value)
    said = complaint()
    assert f"PALIMPSEST_{setting} must be a number of MiB such as 8000, or a percentage such as 92%" in said
    assert len(said) < 250


def test_a_memory_budget_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_MEMORY_BUDGET", "0")
    assert "PALIMPSEST_MEMORY_BUDGET must be more than 0" in complaint()


@pytest.mark.slow
@pytest.mark.parametrize("value", ["abc", "", "-5", "nan", "inf"])
@pytest.mark.parametrize(
    "setting",
    [name for name, field in Settings.model_fields.items() if field.annotation in (int, float, float | None)],
)
def test_a_number_that_is_none_is_refused(setting: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PALIMPSEST_{setting.upper()}", value)
    assert f"PALIMPSEST_{setting.upper()}: Input should be" in complaint()


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("MODELS", "tiny", "'auto', 'full' or 'demo'"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("HOST", "192.0.2.1", "not an address of this machine"),
        ("HOST", "no-such-host.invalid", "no address or name of this machine"),
        ("HOST", "a" * 300, "no address or name of this machine"),
        ("STORE", "file", "a file is in its place"),
        ("STORE", "file/below", "Not a directory"),
        ("STORE", "/proc/none", "name a folder that this user may use"),
        ("STATE", "file", "a file is in its place"),
        ("STATE", "/proc/none", "name a folder that this user may use"),
        ("STATE", "/proc", "name a folder that this user may use"),
        ("CONFIG", "nowhere", "name an existing file"),
        ("CONFIG", ".", "name an existing file"),
    ],
)
def test_what_can_not_be_used_is_named(setting: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PALIMPSEST_{setting}", value)
    said = complaint()
    assert f"PALIMPSEST_{setting}" in said
    assert words in said


def test_an_unknown_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "palimpsest.env").write_text("PALIMPSEST_PROT=8081\n")
    assert "PALIMPSEST_PROT: there is no such setting" in complaint()


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_in_use_is_named(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_PORT", str(listening))
    assert "Set another PALIMPSEST_PORT" in complaint()


def test_stop_says_what_else_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    port = free_port()
    monkeypatch.setenv("PALIMPSEST_PORT", str(port))
    result = CliRunner().invoke(cli.app, ["stop"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"Nothing runs on port {port}.")

    serving = [PALIMPSEST.with_name("python"), "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    other = subprocess.Popen(serving, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert other.stderr is not None
        while not psutil.Process(other.pid).net_connections(kind="tcp"):
            assert other.poll() is None
        result = CliRunner().invoke(cli.app, ["stop"])
    finally:
        other.kill()
        other.communicate()
    assert result.exit_code == 1
    assert f"process {other.pid} listens on port {port}" in result.stderr


def test_a_read_only_store_can_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store").mkdir(mode=0o555)
    preflight.check(Settings())
