"""Keys themselves: the file, the environment, the command, and what may start without any."""

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fakes import FakeTorchServe, gateway, make_store
from rich.console import Console
from typer.testing import CliRunner, Result

from serve import cli, models_table, preflight
from serve.engine import supervisor
from serve.errors import PalimpsestError
from serve.gateway.access import keys
from serve.gateway.access.keys import Key, Keys, KeysError, Scope
from serve.settings import SECRETS, Settings

EDIT = [Scope.EDIT]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not there yet; every look at it counts."""
    monkeypatch.setattr(keys, "LOOK_EVERY", 0)
    return tmp_path / "state" / "keys.json"


@pytest.fixture
def command(file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    for name in [name for name in os.environ if name.startswith("PALIMPSEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PALIMPSEST_STATE", str(file.parent))
    monkeypatch.chdir(file.parent.parent)
    return lambda *arguments: CliRunner().invoke(cli.app, ["keys", *arguments])


def valid(of: Keys, text: str) -> bool:
    now = of.current()
    assert now is not None
    return now.find(text.encode()) is not None


def test_a_key_is_long_and_random_and_the_file_has_its_hash_alone(file: Path) -> None:
    made = [keys.add(file, f"k{n}", EDIT, keep=False)[0] for n in range(20)]
    assert len(set(made)) == 20
    assert all(len(text) >= 3 + 43 for text in made)  # 256 bits in base64
    assert not any(text in file.read_text() or text[3:] in file.read_text() for text in made)


def test_only_a_key_for_aws_is_in_the_file_itself(file: Path) -> None:
    plain, _ = keys.add(file, "plain", EDIT, keep=False)
    aws, key = keys.add(file, "aws", EDIT, keep=True)
    assert (plain in file.read_text(), aws in file.read_text()) == (False, True)
    assert aws not in repr(key)
    assert key.access_key_id is not None
    assert key.access_key_id not in file.read_text()


def test_the_file_is_its_owners_alone_whatever_the_umask_and_whatever_it_was(file: Path) -> None:
    before = os.umask(0)
    try:
        keys.add(file, "a", EDIT, keep=False)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        file.chmod(0o644)
        keys.add(file, "b", EDIT, keep=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]


def test_a_file_that_cannot_be_written_stays_as_it_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.add(file, "a", EDIT, keep=False)
    before = file.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysError, match="No space left"):
        keys.add(file, "b", EDIT, keep=False)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_of_keys_made_at_the_same_time_none_is_lost(file: Path) -> None:
    threads = [threading.Thread(target=keys.add, args=(file, f"k{n}", EDIT, False)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys.read(file)) == 8


def test_a_name_is_used_once_and_the_file_has_a_bound(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MOST_KEYS", 2)
    keys.add(file, "a", EDIT, keep=False)
    with pytest.raises(KeysError, match="revoke it first"):
        keys.add(file, "a", EDIT, keep=False)
    keys.add(file, "b", EDIT, keep=False)
    with pytest.raises(KeysError, match="there are 2 keys already"):
        keys.add(file, "c", EDIT, keep=False)
    with pytest.raises(KeysError, match="no key of that name"):
        keys.revoke(file, "c")


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "-a", "a" * 65, "a\n"])
def test_a_name_is_plain(file: Path, name: str) -> None:
    with pytest.raises(KeysError, match="letters, digits"):
        keys.add(file, name, EDIT, keep=False)
    assert not file.exists()


def test_a_running_server_sees_keys_come_and_go(file: Path) -> None:
    live = Keys(file)
    assert live.current() is None
    a, _ = keys.add(file, "a", EDIT, keep=False)
    b, _ = keys.add(file, "b", EDIT, keep=False)
    assert valid(live, a)
    assert valid(live, b)
    keys.revoke(file, "a")
    assert not valid(live, a)
    assert valid(live, b)
    again, _ = keys.add(file, "a", EDIT, keep=False)
    assert not valid(live, a)
    assert valid(live, again)


def test_the_file_is_looked_at_once_in_a_while_and_read_when_it_changed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add(file, "a", EDIT, keep=False)
    now, looks, reads = [0.0], [0], [0]

    def looked(status: os.stat_result, real: Any = keys._version) -> Any:
        looks[0] += 1
        return real(status)

    def was_read(path: Path, real: Any = keys.read) -> list[Key]:
        reads[0] += 1
        return list(real(path))

    monkeypatch.setattr(keys, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(keys, "LOOK_EVERY", 1)
    live = Keys(file)
    monkeypatch.setattr(keys, "_version", looked)
    monkeypatch.setattr(keys, "read", was_read)
    for _ in range(100):
        live.current()
        now[0] += 0.1
    assert 9 <= looks[0] <= 11
    assert reads[0] == 1


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"keys": [{}]}', '{"keys": [{"name": "x", "scopes": ["root"]}]}'])
def test_once_there_were_keys_a_file_that_is_gone_or_broken_lets_nobody_in(
    file: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    text, _ = keys.add(file, "a", EDIT, keep=False)
    good = file.read_text()
    live = Keys(file)
    assert valid(live, text)
    file.write_text(broken) if broken else file.unlink()
    assert not valid(live, text)
    assert not valid(live, text)
    assert len(caplog.records) == 1  # of the two looks
    assert str(file) in caplog.text
    file.write_text(good)
    assert valid(live, text)


def test_a_broken_file_from_the_start_lets_nobody_in_and_says_nothing_of_what_it_holds(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    entry = {"name": "a", "scopes": ["edit"], "sha256": "marker-1", "secret": "marker-2", "marker-3": "marker-4"}
    file.write_text(json.dumps({"keys": [entry]}))
    live = Keys(file)
    assert not valid(live, "marker-1")
    with pytest.raises(KeysError, match="is no file of keys") as told:
        keys.add(file, "b", EDIT, keep=False)
    assert not any(f"marker-{n}" in caplog.text + told.value.message for n in (1, 2, 4))


def test_two_keys_of_one_name_and_a_file_without_end_are_none(file: Path) -> None:
    file.parent.mkdir()
    entry = {"name": "a", "scopes": ["edit"], "sha256": "0" * 64}
    file.write_text(json.dumps({"keys": [entry, entry]}))
    with pytest.raises(KeysError):
        keys.read(file)
    with file.open("wb") as opened:
        opened.truncate(keys.MOST_BYTES + 1)
    with pytest.raises(KeysError, match="has more than"):
        keys.read(file)


KEY = "k" * 32


def test_the_environment_has_keys_too(file: Path) -> None:
    settings = Settings(state=file.parent, keys=f"ci:edit:{KEY}, ops:edit+operate:{KEY[1:]}:=,")  # type: ignore[arg-type]
    live = keys.of_settings(settings)
    assert live is not None
    now = live.current()
    assert now is not None
    assert [(key.name, key.scopes) for key in now.keys] == [
        ("ci", [Scope.EDIT]), ("ops", [Scope.EDIT, Scope.OPERATE]),
    ]  # fmt: skip
    text, _ = keys.add(file, "a", EDIT, keep=False)
    assert all(valid(live, each) for each in (KEY, KEY[1:] + ":=", text))
    file.unlink()
    assert [valid(live, each) for each in (KEY, text)] == [True, False]
    assert KEY not in repr(settings)


@pytest.mark.parametrize(
    "text",
    [
        KEY, "OFF", "off,", f"a:{KEY}", f"a:root:{KEY}", f"a::{KEY}", f":edit:{KEY}", f"a:edit:{KEY[1:]}", "a:edit:",
        f"a:edit:{KEY} ö", f"a:edit:{KEY},a:operate:{KEY}", f"a b:edit:{KEY}", "a:edit:" + "k" * 513, f"a:edit+:{KEY}",
    ],
)  # fmt: skip
def test_an_environment_that_names_no_keys_is_refused_without_being_quoted(tmp_path: Path, text: str) -> None:
    settings = Settings(state=tmp_path, keys=text, host="127.0.0.1")  # type: ignore[arg-type]
    with pytest.raises(preflight.Unusable) as told:
        preflight.require_keys(settings)
    assert "PALIMPSEST_KEYS" in str(told.value)
    assert KEY[1:] not in str(told.value)


def test_a_secret_is_in_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "PALIMPSEST_KEYS",
        "palimpsest_key",
        "OTEL_EXPORTER_OTLP_HEADERS",
        "PALIMPSEST_HOST",
    ):  # settings are read in any case
        monkeypatch.setenv(name, "marker")
    assert [name for name, value in supervisor.inherited().items() if value == "marker"] == ["PALIMPSEST_HOST"]
    ours = {
        f"PALIMPSEST_{name.upper()}"
        for name, field in Settings.model_fields.items()
        if any(secret in str(field) for secret in ("SecretStr", "StoreUrl"))  # which may hold a password
    }
    assert {name for name in SECRETS if name.startswith("PALIMPSEST_")} == ours


# The command


def test_the_command_shows_a_key_once(command: Callable[..., Result], file: Path) -> None:
    made = command("add", "studio")
    assert made.exit_code == 0
    text = made.stdout.strip()  # and nothing else, for scripts
    assert valid(Keys(file), text)
    shown = command("list")
    assert text not in shown.output
    assert shown.stdout.split()[:2] == ["studio", "edit"]
    ended = command("revoke", "studio")
    assert (ended.exit_code, ended.stdout) == (0, "")
    assert not valid(Keys(file), text)
    assert command("list").stdout == ""


def test_the_command_gives_scopes_and_ids_for_aws(command: Callable[..., Result]) -> None:
    made = command("add", "ops", "--scope", "operate", "--scope", "edit", "--aws")
    name, scopes, _, access_key_id = command("list").stdout.split()
    assert (name, scopes) == ("ops", "edit+operate")
    assert f"aws_access_key_id={access_key_id}," in made.stderr
    assert len(access_key_id) == 20


def test_the_command_says_what_is_wrong(command: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_KEYS", f"ci:edit:{KEY}")
    assert "ci                   edit" in command("list").stdout
    for arguments in (("revoke", "ci"), ("add", "ci")):
        result = command(*arguments)
        assert result.exit_code == 1
        assert "PALIMPSEST_KEYS" in str(result.exception)
    result = command("revoke", "nobody")
    assert result.exit_code == 1
    assert "no key of that name" in str(result.exception)
    assert command("add", "x", "--scope", "root").exit_code == 2


# Who may listen where


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "::1"])
def test_on_loopback_no_key_is_needed(tmp_path: Path, host: str) -> None:
    preflight.require_keys(Settings(state=tmp_path, host=host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "0", "none.invalid", ""])
def test_beyond_loopback_there_must_be_keys_or_a_word_that_there_are_none(tmp_path: Path, host: str) -> None:
    open_ = Settings(state=tmp_path, host=host)
    with pytest.raises(preflight.Unusable, match=r"`palimpsest keys add NAME`, or set PALIMPSEST_KEYS=off"):
        preflight.require_keys(open_)
    keys.add(tmp_path / "keys.json", "a", EDIT, keep=False)
    preflight.require_keys(open_)
    keys.revoke(tmp_path / "keys.json", "a")
    with pytest.raises(preflight.Unusable):
        preflight.require_keys(open_)
    preflight.require_keys(Settings(state=tmp_path, host=host, keys="off"))  # type: ignore[arg-type]
    preflight.require_keys(Settings(state=tmp_path, host=host, keys=f"a:edit:{KEY}"))  # type: ignore[arg-type]


def test_the_server_is_not_started_beyond_loopback_without_keys(
    command: Callable[..., Result], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "require_free_port", lambda *_: None)
    monkeypatch.setenv("PALIMPSEST_HOST", "0.0.0.0")
    result = CliRunner().invoke(cli.app, ["serve"])
    assert result.exit_code == 1
    assert "there is no key" in result.stderr


def test_the_table_of_models_shows_a_key(
    tmp_path: Path, command: Callable[..., Result], capsys: pytest.CaptureFixture[str]
) -> None:
    """`palimpsest models` sends PALIMPSEST_KEY, and says so where the server asks for one."""
    store = make_store(tmp_path / "store", "sam")
    text, _ = keys.add(store / ".state" / "keys.json", "a", EDIT, keep=False)
    with gateway(FakeTorchServe(), store) as client:

        def answer(request: httpx.Request) -> httpx.Response:
            given = client.request(request.method, str(request.url), headers=dict(request.headers.items()))
            return httpx.Response(given.status_code, content=given.content)

        def show(key: str) -> None:
            transport = httpx.MockTransport(answer)
            with models_table.connection("http://testserver", key, transport=transport) as http:
                models_table.show(http, True, True, Console())

        show(text)
        assert json.loads(capsys.readouterr().out)["models"][0]["name"] == "sam"
        with pytest.raises(PalimpsestError, match="set PALIMPSEST_KEY"):
            show("")
