"""Pages of other sites: those that are named may use the server, in a browser, and no other may."""

import http.server
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import door
import pytest
from browsing import chromium
from fakes import FakeTorchServe, gateway, make_store
from fastapi.testclient import TestClient
from playwright.sync_api import Page

from serve import preflight
from serve.gateway.access import keys
from serve.gateway.access.keys import Scope
from serve.gateway.origins import origins
from serve.settings import Settings

STUDIO, STRANGER = "https://studio.example.org", "https://studio.example.org.evil.example"
NAMED = f" {STUDIO}:443/ ,http://LOCALHOST:3000"
NOBODY = ("null", "", "*", f"{STUDIO}:8443", "http://studio.example.org", "https://x.studio.example.org", STRANGER)
SITES = ("cross-site", "same-site", None)


@pytest.fixture(scope="module")
def key_and_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, TestClient]]:
    folder = tmp_path_factory.mktemp("origins")
    key, _ = keys.add(folder / "keys.json", "studio", [Scope.EDIT], keep=False)
    with gateway(FakeTorchServe(), make_store(folder, "sam"), origins=NAMED, keys_file=folder / "keys.json") as client:
        yield key, client


def test_only_a_named_site_may_read_and_change(key_and_client: tuple[str, TestClient]) -> None:
    key, client = key_and_client
    for origin, site in itertools.product((STUDIO, "http://localhost:3000", *NOBODY), SITES):
        named = origin not in NOBODY
        headers = {"origin": origin} | ({"sec-fetch-site": site} if site else {})
        shown = headers | {"authorization": f"Bearer {key}"}
        answers = {
            200 if named else 403: client.post("/predictions/sam", headers=shown),
            201 if named else 403: client.post("/v1/images", headers=shown, content=PNG),
            401 if named else 403: client.post("/predictions/sam", headers=headers),
            404: client.get("/nowhere", headers=shown),
        }
        for status, answer in answers.items():
            assert answer.status_code == status, (origin, site, answer.text)
            assert answer.headers.get("access-control-allow-origin") == (origin if named else None)
            assert "access-control-allow-credentials" not in answer.headers
            assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH"])
def test_what_browsers_ask_beforehand_needs_no_key(key_and_client: tuple[str, TestClient], method: str) -> None:
    asked = {"access-control-request-method": method, "access-control-request-headers": "authorization,content-type"}
    for path, origin in itertools.product(("/v1/segment", "/predictions/sam", "/models/sam"), (STUDIO, *NOBODY)):
        answer = key_and_client[1].options(path, headers=asked | {"origin": origin})
        if origin == STUDIO:
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin
            assert method in answer.headers["access-control-allow-methods"]
            assert "authorization" in answer.headers["access-control-allow-headers"]
        else:
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "text", ["*", "null", "studio.example.org", "ftp://a", "https://a/b", "https://", "https://a:b"]
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(preflight.Unusable, match=r"PALIMPSEST_ORIGINS.*is no origin"):
        preflight.require_origins(Settings(origins=f"{STUDIO},{text}"))


def test_origins_are_as_browsers_write_them() -> None:
    assert origins(NAMED) == {STUDIO, "http://localhost:3000"}
    assert origins("http://[::1]:80") == {"http://[::1]"}
    assert origins(" , ") == frozenset()


@pytest.mark.slow
def test_a_browser_lets_a_named_sites_page_work(tmp_path: Path) -> None:
    """Both pages upload with a header that browsers ask for beforehand, and read a header of the answer."""
    store = make_store(tmp_path, "sam")
    with _site() as port, chromium() as browser:
        named, other = f"http://localhost:{port}", f"http://127.0.0.1:{port}"
        with door.serving(FakeTorchServe(), store, origins=named) as running:
            assert _upload(browser.new_page(), named, running.port) == [201, "a-page"]
            assert _upload(browser.new_page(), other, running.port) == ["TypeError", ""]


@contextmanager
def _site() -> Iterator[int]:
    """A site of one page; its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _OnePage) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class _OnePage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<p>a page</p>")

    def log_message(self, *_: object) -> None:
        pass


def _upload(page: Page, site: str, port: int) -> list[object]:
    """From a page of the site: the answer's status and request id, or what fetch threw."""
    page.goto(site)
    answer = page.evaluate(
        """async ([url, picture]) => {
            const headers = {"content-type": "image/png", "x-request-id": "a-page"};
            try {
                const body = Uint8Array.from(picture);
                const answer = await fetch(url, {method: "POST", headers, body});
                return [answer.status, answer.headers.get("x-request-id")];
            } catch (error) { return [error.name, ""]; }
        }""",
        [f"http://127.0.0.1:{port}/v1/images", list(PNG)],
    )
    assert isinstance(answer, list)
    return answer


PNG = (Path(__file__).parent / "data" / "dog-on-bench.png").read_bytes()
