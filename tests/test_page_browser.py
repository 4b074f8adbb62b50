"""The editing page in a real Chromium, before the demo models in a real TorchServe."""

import base64
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import Tab, chromium, parts
from conftest import DATA, encoded, pixels
from PIL import Image, ImageCms
from playwright.sync_api import Browser, Route
from serving import ROOT, Server, serving

pytestmark = pytest.mark.torchserve

DOG = (750, 500)
MakeTab = Callable[..., Tab]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory, demo_store: Path) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page"), demo_store) as running:
        yield running


@pytest.fixture
def make_tab(server: Server, browser: Browser) -> Iterator[MakeTab]:
    """Each tab must end without a word in the console and without a request to anywhere else."""
    tabs: list[Tab] = []

    def make(**context: Any) -> Tab:
        tabs.append(Tab(browser, f"http://127.0.0.1:{server.port}/", **context))
        return tabs[-1]

    yield make
    problems = [problem for tab in tabs for problem in tab.problems]
    for tab in tabs:
        tab.context.close()
    assert problems == []


@pytest.fixture
def tab(make_tab: MakeTab) -> Tab:
    return make_tab()


def select_dog(tab: Tab, dog: bytes) -> None:
    tab.open("dog-on-bench.png", dog)
    tab.click(*DOG)
    tab.until_step("Select", 2)


# The article's two uses


def test_a_click_and_erase_and_the_download_differs_in_the_mask_alone(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.get("Erase").click()
    tab.until_step("Erase", 3)
    name, data = tab.download()
    assert name == "dog-on-bench-edited.png"
    before, after, (mask, *_) = pixels(dog), pixels(data), tab.masks
    assert mask[DOG[1], DOG[0]]
    assert (before[~mask] == after[~mask]).all()
    assert (before[mask] != after[mask]).any()


def test_a_prompt_and_variants_of_which_one_is_kept_in_the_inputs_format(tab: Tab) -> None:
    photograph = (ROOT / "serve/gateway/web/samples/fig.jpg").read_bytes()
    tab.get("A fig in a bowl").click()
    tab.until_step("Opened", 1)
    tab.drag((600, 250), (1130, 780))
    tab.until_step("Box", 2)
    tab.page.get_by_label("What should be there instead").fill("a green ball")
    tab.page.get_by_label("Variants").select_option("2")
    tab.get("Replace").click()
    tab.get("Keep variant 2").click()
    tab.until_step("Replace: a green ball", 3)
    name, data = tab.download()
    assert (name, data[:3]) == ("fig-edited.jpg", b"\xff\xd8\xff")
    changed = np.abs(pixels(photograph).astype(int) - pixels(data)).max(axis=2)
    mask = tab.masks[0]
    assert changed[mask].mean() > 20 > 10 * changed[~mask].mean()


def test_a_download_has_the_metadata_of_what_was_opened(tab: Tab, dog: bytes) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x8298] = "A camera", "A photographer"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photograph = encoded(pixels(dog), "JPEG", quality=92, exif=exif.tobytes(), icc_profile=profile, dpi=(300, 300))
    tab.open("dog.jpg", photograph, "image/jpeg")
    tab.click(*DOG)
    tab.until_step("Select", 2)
    tab.page.get_by_label("Feather").fill("12")
    tab.get("Erase").click()
    tab.until_step("Erase", 3)
    name, data = tab.download()
    kept = Image.open(io.BytesIO(data))
    assert (name, kept.format, kept.info["dpi"]) == ("dog-edited.jpg", "JPEG", (300, 300))
    assert kept.info["icc_profile"] == profile
    assert dict(kept.getexif()).items() >= dict(exif).items()
    assert tab.edits[0]["feather"] == b"12"


