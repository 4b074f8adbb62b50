// Clicks and boxes become masks: what the pointer is over, what was clicked, and which of its candidates is meant.
import * as api from "./api.js";
import * as state from "./state.js";
import { randomName } from "./random.js";
import { tell } from "./errors.js";
import * as history from "./history.js";
import { blank, combine, copy, enlarged, fromRuns, grown, inverted, isEmpty, runsOf } from "./mask.js";
import { decoded } from "./png.js";

/** @typedef {import("./viewport.js").Point} Point */
/** @typedef {"replace" | "add" | "subtract"} How */

const SEEN = 2048; // pixels of the longer side
// Of the longer side: a thing's soft rim, which a mask takes along, or what is painted there would go on with it.
const RIM = 1 / 200;
const GROWTH = 1 / 300; // by which Grow and Shrink change a mask: a step that is seen in a picture of any size
const LABELS = { replace: "Select", add: "Add", subtract: "Take away" };

export class Selecting {
  /** @param {import("./editor.js").Editor} editor */
  constructor(editor) {
    this.editor = editor;
    this.stage = editor.stage;
    this.pointer = randomName(); // the server answers its newest question only
    /** Of pictures, the ids of smaller copies. @type {WeakMap<object, string>} */ this.copies = new WeakMap();
    /** Which the server's model has seen. @type {import("./state.js").Result | null | undefined} */ this.ready = undefined;
    /** @type {AbortController | null} */ this.hovering = null;
    /** The last question of the pointer. @type {{result: import("./state.js").Result | null, point: Point, answer: Promise<import("./mask.js").Mask[]>} | null} */
    this.asked = null;
    /** @type {Point | null} */ this.next = null;
    /** @type {AbortController | null} */ this.clicking = null;
    /** The other candidates of the last click. */ this.others = Promise.resolve();
    editor.onPicture = (result) => this.prepare(result);
  }

  /** @param {import("./state.js").Result | null} result */
  async prepare(result) {
    this.ready = undefined;
    await this.ask(result, { points: [[0, 0]] });
    this.ready = result;
  }

  /**
   * What the model finds, as large as the picture, most probable first. A large picture is shown to it in a smaller copy:
   * it sees no more of it, and a mask of 24 megapixels takes a second.
   * @param {import("./state.js").Result | null} result
   * @param {{points?: Point[], box?: number[], masks?: "all", hover?: string}} prompt @param {AbortSignal} [signal]
   * @returns {Promise<import("./mask.js").Mask[]>}
   */
  async ask(result, prompt, signal) {
    const { width, height, levels } = await this.editor.picture(result);
    const seen = levels.find((level) => Math.max(level.width, level.height) <= SEEN) ?? levels[levels.length - 1];
    const scaled = (/** @type {number[]} */ numbers) => numbers.map((value, each) => (value * (each % 2 ? seen.height / height : seen.width / width)));
    const shaped = { fill_holes: true, dilate: share(seen, RIM) };
    const fields = { ...prompt, ...shaped, points: prompt.points?.map(scaled), box: prompt.box && scaled(prompt.box) };
    const asked = (/** @type {string} */ image) => api.segment({ ...fields, image }, signal);
    const found = await (seen === levels[0] ? this.editor.withId(result, asked) : this.withCopy(result, seen, asked));
    const pngs = found.masks ?? [found.mask];
    const boxes = found.boxes ?? [found.box];
    const scores = found.scores ?? [1];
    const order = pngs.map((_, each) => each).filter((each) => boxes[each]).sort((a, b) => scores[b] - scores[a]);
    return Promise.all(order.map(async (each) => {
      const [left, top, right, bottom] = /** @type {[number, number, number, number]} */ (boxes[each]);
      const bounds = { left, top, right, bottom };
      const mask = await decoded(await api.blobOf(pngs[each], "image/png"), seen.width, seen.height, bounds);
      return enlarged(mask, width, height, bounds);
    }));
  }

  /**
   * @template T @param {import("./state.js").Result | null} result @param {OffscreenCanvas} seen
   * @param {(id: string) => Promise<T>} use @returns {Promise<T>}
   */
  async withCopy(result, seen, use) {
    const holder = result ?? /** @type {object} */ (state.document_.peek());
    const known = this.copies.get(holder);
    try {
      if (known) return await use(known);
    } catch (error) {
      if (!(error instanceof api.ServerError && error.code === "image_not_found")) throw error;
    }
    const id = await api.upload(await seen.convertToBlob({ type: "image/jpeg", quality: 0.95 }));
    this.copies.set(holder, id);
    return use(id);
  }

