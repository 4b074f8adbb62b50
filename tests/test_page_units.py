"""The page's history and masks, in the browser that they are written for."""

import base64
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from browsing import chromium
from conftest import encoded, pixels
from fakes import FakeTorchServe, gateway, make_store
from playwright.sync_api import Page, Route

pytestmark = pytest.mark.slow  # a browser is started

SIZE = (60, 83)  # height, width


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page of the gateway's own origin, with its modules as `mask`, `steps` and `png`."""
    store = make_store(tmp_path_factory.mktemp("store"), "sam")
    with gateway(FakeTorchServe(), store) as client, chromium() as browser:

        def answer(route: Route) -> None:
            reply = client.get(route.request.url.removeprefix("http://page.local"))
            headers = {name: value for name, value in reply.headers.items() if name != "content-encoding"}
            route.fulfill(status=reply.status_code, headers=headers, body=reply.content)

        page = browser.new_page()
        page.route("**", answer)
        page.goto("http://page.local/")
        page.evaluate(
            """async () => {
                const folder = new URL(document.querySelector("script[src]").src).href.replace("app.js", "");
                for (const [name, file] of [["mask", "mask"], ["steps", "history"], ["png", "png"]])
                    globalThis[name] = await import(`${folder}${file}.js`);
                globalThis.of = (bits) =>
                    ({height: bits.length, width: bits[0].length, data: Uint8Array.from(bits.flat())});
                globalThis.rows = ({width, data}) => Array.from({length: data.length / width}, (_, y) =>
                    [...data.slice(y * width, (y + 1) * width)]);
            }"""
        )
        yield page


def blobs(seed: int) -> np.ndarray:
    """A mask with grown-together spots, which also touch the edges."""
    noise = np.random.default_rng(seed).random(SIZE).astype(np.float32)
    return (cv2.GaussianBlur(noise, (0, 0), 3) > 0.52).astype(np.uint8)


def on_masks(page: Page, script: str, *masks: np.ndarray, **more: Any) -> np.ndarray:
    """The mask that a script makes of masks `a`, `b`."""
    given = {"masks": [mask.tolist() for mask in masks], **more}
    return np.array(
        page.evaluate(f"(given) => {{ const [a, b] = given.masks.map(of); return rows({script}); }}", given)
    )


def test_the_page_starts_over_plain_http_from_another_machine(page: Page) -> None:
    """Browsers keep part of what scripts may use for https and their own machine."""
    assert not page.evaluate("isSecureContext")
    page.wait_for_selector("html[data-ready]")


# Masks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pixels_", [1, 2, 5, 11])
def test_growing_and_shrinking_by_a_disc(page: Page, seed: int, pixels_: int) -> None:
    mask = blobs(seed)
    across = np.arange(-pixels_, pixels_ + 1)
    disc = (across[:, None] ** 2 + across**2 <= pixels_**2).astype(np.uint8)
    grown = on_masks(page, "mask.grown(a, given.by)", mask, by=pixels_)
    assert (grown == cv2.dilate(mask, disc)).all()
    shrunk = on_masks(page, "mask.grown(a, -given.by)", mask, by=pixels_)
    assert (shrunk == cv2.erode(mask, disc, borderValue=1)).all()


@pytest.mark.parametrize("mask", [*map(blobs, range(3)), np.zeros(SIZE, np.uint8), np.ones(SIZE, np.uint8)])
def test_runs_hold_a_mask_its_area_and_its_bounds(page: Page, mask: np.ndarray) -> None:
    assert (on_masks(page, "mask.fromRuns(mask.runsOf(a), a.width, a.height)", mask) == mask).all()
    told = page.evaluate(
        "(bits) => { const a = of(bits), runs = mask.runsOf(a);"
        " return [mask.areaOf(runs), mask.isEmpty(runs), mask.boundsOf(runs, a.width)]; }",
        mask.tolist(),
    )
    found = np.argwhere(mask)
    (top, left), (bottom, right) = (found.min(0), found.max(0) + 1) if len(found) else ((0, 0), (0, 0))
    box = {"left": left, "top": top, "right": right, "bottom": bottom} if len(found) else None
    assert told == [mask.sum(), not mask.any(), box]


@pytest.mark.parametrize(("height", "width"), [(251, 340), (240, 332), (61, 84), (60, 400), (300, 83)])
@pytest.mark.parametrize("mask", [*map(blobs, range(2)), np.zeros(SIZE, np.uint8), np.ones(SIZE, np.uint8)])
def test_a_mask_of_a_smaller_copy_is_enlarged_with_straight_edges(
    page: Page, mask: np.ndarray, height: int, width: int
) -> None:
    enlarged = "mask.enlarged(a, given.width, given.height, mask.boundsOf(mask.runsOf(a), a.width) ?? given.none)"
    none = {"left": 0, "top": 0, "right": 0, "bottom": 0}
    made = on_masks(page, enlarged, mask, width=width, height=height, none=none)
    expected = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    clear = np.abs(expected - 0.5) > 1e-3
    assert (made[clear] == (expected[clear] > 0.5)).all()


