"""The editing page in a real Chromium: a browser for a run, a tab for a test, and what is often done in one."""

import base64
import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Request, Route, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
SECONDS = 30
# What IndexedDB holds of the page: of each edit its name, its steps' labels and the prompt; and how many files.
KEPT = """async () => {
    const answered = (request) => new Promise((done, failed) => {
        request.onsuccess = () => done(request.result);
        request.onerror = failed;
    });
    const database = await answered(indexedDB.open("palimpsest"));
    const records = database.objectStoreNames.contains("edits")
        ? await answered(database.transaction("edits").objectStore("edits").getAll()) : [];
    database.close();
    const edits = records.filter(({steps}) => steps);
    return [edits.map(({document, steps, typed}) => [document.name, steps.map(({label}) => label), typed.prompt]),
        records.filter((each) => each instanceof Blob).length];
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("the page's tests need a Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES, headless=True)
        yield browser
        browser.close()


class Tab:
    """A page with a new profile. problems: what a user would find in the console, and requests to anywhere else."""

    def __init__(self, browser: Browser, address: str, **context: Any) -> None:
        self.address = address
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(SECONDS * 1000)
        self.problems: list[str] = []
        self.edits: list[dict[str, bytes]] = []
        self.page.on("console", lambda message: self._told(message.type, message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._asked)
        self.page.route(re.compile("/v1/(erase|replace)$"), self.edited)
        self.page.goto(address)
        self.page.wait_for_selector("html[data-ready]")

    def _told(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(text)

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.problems.append(f"foreign request: {request.url}")

    def edited(self, route: Route) -> None:
        """Remembers the fields; of a request that is not intercepted Chromium shows no files."""
        self.edits.append(parts(route.request))
        route.fallback()

    @property
    def masks(self) -> list[np.ndarray]:
        """Of the edits that were asked for."""
        return [np.asarray(Image.open(io.BytesIO(edit["mask"])).convert("L")) > 127 for edit in self.edits]

    def forgive(self) -> None:
        """What Chromium itself says of a status that a test asked for."""
        self.problems[:] = [each for each in self.problems if not each.startswith("Failed to load resource")]

    def get(self, name: str) -> Locator:
        """A button by its name."""
        return self.page.get_by_role("button", name=name, exact=True)

    @property
    def steps(self) -> list[str]:
        return self.page.locator(".strip li button span").all_inner_texts()

    @property
    def step(self) -> int:
        """The one that is shown, from 0."""
        current = self.page.locator(".strip li button").evaluate_all("all => all.map(e => e.ariaCurrent)")
        return int(current.index("step"))

    def until_step(self, label: str, number: int) -> None:
        """Waits until the step of that number, from 1, is there and shown."""
        self.page.wait_for_selector(f'.strip button[aria-current="step"][aria-label="Step {number}: {label}"]')

    def open(self, name: str, data: bytes, kind: str = "image/png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})
        self.page.wait_for_selector(".tools")
        self.until_step("Opened", 1)

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what no selector shows; meanwhile routes are answered."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, "it did not come true in time"
            self.page.wait_for_timeout(20)

    def kept(self) -> tuple[list[tuple[str, list[str], str]], int]:
        """What the browser has written down: of each edit name, steps and prompt; and how many files."""
        edits, files = self.page.evaluate(KEPT)
        return [(name, steps, prompt) for name, steps, prompt in edits], files

    def until_kept(self, steps: list[str], prompt: str = "") -> None:
        """Waits until the browser has written down that edit."""
        self.until(lambda: any(kept[1:] == (steps, prompt) for kept in self.kept()[0]))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the picture, which is shown as a whole, lies in the window."""
        canvas = self.page.locator("#canvas").bounding_box()
        assert canvas is not None
        width, height = map(int, re.findall(r"\d+", self.page.locator(".name span").inner_text()))
        scale = min((canvas["width"] - 48) / width, (canvas["height"] - 48) / height, 4)
        left = canvas["x"] + (canvas["width"] - width * scale) / 2
        top = canvas["y"] + (canvas["height"] - height * scale) / 2
        return left + (x + 0.5) * scale, top + (y + 0.5) * scale

    def click(self, x: float, y: float, keys: str = "") -> None:
        """On a point of the picture. keys: held down meanwhile."""
        if keys:
            self.page.keyboard.down(keys)
        self.page.mouse.click(*self.at(x, y))
        if keys:
            self.page.keyboard.up(keys)

    def drag(self, *points: tuple[float, float]) -> None:
        """From a point of the picture over others to the last."""
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point), steps=4)
        self.page.mouse.up()

    def seen(self) -> np.ndarray:
        """The canvas, once it is drawn; the pointer is elsewhere."""
        self.page.mouse.move(640, 2)
        self.page.evaluate(
            "new Promise(done => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done)), 60))"
        )
        text = self.page.evaluate("document.querySelector('#canvas').toDataURL()")
        return pixels_of(text)

    def download(self) -> tuple[str, bytes]:
        with self.page.expect_download() as started:
            self.get("Download").click()
        return started.value.suggested_filename, started.value.path().read_bytes()


def pixels_of(data_uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_uri.partition(",")[2]))))


def parts(request: Request) -> dict[str, bytes]:
    """The multipart fields of a request."""
    head = b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n"
    message = BytesParser().parsebytes(head + (request.post_data_buffer or b""))
    return {
        str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
        for part in message.get_payload()
    }  # type: ignore[union-attr, misc]
