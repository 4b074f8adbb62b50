"""Where checkpoints come from: a local folder, the Hugging Face cache, an HTTP server on the loopback interface."""

import fcntl
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from serve.archives.weights import (
    File,
    NotAvailable,
    Published,
    SearchFolders,
    WrongFile,
    missing_report,
    obtain,
    read_weights,
)
from serve.descriptions import HANDLERS, descriptions

CONTENT = bytes(range(256)) * 4096  # one MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class FileServer:
    """files: what it serves. drops: after how many bytes each next answer breaks off. ranges: what was asked for."""

    url: str
    files: dict[str, bytes]
    drops: list[int] = field(default_factory=list)
    resumes: bool = True
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            if self.path.lstrip("/") in state.files:
                state.ranges.append(asked)
            content = state.files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.resumes else 0
            if start and start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            body = content[start:]
            self.wfile.write(body[: state.drops.pop(0)] if state.drops else body)

        def do_HEAD(self) -> None:
            """As the hub answers, whose library asks for size and hash first."""
            content = state.files.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            for name, value in (
                ("Content-Length", len(content)), ("ETag", '"' + hashlib.sha256(content).hexdigest() + '"'),
                ("X-Repo-Commit", "0" * 40), ("Accept-Ranges", "bytes"),
            ):  # fmt: skip
                self.send_header(name, str(value))
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state = FileServer(f"http://127.0.0.1:{http.server_address[1]}", {"model.pth": CONTENT})
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache instead of this user's."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def folders(tmp_path: Path) -> SearchFolders:
    return SearchFolders(tmp_path / "downloads")


def silent(what: str, total: int | None) -> nullcontext:
    return nullcontext(lambda done: None)


def pth(url: str | None, **changes: object) -> File:
    file = File("model.pth", "model.pth", url, None, None, len(CONTENT), SHA256)
    return replace(file, **changes)


def weights(*sources: tuple[File, ...]) -> Published:
    return Published("tiny", "tiny", "sam", "Apache-2.0", sources)


def fetch(file: File, folders: SearchFolders) -> Path:
    return obtain(weights((file,)), folders, silent)[file]


def test_a_dropped_download_goes_on_where_it_broke_off(server: FileServer, folders: SearchFolders) -> None:
    server.drops = [300_000, 200_000]
    path = fetch(pth(f"{server.url}/model.pth"), folders)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_the_next_run_goes_on_with_what_the_last_one_left(server: FileServer, folders: SearchFolders) -> None:
    part = folders.downloads / "model.pth.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:123_456])
    assert fetch(pth(f"{server.url}/model.pth"), folders).read_bytes() == CONTENT
    assert server.ranges == ["bytes=123456-"]
    assert not part.exists()


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_whole_part_needs_no_more_bytes(server: FileServer, folders: SearchFolders, size: int | None) -> None:
    (folders.downloads).mkdir()
    (folders.downloads / "model.pth.part").write_bytes(CONTENT)
    assert fetch(pth(f"{server.url}/model.pth", bytes=size), folders).read_bytes() == CONTENT


@pytest.mark.slow
@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_part_longer_than_the_file_starts_afresh(
    server: FileServer, folders: SearchFolders, size: int | None
) -> None:
    (folders.downloads).mkdir()
    (folders.downloads / "model.pth.part").write_bytes(CONTENT + b"more")
    assert fetch(pth(f"{server.url}/model.pth", bytes=size), folders).read_bytes() == CONTENT


def test_a_server_that_cannot_resume_sends_it_all_again(server: FileServer, folders: SearchFolders) -> None:
    server.resumes = False
    server.drops = [300_000]
    assert fetch(pth(f"{server.url}/model.pth"), folders).read_bytes() == CONTENT


def test_a_finished_download_is_not_fetched_again(server: FileServer, folders: SearchFolders) -> None:
    fetch(pth(f"{server.url}/model.pth"), folders)
    fetch(pth(f"{server.url}/model.pth"), folders)
    assert len(server.ranges) == 1


def test_a_download_with_the_wrong_hash_is_kept_aside_and_the_next_try_starts_afresh(
    server: FileServer, folders: SearchFolders
) -> None:
    bad = b"x" * len(CONTENT)
    server.files["model.pth"] = bad
    with pytest.raises(WrongFile, match=r"model\.pth") as caught:
        fetch(pth(f"{server.url}/model.pth"), folders)
    assert SHA256 in str(caught.value)
    assert hashlib.sha256(bad).hexdigest() in str(caught.value)
    assert (folders.downloads / "model.pth.corrupt").read_bytes() == bad

    server.files["model.pth"] = CONTENT
    assert fetch(pth(f"{server.url}/model.pth"), folders).read_bytes() == CONTENT
    assert server.ranges == [None, None]