  /** @param {{point: Point} | {box: [Point, Point]}} prompt @param {How} how */
  async select(prompt, how) {
    const of = state.document_.value;
    const at = state.current.value;
    if (!of || !at) return;
    this.clicking?.abort();
    const own = (this.clicking = new AbortController());
    const where = "point" in prompt ? { points: [within(prompt.point, of)] } : { box: boxOf(prompt.box, of) };
    const hovered = this.hovered(at.result, where.points?.[0]);
    if (!hovered) this.leave();
    state.finding.value = true;
    try {
      const ask = () => this.ask(at.result, where, own.signal);
      const [best] = await (hovered?.catch(ask) ?? ask());
      this.leave();
      if (own.signal.aborted) return;
      if (!isStill(at)) return; // undone or painted meanwhile
      if (!best) {
        state.notice.value = { what: "error", text: "Nothing was found there. Click in the middle of a thing, or drag a box around it." };
        return;
      }
      this.ready = at.result;
      this.take("box" in prompt && how === "replace" ? "Box" : LABELS[how], { base: at.mask, how, candidates: [runsOf(best)], choice: 0 }, best);
      this.others = this.addCandidates(where, own.signal);
    } catch (error) {
      if (!own.signal.aborted) tell(error);
    } finally {
      if (this.clicking === own) state.finding.value = false;
    }
  }

  /** The answer of a pointer that rested where it clicks. @param {import("./state.js").Result | null} result @param {Point} [point] */
  hovered(result, point) {
    const { asked } = this;
    return asked && point && asked.result === result && String(asked.point) === String(point) ? asked.answer : null;
  }

  /** The other candidates come after the first is shown. @param {{points?: Point[], box?: number[]}} where @param {AbortSignal} signal */
  async addCandidates(where, signal) {
    await shown(); // what they are computed with draws the mask first
    const at = state.current.value;
    if (!at?.found || signal.aborted) return;
    try {
      const [, ...others] = await this.ask(at.result, { ...where, masks: "all" }, signal);
      if (signal.aborted) return;
      const candidates = [...at.found.candidates, ...others.map(runsOf)];
      const bytes = candidates.slice(1).reduce((sum, each) => sum + each.byteLength, at.bytes);
      state.steps.value = history.replaced(state.steps.value, at, { ...at, bytes, found: { ...at.found, candidates } });
    } catch {
      return; // the first does without
    }
  }

  /** @param {number} choice  counted from 0 */
  async choose(choice) {
    await this.others;
    const found = state.current.value?.found;
    if (found && choice < found.candidates.length && choice !== found.choice) {
      this.take(`Candidate ${choice + 1}`, { ...found, choice });
    }
  }

  /** @param {string} label @param {import("./state.js").Found} found @param {import("./mask.js").Mask} [mask]  the choice, if it is at hand */
  take(label, found, mask) {
    const { width, height } = /** @type {import("./state.js").Document} */ (state.document_.value);
    const runs = found.candidates[found.choice];
    const other = mask ?? fromRuns(runs, width, height);
    if (found.how === "replace") this.editor.push(label, other, { found, runs });
    else this.editor.push(label, combine(fromRuns(found.base, width, height), other, found.how), { found });
  }

  /** What a click would select, once the answer is there; of many moves only the last is asked for. @param {Point} point */
  async hover(point) {
    const of = state.document_.value;
    const at = state.current.value;
    if (state.finding.value) return;
    if (!of || !at || !isWithin(point, of)) return this.leave();
    if (this.ready !== at.result) return;
    this.next = point;
    if (this.hovering) return;
    const own = (this.hovering = new AbortController());
    while (this.next && !own.signal.aborted) {
      const asked = this.next;
      this.next = null;
      try {
        const point = within(asked, of);
        const answer = this.ask(at.result, { points: [point], hover: this.pointer }, own.signal);
        this.asked = { result: at.result, point, answer };
        const [mask] = await answer;
        if (!own.signal.aborted && isStill(at) && !state.finding.value) this.stage.showHover(mask ?? null);
      } catch {
        this.next = this.asked = null; // a click says what is wrong
      }
    }
    if (this.hovering === own) this.hovering = null;
  }

  /** The pointer is elsewhere. */
  leave() {
    this.next = this.asked = null;
    this.hovering?.abort();
    this.hovering = null;
    this.stage.showHover(null);
  }

  /** @param {1 | -1} direction  -1: shrinks */
  grow(direction) {
    const pixels = direction * share(this.stage.mask, GROWTH);
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

/** After the next frame. */
const shown = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));

/** Whether the same is shown; its candidates may have come meanwhile. @param {import("./state.js").State} at */
const isStill = ({ mask, result }) => state.current.value?.mask === mask && state.current.value.result === result;

/** So much of the longer side, in pixels. @param {{width: number, height: number}} size @param {number} part */
const share = ({ width, height }, part) => Math.max(2, Math.round(Math.max(width, height) * part));

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
