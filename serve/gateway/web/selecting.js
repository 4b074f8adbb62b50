// Clicks and boxes become masks: what the pointer is over, what was clicked, and which of its candidates is meant.
import * as api from "./api.js";
import * as state from "./state.js";
import { tell } from "./errors.js";
import { blank, combine, copy, fromRuns, grown, inverted, isEmpty, runsOf } from "./mask.js";
import { decoded } from "./png.js";

/** @typedef {import("./viewport.js").Point} Point */
/** @typedef {"replace" | "add" | "subtract"} How */

const LABELS = { replace: "Select", add: "Add", subtract: "Take away" };

export class Selecting {
  /** @param {import("./editor.js").Editor} editor */
  constructor(editor) {
    this.editor = editor;
    this.stage = editor.stage;
    /** Of a picture: the server's model has seen it. @type {string | null} */ this.ready = null;
    this.pointer = crypto.randomUUID(); // the server answers its newest question only
    /** @type {AbortController | null} */ this.hovering = null;
    /** @type {Point | null} */ this.next = null;
    /** @type {AbortController | null} */ this.clicking = null;
    editor.onPicture = (id) => this.prepare(id);
  }

  /** @param {string} id */
  async prepare(id) {
    this.ready = null;
    await api.segment({ image: id, points: [[0, 0]] });
    this.ready = id;
  }

  /** @param {{point: Point} | {box: [Point, Point]}} prompt @param {How} how */
  async select(prompt, how) {
    const of = state.document_.value;
    const at = state.current.value;
    if (!of || !at) return;
    this.leave();
    this.clicking?.abort();
    const own = (this.clicking = new AbortController());
    state.finding.value = true;
    try {
      const where = "point" in prompt ? { points: [within(prompt.point, of)] } : { box: boxOf(prompt.box, of) };
      const found = await this.editor.withId(at.result, (id) => {
        this.ready = id;
        return api.segment({ image: id, ...where, masks: "all", fill_holes: true }, own.signal);
      });
      if (state.current.value !== at) return; // undone or painted meanwhile
      const candidates = await masksOf(found, of);
      if (!candidates.length) {
        state.notice.value = { what: "error", text: "Nothing was found there. Click in the middle of a thing, or drag a box around it." };
        return;
      }
      this.take("box" in prompt && how === "replace" ? "Box" : LABELS[how], { base: at.mask, how, candidates, choice: 0 });
    } catch (error) {
      if (!own.signal.aborted) tell(error);
    } finally {
      if (this.clicking === own) {
        this.clicking = null;
        state.finding.value = false;
      }
    }
  }

  /** @param {number} choice  counted from 0 */
  choose(choice) {
    const found = state.current.value?.found;
    if (found && choice < found.candidates.length && choice !== found.choice) {
      this.take(`Candidate ${choice + 1}`, { ...found, choice });
    }
  }

  /** @param {string} label @param {import("./state.js").Found} found */
  take(label, found) {
    const { width, height } = /** @type {import("./state.js").Document} */ (state.document_.value);
    const [base, other] = [found.base, found.candidates[found.choice]].map((runs) => fromRuns(runs, width, height));
    this.editor.push(label, combine(base, other, found.how), { found });
  }

  /** What a click would select, once the answer is there; of many moves only the last is asked for. @param {Point} point */
  async hover(point) {
    const of = state.document_.value;
    const at = state.current.value;
    if (!of || !at || !isWithin(point, of) || state.finding.value) return this.leave();
    if (!this.ready) return;
    this.next = point;
    if (this.hovering) return;
    const own = (this.hovering = new AbortController());
    while (this.next && !own.signal.aborted) {
      const asked = this.next;
      this.next = null;
      try {
        const found = await api.segment({ image: this.ready, points: [within(asked, of)], fill_holes: true, hover: this.pointer }, own.signal);
        const mask = await decoded(await api.blobOf(found.mask, "image/png"), of.width, of.height, found.box);
        if (!own.signal.aborted && state.current.value === at) this.stage.showHover(mask);
      } catch {
        this.next = null; // a click says what is wrong
      }
    }
    if (this.hovering === own) this.hovering = null;
  }

  /** The pointer is elsewhere. */
  leave() {
    this.next = null;
    this.hovering?.abort();
    this.hovering = null;
    this.stage.showHover(null);
  }

  /** @param {number} pixels  negative: shrinks */
  grow(pixels) {
    if (this.marked()) this.editor.push(pixels > 0 ? "Grow" : "Shrink", grown(this.stage.mask, pixels));
  }

  invert() {
    if (state.current.value) this.editor.push("Invert", inverted(this.stage.mask));
  }

  clear() {
    const { width, height } = this.stage.mask;
    if (this.marked()) this.editor.push("Clear", blank(width, height));
  }

  marked() {
    return Boolean(state.current.value && !isEmpty(state.current.value.mask));
  }

  /** A mask to paint on, apart from the history's. */
  toPaintOn() {
    return copy(this.stage.mask);
  }
}

/** By how much Grow and Shrink change a mask: a step that is seen in a picture of any size. */
export const growth = () => {
  const of = state.document_.value;
  return of ? Math.max(2, Math.round(Math.max(of.width, of.height) / 300)) : 2;
};

/** @param {Awaited<ReturnType<typeof api.segment>>} found @param {import("./state.js").Document} of */
async function masksOf({ masks = [], scores = [], boxes = [] }, { width, height }) {
  const order = masks.map((_, each) => each).filter((each) => boxes[each]).sort((a, b) => scores[b] - scores[a]);
  return Promise.all(order.map(async (each) =>
    runsOf(await decoded(await api.blobOf(masks[each], "image/png"), width, height, boxes[each]))));
}

/** @param {Point} point @param {{width: number, height: number}} size */
const isWithin = ([x, y], { width, height }) => x >= 0 && y >= 0 && x < width && y < height;

/** @param {Point} point @param {{width: number, height: number}} size @returns {Point} */
const within = ([x, y], { width, height }) => [
  Math.max(0, Math.min(width - 1, Math.floor(x))),
  Math.max(0, Math.min(height - 1, Math.floor(y))),
];

/** @param {[Point, Point]} corners @param {{width: number, height: number}} size */
function boxOf(corners, size) {
  const [a, b] = corners.map((corner) => within(corner, size));
  const [left, top] = [Math.min(a[0], b[0]), Math.min(a[1], b[1])];
  return [left, top, Math.max(a[0], b[0], left + 1), Math.max(a[1], b[1], top + 1)];
}
