// What the pointer does to the picture: select, brush, eraser, hand. Points are the picture's.
import * as state from "./state.js";
import { stroke } from "./mask.js";

/** @typedef {import("./viewport.js").Point} Point */
/** @typedef {{shift: boolean, alt: boolean}} Keys */
/**
 * @typedef {object} Tool
 * @property {(at: Point, keys: Keys) => void} down
 * @property {(at: Point) => void} move  while it is down
 * @property {(at: Point, keys: Keys) => void} up
 * @property {() => void} cancel  it was no such gesture after all
 * @property {(at: Point | null) => void} hover  over the picture, up; null: elsewhere
 */

const DRAG = 6; // pixels of the screen that a click may be off

/** A click selects a thing; a drag, what is in the box. @param {import("./selecting.js").Selecting} selecting @returns {Tool} */
export function select(selecting) {
  const { stage } = selecting;
  /** @type {Point | null} */ let from = null;
  const cancel = () => {
    from = stage.box = null;
    stage.redraw();
  };
  return {
    down: (at) => (from = at),
    move(at) {
      if (!from || !(stage.box || distance(from, at) * stage.view.scale > DRAG)) return;
      stage.showHover(null);
      stage.box = { from, to: at };
      stage.redraw();
    },
    up(at, { shift, alt }) {
      const box = stage.box;
      const began = from;
      cancel();
      if (!began) return;
      const how = shift ? "add" : alt ? "subtract" : state.how.value;
      selecting.select(box ? { box: [began, at] } : { point: at }, how);
    },
    cancel,
    hover: (at) => void (at ? selecting.hover(at) : selecting.leave()),
  };
}

/**
 * Paints into the mask, or out of it: while Shift or Alt is held the other way round.
 * @param {import("./selecting.js").Selecting} selecting @param {0 | 1} value @returns {Tool}
 */
export function brush(selecting, value) {
  const { stage, editor } = selecting;
  /** @type {Point | null} */ let last = null;
  /** @type {0 | 1} */ let painted = value;
  const radius = () => state.brushSize.value / 2;
  /** @param {Point} at */
  const paint = (at) => {
    const touched = stroke(stage.mask, last ?? at, at, radius(), painted);
    last = at;
    stage.brush = { at, radius: radius() };
    stage.showMask(stage.mask, union(stage.maskBounds, touched));
  };
  return {
    down(at, { alt }) {
      painted = alt ? /** @type {0 | 1} */ (1 - value) : value;
      stage.showMask(selecting.toPaintOn(), stage.maskBounds);
      paint(at);
    },
    move: (at) => last && paint(at),
    up() {
      if (!last) return;
      last = null;
      editor.push(painted ? "Brush" : "Eraser", stage.mask);
    },
    cancel() {
      if (!last) return;
      last = null;
      editor.shownMask = null;
      editor.show(state.current.value);
    },
    hover(at) {
      stage.brush = at && { at, radius: radius() };
      stage.redraw();
    },
  };
}

/** @param {import("./canvas.js").Stage} stage @returns {Tool} */
export function hand(stage) {
  /** @type {Point | null} */ let from = null;
  return {
    down: (at) => (from = at),
    move(at) {
      if (from) stage.pan((at[0] - from[0]) * stage.view.scale, (at[1] - from[1]) * stage.view.scale);
    },
    up: () => (from = null),
    cancel: () => (from = null),
    hover: () => undefined,
  };
}

/** @param {import("./mask.js").Box | null} a @param {import("./mask.js").Box} b @returns {import("./mask.js").Box} */
const union = (a, b) => !a ? b : {
  left: Math.min(a.left, b.left),
  top: Math.min(a.top, b.top),
  right: Math.max(a.right, b.right),
  bottom: Math.max(a.bottom, b.bottom),
};

/** @param {Point} a @param {Point} b */
const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);