def test_a_server_that_never_ends_is_left(server: FileServer, folders: SearchFolders) -> None:
    server.files["model.pth"] = CONTENT + b"more"
    with pytest.raises(NotAvailable) as caught:
        fetch(pth(f"{server.url}/model.pth"), folders)
    assert "more than the 1,048,576 bytes" in caught.value.missing[0][1]


def test_two_builds_do_not_write_one_part(server: FileServer, folders: SearchFolders) -> None:
    part = folders.downloads / "model.pth.part"
    part.parent.mkdir()
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(NotAvailable) as caught:
            fetch(pth(f"{server.url}/model.pth"), folders)
    assert "another build is downloading" in caught.value.missing[0][1]
    assert server.ranges == []


def test_a_users_file_with_the_wrong_hash_is_an_error_and_stays(
    server: FileServer, folders: SearchFolders, tmp_path: Path
) -> None:
    (tmp_path / "given").mkdir()
    mine = tmp_path / "given" / "model.pth"
    mine.write_bytes(b"mine")
    with pytest.raises(WrongFile) as caught:
        fetch(pth(f"{server.url}/model.pth"), replace(folders, given=mine.parent))
    for part in (str(mine), SHA256, hashlib.sha256(b"mine").hexdigest()):
        assert part in str(caught.value)
    assert mine.read_bytes() == b"mine"
    assert server.ranges == []


@pytest.mark.parametrize(
    "where", ["mirror/big/models/best.ckpt", "big/models/best.ckpt", "models/best.ckpt", "best.ckpt"]
)
def test_a_given_folder_may_hold_the_repository_or_a_part_of_it(
    folders: SearchFolders, tmp_path: Path, where: str
) -> None:
    path = tmp_path / "given" / where
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    file = File("big/models/best.ckpt", "best.ckpt", None, "someone/mirror", "main", len(CONTENT), SHA256)
    assert fetch(file, replace(folders, given=tmp_path / "given")) == path


