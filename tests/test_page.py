"""What is served at /, and how: headers, caching, sizes, and that what is vendored is what the manifest says."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient
from serving import ROOT

from serve.gateway import page

WEB = ROOT / "serve" / "gateway" / "web"
FILES = sorted(str(path.relative_to(WEB)) for path in WEB.rglob("*") if path.is_file())


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with gateway(FakeTorchServe(), make_store(tmp_path, "sam")) as running:
        yield running


def address(name: str) -> str:
    return f"/web/{page.page().version}/{name}"


def test_the_page_may_load_nothing_from_elsewhere_and_nothing_inline(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert not re.search(r"unsafe|http|\*", answer.headers["content-security-policy"])
    assert policy["require-trusted-types-for"] == "'script'"
    (inline,) = re.findall(r"<script type=\"importmap\">(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
    assert policy["script-src"] == f"'self' 'sha256-{digest}'"
    assert not re.search(r"<script(?![^>]* src=)(?! type=\"importmap\")|<style| style=| on\w+=|//", answer.text)


def test_every_address_in_the_page_is_there(client: TestClient) -> None:
    found = re.findall(r"web/[^\"]+", client.get("/").text)
    assert len(found) > 5
    assert [each for each in found if client.get(f"/{each}").status_code != 200] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".html")])
def test_a_file_is_kept_for_ever_under_the_hash_of_all(client: TestClient, name: str) -> None:
    answer = client.get(address(name))
    assert answer.content == (WEB / name).read_bytes()
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_modules_have_the_type_that_browsers_ask_for(client: TestClient) -> None:
    kinds = {name: client.get(address(name)).headers["content-type"] for name in ("app.js", "page.css", "icon.svg")}
    assert kinds == {
        "app.js": "text/javascript; charset=utf-8",
        "page.css": "text/css; charset=utf-8",
        "icon.svg": "image/svg+xml; charset=utf-8",
    }


def test_an_old_hash_and_other_files_are_not_there(client: TestClient) -> None:
    for path in (
        "/web/0123456789abcdef/app.js",
        *map(address, ("index.html", "login.html", "../app.py", "%2e%2e/app.py")),
    ):
        assert client.get(path).status_code == 404, path


def test_the_page_itself_is_asked_for_anew_and_sent_when_it_changed(client: TestClient) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert client.get("/", headers={"if-none-match": '"other"'}).status_code == 200


def test_a_client_that_takes_no_gzip_gets_none(client: TestClient) -> None:
    packed = client.get(address("app.js"))
    assert packed.headers["content-encoding"] == "gzip"
    plain = client.get(address("app.js"), headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert (plain.content, plain.headers["vary"]) == (packed.content, "Accept-Encoding")


def test_all_of_it_is_below_300_kb_compressed() -> None:
    code = [WEB / name for name in FILES if not name.startswith("samples/")]
    assert sum(len(gzip.compress(path.read_bytes())) for path in code) < 300_000


def test_modules_stay_below_300_lines() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in WEB.glob("*.js")}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


@pytest.mark.parametrize("folder", [WEB / "vendor", ROOT / "tests" / "data" / "axe"])
def test_what_is_vendored_is_what_npm_had(folder: Path) -> None:
    packages = json.loads((folder / "manifest.json").read_text())
    listed = {name: digest for package in packages for name, digest in package["sha256"].items()}
    there = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert listed == {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in there}
    pinned = json.loads((ROOT / "deploy" / "web" / "package.json").read_text())["devDependencies"]
    assert all(pinned[package["name"]] == package["version"] and package["license"] for package in packages)


def test_every_icon_that_is_used_is_vendored() -> None:
    symbols = set(re.findall(r'symbol id="([\w-]+)"', (WEB / "vendor" / "icons.svg").read_text()))
    used = {
        name
        for path in WEB.glob("*.js")
        for name in re.findall(r'icon(?:\(|: )"([\w-]+)"', path.read_text())
        + re.findall(r'each\("\w+", "([\w-]+)"', path.read_text())
    }
    assert len(used) > 15
    assert used <= symbols
