// Everything by keyboard: shortcuts, and a cursor that the arrow keys move over the picture.
import * as state from "./state.js";
import { toPicture, toScreen } from "./viewport.js";

/** @typedef {import("./viewport.js").Point} Point */
/** @typedef {import("./app.js").Actions} Actions */

const STEP = 12; // pixels of the screen; with Ctrl one of them

/** What `?` shows. */
export const SHORTCUTS = [
  ["Select", [["V", "Select"], ["Click · Enter", "Select what is there"], ["Shift + click", "Add"], ["Alt + click", "Take away"],
    ["Drag · X, X", "Box"], ["1 2 3", "Other candidates"]]],
  ["Mask", [["B", "Brush"], ["E", "Eraser"], ["[ ]", "Brush size"], ["G", "Grow"], ["S", "Shrink"], ["I", "Invert"], ["Esc", "Clear, stop"]]],
  ["Edit", [["Del", "Erase"], ["R", "Write a prompt"], ["Ctrl + Enter", "Replace"], ["Ctrl + Z", "Undo"], ["Ctrl + Shift + Z", "Redo"]]],
  ["View", [["Arrows", "Move the cursor"], ["Ctrl + arrows", "By a pixel"], ["+ −", "Zoom"], ["0", "Whole picture"], ["Space + drag", "Move the picture"],
    ["O (hold)", "The original"], ["C", "Before and after"]]],
  ["File", [["Ctrl + O", "Open"], ["Ctrl + S", "Download"], ["Ctrl + C", "Copy"], ["Ctrl + V", "Paste"], ["?", "This list"]]],
];

/** Held down just now. */
export const held = { space: false };

/** @param {import("./canvas.js").Stage} stage @param {Actions} actions */
export function listen(stage, actions) {
  addEventListener("keydown", (event) => {
    if (onCommand(event, actions) || isText(event.target)) return;
    if (event.ctrlKey || event.metaKey) {
      if (event.key.startsWith("Arrow")) onArrow(event, stage, actions);
      return;
    }
    if (event.key === " " && !isButton(event.target)) {
      held.space = true;
      event.preventDefault();
      return;
    }
    if (document.activeElement === stage.element && onCanvas(event, stage, actions)) return;
    const act = SINGLE[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || event.repeat && !REPEATS.has(event.key) || state.helpOpen.value && !["?", "Escape"].includes(event.key)) return;
    act(actions, stage);
    event.preventDefault();
  });
  const released = () => {
    held.space = false;
    state.peeking.value = false;
  };
  addEventListener("keyup", (event) => (event.key === " " || event.key.toLowerCase() === "o") && released());
  addEventListener("blur", released);
}

const REPEATS = new Set(["[", "]", "+", "=", "-", "g", "s"]);

/** @type {Record<string, (actions: Actions, stage: import("./canvas.js").Stage) => void>} */
const SINGLE = {
  v: (actions) => actions.use("select"),
  b: (actions) => actions.use("brush"),
  e: (actions) => actions.use("eraser"),
  h: (actions) => actions.use("hand"),
  "[": () => (state.brushSize.value = Math.max(2, Math.round(state.brushSize.value / 1.2))),
  "]": () => (state.brushSize.value = Math.min(500, Math.round(state.brushSize.value * 1.2) + 1)),
  1: (actions) => actions.choose(0),
  2: (actions) => actions.choose(1),
  3: (actions) => actions.choose(2),
  g: (actions) => actions.grow(1),
  s: (actions) => actions.grow(-1),
  i: (actions) => actions.invert(),
  r: () => /** @type {HTMLElement | null} */ (document.querySelector("#prompt"))?.focus(),
  Delete: (actions) => actions.erase(),
  Backspace: (actions) => actions.erase(),
  Escape: (actions) => actions.escape(),
  o: () => (state.peeking.value = Boolean(state.document_.value)),
  c: (actions) => actions.compare(),
  "+": (_, stage) => stage.zoom(1.25),
  "=": (_, stage) => stage.zoom(1.25),
  "-": (_, stage) => stage.zoom(0.8),
  0: (_, stage) => stage.fit(),
  "?": (actions) => actions.help(),
};