def test_masks_are_added_taken_away_and_inverted(page: Page) -> None:
    a, b = blobs(1), blobs(2)
    assert (on_masks(page, "mask.combine(a, b, 'add')", a, b) == (a | b)).all()
    assert (on_masks(page, "mask.combine(a, b, 'subtract')", a, b) == (a & (1 - b))).all()
    assert (on_masks(page, "mask.inverted(a)", a) == 1 - a).all()


@pytest.mark.parametrize(
    ("start", "end", "radius"), [((10, 12), (60, 40), 6), ((5, 5), (5, 5), 4.5), ((-9, 30), (95, 20), 12)]
)
@pytest.mark.parametrize("value", [0, 1])
def test_a_stroke_marks_what_is_within_its_radius(
    page: Page, start: tuple[int, int], end: tuple[int, int], radius: float, value: int
) -> None:
    mask = blobs(4)
    made = on_masks(
        page, "(mask.stroke(a, given.start, given.end, given.radius, given.value), a)", mask,
        start=start, end=end, radius=radius, value=value,
    )  # fmt: skip
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    way = np.subtract(end, start)
    along = np.clip(((x - start[0]) * way[0] + (y - start[1]) * way[1]) / max(way @ way, 1e-9), 0, 1)
    away = np.hypot(x - start[0] - along * way[0], y - start[1] - along * way[1])
    assert (made == np.where(away <= radius, value, mask)).all()


def test_masks_travel_as_png(page: Page) -> None:
    mask = blobs(5)
    text = page.evaluate(
        """async (bits) => {
            const bytes = new Uint8Array(await (await png.encoded(of(bits))).arrayBuffer());
            return btoa(String.fromCharCode(...bytes));
        }""",
        mask.tolist(),
    )
    assert (pixels(base64.b64decode(text)) == mask.astype(bool)).all()
    found = np.argwhere(mask[10:50, 20:70])
    cropped = np.zeros_like(mask)
    cropped[10:50, 20:70] = mask[10:50, 20:70]
    assert len(found)
    sent = base64.b64encode(encoded(cropped * 255)).decode()
    back = page.evaluate(
        """async ([text, width, height]) => {
            const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
            const bounds = {left: 20, top: 10, right: 70, bottom: 50};
            return rows(await png.decoded(new Blob([bytes], {type: "image/png"}), width, height, bounds));
        }""",
        [sent, SIZE[1], SIZE[0]],
    )
    assert (np.array(back) == cropped).all()


# History


def history(page: Page, script: str) -> Any:
    """What a script leaves in `h`: the states' labels, the index, and whether it can be undone and redone."""
    return page.evaluate(
        f"""() => {{
            let h = steps.empty();
            const push = (label, bytes = 1, ...bounds) => h = steps.push(h, {{label, bytes}}, ...bounds);
            {script};
            return [h.states.map(({{label}}) => label).join(""), h.index, steps.canUndo(h), steps.canRedo(h)];
        }}"""
    )


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("", ["", -1, False, False]),
        ("h = steps.undo(steps.redo(h))", ["", -1, False, False]),
        ("push('a')", ["a", 0, False, False]),
        ("push('a'); push('b'); push('c')", ["abc", 2, True, False]),
        ("push('a'); push('b'); h = steps.undo(h)", ["ab", 0, False, True]),
        ("push('a'); push('b'); h = steps.undo(steps.undo(h))", ["ab", 0, False, True]),
        ("push('a'); push('b'); h = steps.redo(steps.undo(h))", ["ab", 1, True, False]),
        ("push('a'); push('b'); push('c'); h = steps.go(h, 0); push('d')", ["ad", 1, True, False]),
        ("push('a'); h = steps.go(h, 7)", ["a", 0, False, False]),
        ("for (const each of 'abcde') push(each, 1, 3)", ["cde", 2, True, False]),
        ("push('a', 5, 9, 10); push('b', 4, 9, 10); push('c', 3, 9, 10)", ["bc", 1, True, False]),
        ("push('a'); push('b'); h = steps.replaced(h, h.states[0], {label: 'c', bytes: 1})", ["cb", 1, True, False]),
        ("push('a', 5, 9, 10); push('b', 40, 9, 10)", ["b", 0, False, False]),
    ],
)
def test_history(page: Page, script: str, expected: list[Any]) -> None:
    assert history(page, script) == expected


def test_a_history_is_never_changed_itself(page: Page) -> None:
    assert page.evaluate(
        """() => {
            const one = steps.push(steps.empty(), {label: "a", bytes: 1});
            const two = steps.push(one, {label: "b", bytes: 1});
            steps.undo(two);
            return [one.states.length, two.index, steps.current(steps.undo(two)).label];
        }"""
    ) == [1, 1, "a"]