def test_the_other_uses_of_a_click(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    masks = [erased_mask(tab)]
    tab.click(420, 480, "Shift")
    tab.until_step("Add", 3)
    masks.append(erased_mask(tab))
    tab.click(*DOG, keys="Alt")
    tab.until_step("Take away", 4)
    masks.append(erased_mask(tab))
    assert (masks[1] >= masks[0]).all()
    assert masks[1].sum() > masks[0].sum()
    assert not masks[2][DOG[1], DOG[0]]
    tab.page.keyboard.press("2")
    tab.until_step("Candidate 2", 5)
    assert not (erased_mask(tab) == masks[2]).all()


def erased_mask(tab: Tab) -> np.ndarray:
    """What Erase would send now; the server is not asked."""
    sent = len(tab.edits)
    tab.page.route("**/v1/erase", lambda route: route.fulfill(status=499, json=CANCELLED))
    tab.page.route("**/v1/erase", tab.edited)
    tab.get("Erase").click()
    tab.until(lambda: len(tab.edits) > sent)
    tab.page.wait_for_selector(".row.edit")
    tab.page.unroute("**/v1/erase")
    tab.forgive()
    return tab.masks[-1]


CANCELLED = {"error": {"code": "cancelled", "message": "the job was cancelled"}}


def test_hovering_shows_what_a_click_would_select(tab: Tab, dog: bytes) -> None:
    tab.open("dog.png", dog)
    plain = tab.seen()

    def is_shown() -> bool:
        for x in (DOG[0], DOG[0] + 3):  # moves before the model has seen the picture ask nothing
            tab.page.mouse.move(*tab.at(x, DOG[1]))
        shown = pixels(tab.page.locator("#canvas").screenshot())
        return bool(shown[..., :3].astype(int).sum() > plain[..., :3].astype(int).sum())

    tab.until(is_shown)
    tab.page.mouse.move(640, 2)
    assert (tab.seen() == plain).all()


def test_of_many_moves_the_last_is_asked_for_and_older_questions_are_dropped(tab: Tab, dog: bytes) -> None:
    held: list[Route] = []

    def hold(route: Route) -> None:
        if "hover" in parts(route.request):
            held.append(route)
        else:
            route.continue_()

    def is_first_held() -> bool:
        for x in (300, 303):  # moves before the model has seen the picture ask nothing
            tab.page.mouse.move(*tab.at(x, 300))
        return len(held) == 1

    tab.page.route("**/v1/segment", hold)
    tab.open("dog.png", dog)
    tab.until(is_first_held)
    for number in range(20):
        tab.page.mouse.move(*tab.at(400 + 10 * number, 500))
    held[0].continue_()
    tab.until(lambda: len(held) == 2)
    with tab.page.expect_response("**/v1/segment"):
        held[1].continue_()
    asked = [parts(route.request) for route in held]
    assert json.loads(asked[1]["points"]) == [[590, 500]]
    assert len({each["hover"] for each in asked}) == 1  # by which the server drops what it has not begun


def test_without_keys_buttons_say_that_a_click_adds_or_takes_away(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.get("Add to the mask").click()
    tab.click(420, 480)
    tab.until_step("Add", 3)
    tab.get("Take away from the mask").click()
    tab.click(*DOG)
    tab.until_step("Take away", 4)
    tab.get("Take away from the mask").click()
    tab.click(*DOG)
    tab.until_step("Select", 5)


def test_pictures_are_dropped_pasted_and_copied(tab: Tab, dog: bytes) -> None:
    send = """async ([text, event, name]) => {
        const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
        const carried = new DataTransfer();
        carried.items.add(new File([bytes], name, {type: "image/png"}));
        const given = event === "drop" ? {dataTransfer: carried} : {clipboardData: carried};
        dispatchEvent(new (event === "drop" ? DragEvent : ClipboardEvent)(event, given));
    }"""
    small = base64.b64encode(encoded(pixels(dog)[300:500, 500:800])).decode()
    for event in ("drop", "paste"):
        tab.page.evaluate(send, [small, event, f"{event}.png"])
        tab.page.wait_for_selector(f"text={event}.png")
        assert tab.steps == ["Opened"]
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.get("Copy").click()
    tab.page.wait_for_selector("text=Copied.")
    size = tab.page.evaluate(
        """async () => {
            const [item] = await navigator.clipboard.read();
            const {width, height} = await createImageBitmap(await item.getType("image/png"));
            return [width, height];
        }"""
    )
    assert size == [300, 200]


def test_another_tab_goes_on_with_what_was_kept(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    before = tab.seen()
    tab.until_kept(["Opened", "Select"])
    tab.page.close()
    tab.page = tab.context.new_page()
    tab.page.goto(tab.address)
    tab.page.get_by_role("button", name="Go on with dog-on-bench.png").click()
    tab.until_step("Select", 2)
    assert np.abs(tab.seen().astype(int) - before).max() <= 2


def test_of_many_tabs_the_edits_of_the_last_three_are_kept(tab: Tab, dog: bytes) -> None:
    for name in ("first.png", "second.png", "third.png", "fourth.png"):
        tab.page.close()
        tab.page = tab.context.new_page()
        tab.page.goto(tab.address)
        tab.page.wait_for_selector("html[data-ready]")
        tab.open(name, dog)
        tab.page.get_by_label("What should be there instead").fill(name)
        tab.until_kept(["Opened"], name)
    last = ["fourth.png", "second.png", "third.png"]
    tab.until(lambda: (sorted(name for name, *_ in tab.kept()[0]), tab.kept()[1]) == (last, 3))


def test_a_corner_says_where_the_models_are_and_that_these_are_small_ones(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.page.locator(".corner summary").click()
    told = tab.page.locator(".corner").inner_text()
    assert re.search(r"Select sam\s+in memory", told)
    assert "palimpsest archives build --models full" in told


# History


def test_every_step_can_be_undone_redone_and_gone_back_to(tab: Tab, dog: bytes) -> None:
    tab.open("dog.png", dog)
    seen = [tab.seen()]

    def step(label: str) -> None:
        tab.until_step(label, len(seen) + 1)
        seen.append(tab.seen())

    tab.click(*DOG)
    step("Select")
    tab.page.keyboard.press("b")
    tab.drag((200, 200), (400, 300))
    step("Brush")
    tab.page.keyboard.press("e")
    tab.drag((300, 200), (300, 320))
    step("Eraser")
    tab.page.keyboard.press("v")
    for button in ("Grow", "Shrink", "Invert", "Erase"):
        tab.get(button).click()
        step(button)
    tab.page.keyboard.press("i")
    step("Invert")
    tab.get("Clear the mask").click()
    step("Clear")
    last = len(seen) - 1
    for index in range(last - 1, -1, -1):
        tab.get("Undo").click()
        assert tab.step == index
        assert np.abs(tab.seen().astype(int) - seen[index]).max() <= 2, index
    for index in range(1, last + 1):
        tab.page.keyboard.press("Control+Shift+z")
        assert tab.step == index
        assert np.abs(tab.seen().astype(int) - seen[index]).max() <= 2, index
    tab.get("Step 3: Brush").click()
    assert np.abs(tab.seen().astype(int) - seen[2]).max() <= 2
    tab.get("Invert").click()
    assert tab.steps == ["Opened", "Select", "Brush", "Invert"]


# Long work


def test_a_replacement_tells_its_steps_can_be_cancelled_and_blocks_nothing(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.page.get_by_label("What should be there instead").fill("a red box")
    tab.page.get_by_label("Variants").select_option("4")
    tab.get("Replace").click()
    tab.page.wait_for_selector("text=/step [0-9]+ of [0-9]+/")
    tab.get("Grow").click()
    tab.until_step("Grow", 3)
    tab.get("Cancel").click()
    tab.page.wait_for_selector(".row.edit")
    assert tab.steps == ["Opened", "Select", "Grow"]
    tab.get("Erase").click()
    tab.until_step("Erase", 4)


def test_a_reload_amid_the_work_loses_no_step(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.get("Erase").click()
    tab.until_step("Erase", 3)
    tab.drag((350, 300), (560, 560))
    tab.until_step("Box", 4)
    tab.get("Undo").click()
    before = tab.seen()
    tab.page.get_by_label("What should be there instead").fill("a red box")
    tab.get("Redo").click()
    tab.get("Replace").click()
    tab.page.wait_for_selector(".progress")
    tab.until_kept(["Opened", "Select", "Erase", "Box"], "a red box")
    tab.page.reload()
    tab.until_step("Box", 4)
    assert tab.page.get_by_label("What should be there instead").input_value() == "a red box"
    assert tab.steps == ["Opened", "Select", "Erase", "Box"]
    tab.get("Undo").click()
    assert np.abs(tab.seen().astype(int) - before).max() <= 2
    mask = tab.masks[0]
    assert (pixels(tab.download()[1])[~mask] == pixels(dog)[~mask]).all()
    tab.get("Forget this edit").click()
    tab.page.wait_for_selector(".start")
    tab.page.reload()
    tab.page.wait_for_selector(".start")


def test_a_server_that_has_forgotten_the_pictures_gets_them_again(tab: Tab, server: Server, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.get("Erase").click()
    tab.until_step("Erase", 3)
    first = tab.download()[1]
    forgotten: list[str] = []

    def forget(route: Route) -> None:
        """Of each kind of request the first is answered as after a restart."""
        if route.request.url in forgotten:
            route.continue_()
            return
        forgotten.append(route.request.url)
        route.fulfill(status=404, json={"error": {"code": "image_not_found", "message": "gone", "field": "image"}})

    tab.page.route(re.compile(r"/v1/(segment$|images/img_)"), forget)
    assert tab.download()[1] == first
    tab.click(420, 480)
    tab.until_step("Select", 4)
    assert len(forgotten) == 2
    tab.forgive()


# What goes wrong


SAID = {
    "out_of_memory": "Mark a smaller part",
    "too_large": "Make it smaller",
    "model_not_found": "palimpsest archives build",
    "queue_full": "Try again in a moment",
    "worker_died": "Nothing of yours is lost",
    "unavailable": "starting its models",
    "store_unreachable": "cannot fetch the model",
    "deadline_exceeded": "took too long",
}


def test_an_error_says_what_to_do(tab: Tab) -> None:
    tab.open("grey.png", encoded(np.full((90, 120, 3), 128, np.uint8)))
    tab.page.keyboard.press("b")
    tab.drag((20, 20), (60, 60))
    tab.until_step("Brush", 2)
    answers: list[str] = []
    tab.page.route("**/v1/erase", lambda route: route.fulfill(content_type="text/event-stream", body=answers.pop()))
    for code, says in SAID.items():
        error = json.dumps({"error": {"code": code, "message": "no"}})
        answers.append(f'event: job\ndata: {{"job": "j"}}\n\nevent: error\ndata: {error}\n\n')
        tab.get("Erase").click()
        tab.page.wait_for_selector(f".notice.error >> text={says}")
        tab.get("Close this message").click()
        assert tab.page.locator(".notice").count() == 0
        assert tab.steps == ["Opened", "Brush"]


def test_a_queue_says_how_many_are_before_one(tab: Tab) -> None:
    """The stream stays open: it is fed by the page's own fetch."""
    tab.open("grey.png", encoded(np.full((90, 120, 3), 128, np.uint8)))
    tab.page.keyboard.press("b")
    tab.drag((20, 20), (60, 60))
    tab.until_step("Brush", 2)
    busy = {"name": "demo/lama", "place": "disk", "state": "absent", "queue": 4}
    tab.page.route("**/v1/models", lambda route: route.fulfill(json={"models": [busy], "memory": {"device": "a GPU"}}))
    tab.page.evaluate(
        """() => {
            const real = fetch;
            globalThis.fetch = (path, init) => {
                if (path !== "v1/erase") return real(path, init);
                const data = '{"phase": "PHASE", "model": "demo/lama", "step": 0, "steps": 0}';
                const told = `event: progress\\ndata: ${data}\\n\\n`;
                const body = new ReadableStream({start(stream) {
                    globalThis.tell = (phase) => stream.enqueue(new TextEncoder().encode(told.replace("PHASE", phase)));
                    tell("queued");
                    init.signal.addEventListener("abort", () => stream.error(init.signal.reason));
                }});
                return Promise.resolve(new Response(body));
            };
        }"""
    )
    tab.get("Erase").click()
    tab.page.wait_for_selector("text=Waiting: 3 before you")
    tab.page.evaluate("tell('loading')")
    tab.page.wait_for_selector("text=Loading LaMa")
    tab.get("Cancel").click()
    tab.page.wait_for_selector(".row.edit")


def test_nothing_marked_no_prompt_and_no_picture_are_said_in_words(tab: Tab) -> None:
    tab.page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    tab.page.wait_for_selector(".notice >> text=no picture that can be opened")
    tab.open("grey.png", encoded(np.full((90, 120, 3), 128, np.uint8)))
    tab.get("Erase").click()
    tab.page.wait_for_selector(".notice >> text=Mark something first")
    tab.get("Replace").click()
    tab.page.wait_for_selector(".notice >> text=Say what should be there instead")
    tab.forgive()


def test_a_server_that_is_gone_is_waited_for(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.page.route(re.compile("/(v1|ping)"), lambda route: route.abort("connectionrefused"))
    tab.get("Erase").click()
    tab.page.wait_for_selector("text=The server does not answer")
    tab.page.unroute(re.compile("/(v1|ping)"))
    tab.page.wait_for_selector("text=The server is back")
    tab.get("Erase").click()
    tab.until_step("Erase", 3)
    tab.forgive()


# Ways in


def test_the_keyboard_alone_can_do_everything(tab: Tab, dog: bytes) -> None:
    keys = tab.page.keyboard
    tab.open("dog.png", dog)
    tab.page.locator("#canvas").focus()
    keys.press("Enter")  # the cursor begins in the middle, which is the dog
    tab.until_step("Select", 2)
    keys.press("b")
    keys.press("Enter")
    for _ in range(6):
        keys.press("ArrowLeft")
    keys.press("Enter")
    tab.until_step("Brush", 3)
    keys.press("v")
    keys.press("x")
    for key in ["ArrowDown"] * 8 + ["ArrowRight"] * 8:
        keys.press(key)
    keys.press("x")
    tab.until_step("Box", 4)
    keys.press("Delete")
    tab.until_step("Erase", 5)
    keys.press("Control+z")
    tab.until_step("Box", 4)
    keys.press("r")
    keys.type("a red box")
    keys.press("Control+Enter")
    tab.until_step("Replace: a red box", 5)
    with tab.page.expect_download():
        keys.press("Control+s")
    keys.press("r")
    keys.press("?")
    assert tab.page.locator("#prompt").input_value() == "a red box?", "in the prompt's field keys are the field's own"
    assert tab.page.locator(".help[open]").count() == 0
    tab.page.locator("#canvas").focus()
    keys.press("?")
    tab.page.wait_for_selector(".help >> text=Keyboard shortcuts")
    keys.press("Escape")
    assert tab.page.locator(".help[open]").count() == 0


def test_fingers_tap_paint_pinch_and_pan(make_tab: MakeTab, dog: bytes) -> None:
    tab = make_tab(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2)
    tab.open("dog.png", dog)
    tab.page.touchscreen.tap(*tab.at(*DOG))
    tab.until_step("Select", 2)
    devtools = tab.context.new_cdp_session(tab.page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        found = [{"x": x, "y": y, "id": each} for each, (x, y) in enumerate(points)]
        devtools.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": found})

    tab.get("Brush").tap()
    # A touch may overtake the click that Chromium makes of the tap before it.
    tab.page.wait_for_selector('button[aria-label="Brush"][aria-pressed="true"]')
    touch("Start", tab.at(200, 200))
    for x in range(220, 420, 40):
        touch("Move", tab.at(x, 250))
    touch("End")
    tab.until_step("Brush", 3)
    before = tab.seen()
    (x, y) = tab.at(*DOG)
    touch("Start", (x - 20, y))
    touch("Start", (x - 20, y), (x + 20, y))
    for spread in (30, 50, 80):
        touch("Move", (x - spread, y + spread), (x + spread, y + spread))
    touch("End")
    assert np.abs(tab.seen().astype(int) - before).mean() > 5
    assert tab.steps == ["Opened", "Select", "Brush"], "a pinch paints nothing"


def test_the_wheel_zooms_to_the_pointer_and_two_fingers_of_a_trackpad_pan(tab: Tab, dog: bytes) -> None:
    tab.open("dog.png", dog)
    whole = tab.seen()
    tab.page.mouse.move(*tab.at(*DOG))
    tab.page.mouse.wheel(0, -400)
    zoomed = tab.seen()
    assert np.abs(zoomed.astype(int) - whole).mean() > 5
    tab.page.mouse.move(*tab.at(*DOG))
    tab.page.mouse.wheel(30, 20)
    assert np.abs(tab.seen().astype(int) - zoomed).mean() > 1
    tab.page.locator("#canvas").focus()
    tab.page.keyboard.press("0")
    assert (tab.seen() == whole).all()


def test_before_and_after_by_slider_and_by_key(tab: Tab, dog: bytes) -> None:
    select_dog(tab, dog)
    tab.get("Undo").click()
    before = tab.seen()
    tab.get("Redo").click()
    tab.get("Erase").click()
    tab.until_step("Erase", 3)
    after = tab.seen()
    assert (before != after).any()
    tab.page.locator("#canvas").focus()
    tab.page.keyboard.down("o")
    assert (tab.seen() == before).all()
    tab.page.keyboard.up("o")
    assert (tab.seen() == after).all()
    tab.get("Before and after").click()
    slider = tab.page.get_by_role("slider", name="Before and after")
    slider.fill("1000")
    half = tab.seen()
    assert (half[:, :-4] == before[:, :-4]).all()
    slider.fill("0")
    assert (tab.seen()[:, 4:] == after[:, 4:]).all()


def test_a_picture_that_the_browser_cannot_read_is_opened_all_the_same(tab: Tab, dog: bytes) -> None:
    small = pixels(dog)[300:700, 500:1000]
    tab.open("dog.tif", encoded(small, "TIFF"), "image/tiff")
    tab.click(250, 200)
    tab.until_step("Select", 2)
    tab.get("Erase").click()
    tab.until_step("Erase", 3)
    name, data = tab.download()
    assert (name, data[:2]) == ("dog-edited.tif", b"II")
    mask = tab.masks[-1]
    assert (pixels(data)[~mask] == small[~mask]).all()
    assert (pixels(data)[mask] != small[mask]).any()


def test_24_megapixels_are_edited_like_any_other(tab: Tab, dog: bytes) -> None:
    large = np.asarray(Image.fromarray(pixels(dog)).resize((6000, 4000)))
    tab.open("large.jpg", encoded(large, "JPEG", quality=80), "image/jpeg")
    tab.click(3000, 1900)
    tab.until_step("Select", 2)
    tab.page.keyboard.press("b")
    tab.drag((500, 500), (1500, 900))
    tab.until_step("Brush", 3)
    with tab.page.expect_response("**/v1/erase") as answered:
        tab.get("Erase").click()
        tab.until_step("Erase", 4)
    assert answered.value.request.sizes()["requestBodySize"] < 200_000, "the picture is not sent again"
    tab.get("Undo").click()
    tab.until_step("Brush", 3)
    assert tab.masks[0].shape == (4000, 6000)
    assert tab.masks[0][500, 500]


# Looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_shut_out(make_tab: MakeTab, dog: bytes, scheme: str) -> None:
    tab = make_tab(color_scheme=scheme)
    axe = (DATA / "axe" / "axe.min.js").read_text()

    def check(where: str) -> None:
        tab.page.evaluate(axe)
        found = tab.page.evaluate("axe.run().then(({violations}) => violations)")
        serious = [
            (where, each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")
        ]
        assert serious == []

    check("start")
    select_dog(tab, dog)
    check("selected")
    tab.page.locator(".corner summary").click()
    tab.page.keyboard.press("b")
    check("brush and models")
    tab.page.locator(".corner summary").click()
    tab.page.keyboard.press("?")
    check("help")
    tab.page.keyboard.press("?")
    tab.page.keyboard.press("c")
    check("before and after")


@pytest.mark.parametrize(("wide", "high"), [(390, 844), (1024, 768), (3840, 2160)])
def test_at_any_size_all_is_in_view_and_nothing_scrolls_sideways(
    make_tab: MakeTab, dog: bytes, wide: int, high: int
) -> None:
    tab = make_tab(viewport={"width": wide, "height": high}, has_touch=True, is_mobile=wide == 390)

    def check() -> None:
        width = tab.page.evaluate("document.documentElement.scrollWidth")
        boxes = tab.page.locator(
            ".bar button, .tools button, .commands button, .commands input, .start button"
        ).evaluate_all("all => all.filter(e => e.getClientRects().length).map(e => e.getBoundingClientRect().toJSON())")
        assert (width, [box for box in boxes if box["left"] < 0 or box["right"] > wide]) == (wide, [])

    check()
    select_dog(tab, dog)
    check()
    tab.get("Brush").tap()
    check()
    tab.page.get_by_label("What should be there instead").fill("a red box")
    tab.get("Replace").tap()
    tab.page.wait_for_selector(".progress")
    check()
    tab.get("Cancel").tap()
    tab.page.wait_for_selector(".row.edit")


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="make screenshots")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(make_tab: MakeTab, dog: bytes, scheme: str) -> None:
    """Writes the pictures of docs/."""
    tab = make_tab(color_scheme=scheme)
    folder = ROOT / "docs" / "page"
    folder.mkdir(exist_ok=True)

    def shoot(name: str) -> None:
        tab.page.wait_for_timeout(400)
        data = pixels(tab.page.screenshot())
        (folder / f"{name}-{scheme}.webp").write_bytes(encoded(data[..., :3], "WEBP", quality=82))

    tab.page.wait_for_function("[...document.images].every(({complete}) => complete)")
    shoot("start")
    tab.get("A fig in a bowl").click()
    tab.until_step("Opened", 1)
    tab.click(880, 560)
    tab.until_step("Select", 2)
    tab.page.keyboard.press("2")
    tab.until_step("Candidate 2", 3)
    shoot("selected")
    tab.page.get_by_label("What should be there instead").fill("a green ball")
    tab.page.get_by_label("Variants").select_option("3")
    tab.get("Replace").click()
    tab.page.wait_for_selector("text=/step [0-9]+ of [0-9]+/")
    shoot("progress")
    tab.page.wait_for_selector(".variants img")
    shoot("variants")
    tab.get("Keep variant 1").click()
    tab.until_step("Replace: a green ball", 4)
    tab.page.keyboard.press("c")
    shoot("compare")
    tab.page.set_viewport_size({"width": 390, "height": 844})
    tab.page.keyboard.press("c")
    shoot("phone")