def test_a_name_that_two_files_share_is_not_enough(folders: SearchFolders, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    files = tuple(File(f"{part}/config.json", f"{part}/config.json", None, None, None) for part in ("unet", "vae"))
    with pytest.raises(NotAvailable):
        obtain(weights(files), replace(folders, given=tmp_path), silent)


def test_the_hugging_face_cache_is_looked_up(folders: SearchFolders, hub_cache: Path) -> None:
    revision = "5f74973cbb64c8568780732c17f43eb269d63a0d"
    cached = hub_cache / "models--someone--mirror" / "snapshots" / revision / "unet" / "model.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT)
    file = File("unet/model.pth", "model.pth", None, "someone/mirror", revision, len(CONTENT), SHA256)
    assert fetch(file, folders) == cached


def test_a_source_that_is_here_is_preferred_to_one_that_must_be_downloaded(
    server: FileServer, folders: SearchFolders, tmp_path: Path
) -> None:
    (tmp_path / "other.pth").write_bytes(CONTENT)
    here = pth(None, path="other.pth")
    found = obtain(weights((pth(f"{server.url}/model.pth"),), (here,)), replace(folders, given=tmp_path), silent)
    assert found == {here: tmp_path / "other.pth"}
    assert server.ranges == []


def test_the_next_source_is_taken_where_one_can_not_be_had(server: FileServer, folders: SearchFolders) -> None:
    second = pth(f"{server.url}/model.pth")
    found = obtain(weights((pth(f"{server.url}/gone.pth", path="gone.pth"),), (second,)), folders, silent)
    assert list(found) == [second]


def test_an_optional_file_may_be_absent(server: FileServer, folders: SearchFolders) -> None:
    file = pth(f"{server.url}/model.pth")
    extra = File("extra.json", "extra.json", f"{server.url}/extra.json", None, None, optional=True)
    assert list(obtain(weights((file, extra)), folders, silent)) == [file]
    server.files["extra.json"] = b"{}"
    assert list(obtain(weights((file, extra)), folders, silent)) == [file, extra]


def test_an_error_page_does_not_pass_for_a_config(server: FileServer, folders: SearchFolders) -> None:
    server.files["config.json"] = b"<html>Please log in</html>"
    with pytest.raises(WrongFile, match=r"config\.json is not a \.json text file"):
        fetch(File("config.json", "config.json", f"{server.url}/config.json", None, None), folders)


def test_what_is_missing_is_reported_with_commands_that_bring_it(
    server: FileServer, folders: SearchFolders, tmp_path: Path
) -> None:
    """The commands are run as printed, and the build then finds what they brought."""
    file = pth(f"{server.url}/model.pth")
    unreachable = weights((replace(file, url="http://127.0.0.1:9/model.pth"),))
    with pytest.raises(NotAvailable) as caught:
        obtain(unreachable, folders, silent)
    target = tmp_path / "my checkpoints"
    report = missing_report([caught.value], target, ["palimpsest", "archives", "build"])
    for expected in ("tiny", "Apache-2.0", "model.pth", "1,048,576 bytes", SHA256, "refused"):
        assert expected in report
    assert f"palimpsest archives build --from {shlex.quote(str(target))} tiny" in report

    (curl,) = re.findall(r"^ +(curl .*)$", report, re.MULTILINE)
    curl = curl.replace("http://127.0.0.1:9", server.url)
    subprocess.run(curl, shell=True, check=True, capture_output=True, timeout=30)
    assert fetch(file, replace(folders, given=target)) == target / "model.pth"


def test_all_missing_archives_are_in_one_report(folders: SearchFolders) -> None:
    failures = []
    for name in ("first", "second"):
        with pytest.raises(NotAvailable) as caught:
            obtain(replace(weights((pth(None, path=f"{name}.pth"),)), name=name), folders, silent)
        failures.append(caught.value)
    report = missing_report(failures, Path("checkpoints"), ["palimpsest", "archives", "build"])
    assert "first.pth" in report
    assert "second.pth" in report
    assert report.endswith("palimpsest archives build --from checkpoints first second")


@pytest.mark.parametrize("name", read_weights())
def test_weights_toml_holds_together(name: str) -> None:
    stanza = read_weights()[name]
    assert any(stanza.convert in model.converters for model in descriptions().values())
    assert stanza.handler in descriptions()
    assert all((HANDLERS / stanza.handler / config).is_file() for config in stanza.configs.values())
    for source in stanza.sources:
        assert any(file.sha256 for file in source)
        for file in source:
            assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            assert file.sha256 or Path(file.path).suffix in {".json", ".txt", ".yaml"}


def test_an_unknown_key_in_weights_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "weights.toml").write_text('[x]\nhandlr = "sam"\nconvert = "sam"\nlicence = "?"\nsources = []\n')
    with pytest.raises(TypeError, match="handlr"):
        read_weights(tmp_path / "weights.toml")


# The hub


FROM_HUB = """
import json, sys
from contextlib import nullcontext
from pathlib import Path
from serve.archives.weights import File, Published, SearchFolders, obtain

told = []
file = File("unet/w.bin", "w.bin", None, "org/tiny", "main", *json.loads(sys.argv[2]))
published = Published("tiny", "tiny", "sam", "Apache-2.0", ((file,),))
found = obtain(published, SearchFolders(Path(sys.argv[1])), lambda what, total: nullcontext(told.append))
print(json.dumps([str(found[file]), sum(told)]))
"""


def from_hub(server: FileServer, folder: Path, *record: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the library reads its endpoint when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", FROM_HUB, str(folder), json.dumps(record)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_a_file_of_the_hub_comes_by_the_hubs_own_library(server: FileServer, tmp_path: Path) -> None:
    server.files["org/tiny/resolve/main/unet/w.bin"] = CONTENT
    server.drops = [300_000]
    done = from_hub(server, tmp_path, len(CONTENT), SHA256)
    assert done.returncode == 0, done.stderr
    path, told = json.loads(done.stdout)
    assert Path(path) == tmp_path / "tiny" / "unet" / "w.bin"
    assert Path(path).read_bytes() == CONTENT
    assert told == 2 * len(CONTENT)  # fetched, then verified
    assert len(server.ranges) == 2


@pytest.mark.slow
def test_what_the_hub_lacks_or_has_too_much_of_is_not_had(server: FileServer, tmp_path: Path) -> None:
    lacking = from_hub(server, tmp_path, len(CONTENT), SHA256)
    assert "NotAvailable" in lacking.stderr
    server.files["org/tiny/resolve/main/unet/w.bin"] = CONTENT + b"more"
    large = from_hub(server, tmp_path, len(CONTENT), SHA256)
    assert "NotAvailable" in large.stderr
    assert server.ranges == []
