"""The client's wheel in an environment that has nothing else: small, without torch, and it works."""

import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import encoded
from connecting import events
from serving import ROOT
from test_wheel import build_client

pytestmark = pytest.mark.slow

PICTURE = encoded(np.zeros((9, 9, 3), np.uint8))
RESULT = encoded(np.ones((9, 9, 3), np.uint8))
MOST_BYTES = 30_000_000


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and all that it depends on, from the package index."""
    folder = tmp_path_factory.mktemp("client-wheel")
    # Without their hashes, which would be asked of the client's wheel as well.
    versions = folder / "versions.txt"
    versions.write_text("\n".join(re.findall(r"^\S+==\S+", (ROOT / "requirements.lock").read_text(), re.M)))
    download(folder, build_client(folder), "--constraint", versions)
    return folder


@pytest.fixture(scope="module")
def environment(wheels: Path) -> Path:
    """The folder of its commands."""
    folder = wheels / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "--no-index"]
    subprocess.run([*install, "--find-links", wheels, "palimpsest-editing-client"], check=True, timeout=240)
    return python.parent


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that makes RESULT of every picture."""
    picture = base64.b64encode(RESULT).decode()
    told = events(("job", {"job": "j"}), ("done", {"picture": picture, "warnings": [], "timings": {}})).content

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def download(folder: Path, *what: object) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--dest", folder, *what]
    subprocess.run(command, check=True, timeout=240)


def size(wheels: Iterable[Path]) -> int:
    return sum(wheel.stat().st_size for wheel in wheels)


def run(*command: object, **environ: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env={"LANG": "C.UTF-8", **environ})


def test_with_all_that_it_needs_it_is_small(wheels: Path) -> None:
    names = [wheel.name for wheel in wheels.glob("*.whl")]
    assert not [name for name in names if name.startswith(("torch", "fastapi"))]
    assert size(wheels.glob("*.whl")) < MOST_BYTES, names


def test_elsewhere_it_is_small_too(wheels: Path, tmp_path: Path) -> None:
    """All that it needs is there for Windows and macOS; what is Python alone is the same."""
    compiled = [wheel for wheel in wheels.glob("*.whl") if not wheel.name.endswith("-none-any.whl")]
    versions = ["==".join(wheel.name.split("-")[:2]) for wheel in compiled]
    folders = {platform: tmp_path / platform for platform in ("win_amd64", "macosx_14_0_arm64")}
    with ThreadPoolExecutor() as pool:
        for platform, folder in folders.items():
            pool.submit(download, folder, "--no-deps", "--platform", platform, *versions)
    for folder in folders.values():
        there = set(folder.iterdir())
        assert len(there) == len(compiled) > 0
        assert size(set(wheels.glob("*.whl")) - set(compiled) | there) < MOST_BYTES


def test_it_is_imported_without_torch_and_the_command_has_no_servers_commands(environment: Path) -> None:
    script = """
import importlib.util, sys
import palimpsest.cli
assert not {"numpy", "PIL", "httpx", "anyio"} & sys.modules.keys()  # `palimpsest serve` does not wait for them
assert palimpsest.Client and palimpsest.AsyncClient
assert all(importlib.util.find_spec(name) is None for name in ("torch", "fastapi", "serve", "contract", "handlers"))
"""
    imported = run(environment / "python", "-I", "-c", script)
    assert imported.returncode == 0, imported.stderr
    shown = run(environment / "palimpsest", "--help").stdout
    assert [name in shown for name in ("segment", "erase", "replace", "archives")] == [True, True, True, False]


def test_what_needs_the_extra_says_so(environment: Path) -> None:
    failed = run(environment / "palimpsest", "mcp", TERMINAL_WIDTH="200")
    assert failed.returncode == 2
    assert "pip install mcp" in failed.stderr


def test_its_types_are_there_for_checkers(environment: Path) -> None:
    (package,) = environment.parent.glob("lib/python*/site-packages/palimpsest")
    assert (package / "py.typed").exists()


def test_the_shell_completes_it(environment: Path) -> None:
    assert "complete" in run(environment / "palimpsest", _PALIMPSEST_COMPLETE="source_bash").stdout
    words = {"COMP_WORDS": "palimpsest se", "COMP_CWORD": "1", "_PALIMPSEST_COMPLETE": "complete_bash"}
    assert run(environment / "palimpsest", **words).stdout.split() == ["segment"]


def test_it_erases(environment: Path, server: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(PICTURE)
    command = [environment / "palimpsest", "erase", tmp_path / "in", "-o", tmp_path / "out", "--at", "3,4", "--json"]
    done = run(*command, "--server", server)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"]["done"] == 2
    assert [(tmp_path / "out" / name).read_bytes() for name in ("a.png", "b.png")] == [RESULT] * 2
