// Mouse, pen, fingers and wheel: one finger uses the tool, two move and zoom the picture.
import * as state from "./state.js";

/** @typedef {import("./viewport.js").Point} Point */
/** @typedef {import("./tools.js").Tool} Tool */

/**
 * @param {import("./canvas.js").Stage} stage
 * @param {() => Tool} chosen @param {Tool} hand  takes over for the middle button, or while Space is held
 * @param {() => boolean} handHeld
 */
export function listen(stage, chosen, hand, handHeld) {
  const { element } = stage;
  /** @type {Map<number, Point>} */ const fingers = new Map();
  /** @type {Tool | null} */ let using = null;

  element.addEventListener("pointerdown", (event) => {
    if (!state.document_.value || state.comparing.value || (event.pointerType === "mouse" && event.button > 1)) return;
    element.focus(/** @type {FocusOptions} */ ({ preventScroll: true, focusVisible: false }));
    element.setPointerCapture(event.pointerId);
    stage.cross = null;
    fingers.set(event.pointerId, here(event));
    using?.cancel();
    using = null;
    if (fingers.size > 1) return; // a pinch
    using = event.button === 1 || handHeld() ? hand : chosen();
    using.down(stage.pictureAt(here(event)), keys(event));
    event.preventDefault();
  });

  element.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) {
      if (event.pointerType !== "touch" && state.document_.value && !state.comparing.value) chosen().hover(stage.pictureAt(here(event)));
      return;
    }
    if (fingers.size === 1) {
      const between = event.getCoalescedEvents?.() ?? [];
      for (const each of between.length && using !== hand ? between : [event]) using?.move(stage.pictureAt(here(each)));
    }
    const old = [...fingers.values()];
    fingers.set(event.pointerId, here(event));
    if (fingers.size === 2) pinch(stage, old, [...fingers.values()]);
  });

  /** @param {PointerEvent} event */
  const up = (event) => {
    if (!fingers.delete(event.pointerId)) return;
    if (event.type === "pointerup") using?.up(stage.pictureAt(here(event)), keys(event));
    else using?.cancel();
    using = null;
  };
  element.addEventListener("pointerup", up);
  element.addEventListener("pointercancel", up);
  element.addEventListener("pointerleave", () => fingers.size || chosen().hover(null));

  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (isZoom(event)) stage.zoom(Math.exp(-pixels(event) / (event.ctrlKey ? 100 : 400)), within(stage, here(event)));
    else if (event.shiftKey) stage.pan(-event.deltaY, 0);
    else stage.pan(-event.deltaX, -event.deltaY);
  }, { passive: false });
}

/** A mouse's wheel and a trackpad's pinch zoom; two fingers on a trackpad move. @param {WheelEvent} event */
function isZoom(event) {
  if (event.ctrlKey || event.metaKey) return true; // a pinch is told as the wheel with Ctrl
  if (event.shiftKey) return false;
  return event.deltaMode !== WheelEvent.DOM_DELTA_PIXEL || (event.deltaX === 0 && Math.abs(event.deltaY) >= 50 && Number.isInteger(event.deltaY));
}

/** @param {WheelEvent} event */
const pixels = (event) => event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 33 : 1);

/** @param {import("./canvas.js").Stage} stage @param {Point[]} before @param {Point[]} after */
function pinch(stage, before, after) {
  const [from, to] = [middle(before), middle(after)];
  stage.pan(to[0] - from[0], to[1] - from[1]);
  const spread = apart(before);
  if (spread > 0) stage.zoom(apart(after) / spread, within(stage, to));
}

/** @param {Point[]} points @returns {Point} */
const middle = ([a, b]) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];
/** @param {Point[]} points */
const apart = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]);
/** @param {MouseEvent} event @returns {Point} */
const here = (event) => [event.clientX, event.clientY];
/** @param {MouseEvent} event */
const keys = (event) => ({ shift: event.shiftKey, alt: event.altKey });

/** @param {import("./canvas.js").Stage} stage @param {Point} point @returns {Point} */
function within(stage, [x, y]) {
  const box = stage.element.getBoundingClientRect();
  return [x - box.left, y - box.top];
}