/** With Ctrl or Command; true where it was one. @param {KeyboardEvent} event @param {Actions} actions */
function onCommand(event, actions) {
  if (!(event.ctrlKey || event.metaKey) || event.altKey) return false;
  const key = event.key.toLowerCase();
  if (key === "enter") actions.replace();
  else if (isText(event.target) && key !== "s" && key !== "o") return false; // the field's own undo, copy, paste
  else if (key === "z" && !event.shiftKey) actions.undo();
  else if (key === "y" || key === "z") actions.redo();
  else if (key === "s") actions.download();
  else if (key === "o") actions.choosePicture();
  else if (key === "c" && state.document_.value && !String(getSelection())) actions.copy();
  else return false;
  event.preventDefault();
  return true;
}

/** The corner of a box that X marked. @type {Point | null} */
let corner = null;

/** True where the key was meant for the cursor. @param {KeyboardEvent} event @param {import("./canvas.js").Stage} stage @param {Actions} actions */
function onCanvas(event, stage, actions) {
  const keys = { shift: event.shiftKey, alt: event.altKey };
  if (!state.document_.value) return false;
  if (event.key.startsWith("Arrow")) onArrow(event, stage, actions);
  else if (event.key === "Enter") press(stage, actions, keys);
  else if (event.key.toLowerCase() === "x") markCorner(stage, actions, keys);
  else return false;
  event.preventDefault();
  return true;
}

/** Brush and eraser go down with Enter, paint as the cursor moves, and come up with the next. */
let down = false;

/** @param {import("./canvas.js").Stage} stage @param {Actions} actions @param {import("./tools.js").Keys} keys */
function press(stage, actions, keys) {
  const at = cursor(stage);
  const tool = actions.tool();
  if (down || state.tool.value === "select") {
    if (!down) tool.down(at, keys);
    tool.up(at, keys);
    down = false;
  } else if (state.tool.value !== "hand") {
    tool.down(at, keys);
    down = true;
  }
}

/** @param {import("./canvas.js").Stage} stage @param {Actions} actions @param {import("./tools.js").Keys} keys */
function markCorner(stage, actions, keys) {
  const at = cursor(stage);
  if (!corner) {
    corner = at;
    return;
  }
  actions.box(corner, at, keys);
  corner = null;
  stage.box = null;
}

/** @param {KeyboardEvent} event @param {import("./canvas.js").Stage} stage @param {Actions} actions */
function onArrow(event, stage, actions) {
  if (document.activeElement !== stage.element || !stage.picture) return;
  const by = event.ctrlKey || event.metaKey ? 1 : STEP;
  const [x, y] = toScreen(stage.view, cursor(stage));
  const [dx, dy] = /** @type {Record<string, Point>} */ ({ ArrowLeft: [-by, 0], ArrowRight: [by, 0], ArrowUp: [0, -by], ArrowDown: [0, by] })[event.key];
  const { width, height } = stage.screen;
  // At the window's edge the picture moves on.
  const [tooFar, tooLow] = [Math.max(0, x + dx - width + 20) || Math.min(0, x + dx - 20), Math.max(0, y + dy - height + 20) || Math.min(0, y + dy - 20)];
  const target = toPicture(stage.view, [x + dx, y + dy]);
  if (tooFar || tooLow) stage.pan(-tooFar, -tooLow);
  const { picture } = stage;
  stage.cross = [Math.max(0, Math.min(picture.width - 1, target[0])), Math.max(0, Math.min(picture.height - 1, target[1]))];
  if (corner) stage.box = { from: corner, to: stage.cross };
  if (down) actions.tool().move(stage.cross);
  else actions.tool().hover(stage.cross);
  stage.redraw();
  event.preventDefault();
}

/** Where it is; in the middle of what is seen at first. @param {import("./canvas.js").Stage} stage @returns {Point} */
function cursor(stage) {
  stage.cross ??= toPicture(stage.view, [stage.screen.width / 2, stage.screen.height / 2]);
  return stage.cross;
}

/** @param {EventTarget | null} target */
const isText = (target) => target instanceof HTMLInputElement && target.type !== "range" || target instanceof HTMLSelectElement;

/** @param {EventTarget | null} target */
const isButton = (target) => target instanceof HTMLElement && Boolean(target.closest("button, a, input, select, summary"));
