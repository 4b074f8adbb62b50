"""The editing page in a real Chromium: how long a click takes to show its mask, and a frame while painting and panning.

    python -m bench.page

Medians, measured in the browser. Before the demo models; the machine should have nothing else to do.
"""

import io
import statistics
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browsing import Tab, chromium  # noqa: E402
from serving import serving  # noqa: E402

from serve.archives import build  # noqa: E402

CLICKS = 12
FRAMES = 90
SIZES = {"1499x1041": (1499, 1041), "24 megapixels": (6000, 4000)}

# From the button's release to the frame after the one that shows a further step.
WATCH_CLICKS = """() => {
    globalThis.clicks = [];
    let released = 0;
    addEventListener("pointerup", () => (released = performance.now()), true);
    new MutationObserver(() => {
        if (!released) return;
        const began = released;
        released = 0;
        requestAnimationFrame(() => setTimeout(() => clicks.push(performance.now() - began)));
    }).observe(document.querySelector(".strip ol"), {childList: true});
}"""

# One event a frame; what is measured is the time between frames.
MOVE = """async ([frames, x, y, radius]) => {
    const canvas = document.querySelector("#canvas");
    const send = (kind, at) => canvas.dispatchEvent(new PointerEvent(kind, {
        pointerId: 1, pointerType: "mouse", isPrimary: true, bubbles: true, buttons: kind === "pointerup" ? 0 : 1,
        clientX: x + radius * Math.cos(at / 9), clientY: y + radius * Math.sin(at / 9)}));
    canvas.setPointerCapture = () => undefined;
    const times = [];
    send("pointerdown", 0);
    for (let frame = 1, last = await new Promise(requestAnimationFrame); frame <= frames; frame++) {
        send("pointermove", frame);
        const now = await new Promise(requestAnimationFrame);
        times.push(now - last);
        last = now;
    }
    send("pointerup", frames);
    return times;
}"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "store"
        build.ensure_demo(store, lambda message: None)
        with chromium() as browser, serving(folder, store) as server:
            print("| picture | click to mask | a frame of painting | of panning |\n|---|---|---|---|")
            for size, (width, height) in SIZES.items():
                tab = Tab(browser, f"http://127.0.0.1:{server.port}/")
                print(f"| {size} | {' | '.join(f'{value:.0f} ms' for value in measured(tab, width, height))} |")
                tab.context.close()


def measured(tab: Tab, width: int, height: int) -> tuple[float, float, float]:
    buffer = io.BytesIO()
    Image.open(ROOT / "tests/data/dog-on-bench.png").resize((width, height)).save(buffer, "JPEG", quality=90)
    tab.open("dog.jpg", buffer.getvalue(), "image/jpeg")
    tab.page.evaluate(WATCH_CLICKS)
    for number in range(1 + CLICKS):
        tab.click(width * (0.35 + 0.02 * number), height * 0.48)
        tab.until_step("Select", number + 2)
        tab.get("Candidate 2").wait_for()  # which come after: nobody clicks that fast
    x, y = tab.at(width / 2, height / 2)
    tab.page.keyboard.press("b")
    painting = tab.page.evaluate(MOVE, [FRAMES, x, y, 150])
    tab.page.keyboard.press("h")
    panning = tab.page.evaluate(MOVE, [FRAMES, x, y, 150])
    clicks = tab.page.evaluate("clicks")[1:]
    return statistics.median(clicks), statistics.median(painting), statistics.median(panning)


if __name__ == "__main__":
    main()
