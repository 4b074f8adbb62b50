// The edit as a whole: opens a picture, adds steps, and shows whichever step the history is at.
import { batch, effect } from "@preact/signals-core";
import * as api from "./api.js";
import * as history from "./history.js";
import * as state from "./state.js";
import { tell } from "./errors.js";
import { blank, boundsOf, fromRuns, runsOf } from "./mask.js";
import { Picture, thumbnail } from "./picture.js";
import { encoded } from "./png.js";

/** @typedef {import("./state.js").Result} Result */
/** @typedef {import("./state.js").State} State */

const MOST_PICTURES = 3; // decoded ones: a picture of 24 megapixels takes 130 MB
const NOTHING = Uint32Array.of();

export class Editor {
  /** @param {import("./canvas.js").Stage} stage */
  constructor(stage) {
    this.stage = stage;
    /** @type {Map<Result | null, Promise<Picture>>} */ this.pictures = new Map();
    /** @type {import("./mask.js").Runs | null} */ this.shownMask = null;
    /** Called with each new picture. @type {(result: Result | null) => Promise<void>} */ this.onPicture = async () => {};
    effect(() => void this.show(state.current.value));
  }

  /** @param {Blob & {name?: string}} file @param {string} [name] */
  async open(file, name = file.name ?? "picture") {
    state.opening.value = true;
    try {
      let id = null;
      let bitmap = await createImageBitmap(file).catch(() => null);
      if (!bitmap) {
        id = await api.upload(file);
        bitmap = await createImageBitmap(await api.file(id, "png"));
      }
      const { width, height } = bitmap;
      const type = file.type || "image/png";
      const picture = new Picture(bitmap);
      this.pictures = new Map([[null, Promise.resolve(picture)]]);
      const first = this.state("Opened", null, NOTHING, picture);
      batch(() => {
        state.document_.value = { name, type, width, height, original: file, id };
        state.steps.value = history.push(history.empty(), first);
        state.variants.value = null;
        state.comparing.value = false;
        state.notice.value = null;
      });
      this.prepare();
    } catch (error) {
      tell(error);
    } finally {
      state.opening.value = false;
    }
  }

  /**
   * What a storage kept.
   * @param {import("./state.js").Document} document @param {history.History<State>} steps @param {import("./storage.js").Typed} typed
   */
  resume(document, steps, typed) {
    this.pictures.clear();
    batch(() => {
      state.prompt.value = typed.prompt;
      state.feather.value = typed.feather;
      state.document_.value = document;
      state.steps.value = steps;
    });
    this.prepare();
  }

  close() {
    this.pictures.clear();
    this.shownMask = null;
    Object.assign(this.stage, { picture: null, original: null });
    batch(() => {
      state.document_.value = null;
      state.steps.value = history.empty();
      state.variants.value = null;
      state.comparing.value = false;
    });
    this.stage.redraw();
  }

  /** The picture on the server, and known to its model, so that the first click is answered as fast as any. */
  async prepare() {
    const at = state.current.value;
    if (!at) return;
    try {
      await this.onPicture(at.result);
    } catch (error) {
      tell(error);
    }
  }

  /**
   * A further step, from what is shown now.
   * @param {string} label @param {import("./mask.js").Mask} mask
   * @param {{result?: Result | null, picture?: Picture, found?: import("./state.js").Found | null, runs?: import("./mask.js").Runs}} [more]
   */
  push(label, mask, { result = state.current.value?.result ?? null, picture, found = null, runs = runsOf(mask) } = {}) {
    const shown = picture ?? this.stage.picture;
    if (!shown) return;
    const next = this.state(label, result, runs, shown, mask, found);
    if (picture) this.remember(result, Promise.resolve(picture));
    else {
      this.shownMask = runs;
      this.stage.showMask(mask, boundsOf(runs, mask.width));
    }
    state.steps.value = history.push(state.steps.value, next);
  }

  /**
   * @param {string} label @param {Result | null} result @param {import("./mask.js").Runs} runs @param {Picture} picture
   * @param {import("./state.js").Found | null} found @returns {State}
   */
  state(label, result, runs, picture, mask = blank(picture.width, picture.height), found = null) {
    const previous = state.current.value;
    const own = result && result !== previous?.result ? result.patch.size : 0;
    const candidates = found?.candidates.reduce((sum, each) => sum + each.byteLength, found.base.byteLength) ?? 0;
    return { label, result, mask: runs, found, thumbnail: thumbnail(picture, mask), bytes: own + runs.byteLength + candidates };
  }

  undo = () => (state.steps.value = history.undo(state.steps.value));
  redo = () => (state.steps.value = history.redo(state.steps.value));
  /** @param {number} index */
  go = (index) => (state.steps.value = history.go(state.steps.value, index));

  /** @param {State | null} shown */
  async show(shown) {
    const of = state.document_.peek();
    if (!shown || !of) return;
    if (this.shownMask !== shown.mask) {
      this.shownMask = shown.mask;
      this.stage.showMask(fromRuns(shown.mask, of.width, of.height), boundsOf(shown.mask, of.width));
    }
    this.stage.showHover(null);
    const [picture, original] = await Promise.all([this.picture(shown.result), this.picture(null)]);
    if (state.current.peek() === shown) this.stage.show(picture, original);
  }

  /** @param {Result | null} result @returns {Promise<Picture>} */
  picture(result) {
    const known = this.pictures.get(result);
    if (known) {
      this.remember(result, known);
      return known;
    }
    const decoding = result ? this.patched(result) : this.opened();
    this.remember(result, decoding);
    return decoding;
  }

  /** The picture as it was opened. */
  async opened() {
    const { original } = /** @type {import("./state.js").Document} */ (state.document_.peek());
    const bitmap = await createImageBitmap(original).catch(() => null);
    return new Picture(bitmap ?? (await createImageBitmap(await this.withId(null, (id) => api.file(id, "png")))));
  }

  /** @param {Result} result */
  async patched({ parent, patch, box }) {
    const [before, changed] = await Promise.all([this.picture(parent), createImageBitmap(patch)]);
    return before.with(changed, box[0], box[1]);
  }

  /** Of those that were not used for longest the excess goes; never the original. @param {Result | null} result @param {Promise<Picture>} picture */
  remember(result, picture) {
    this.pictures.delete(result);
    this.pictures.set(result, picture);
    for (const each of this.pictures.keys()) {
      if (this.pictures.size <= MOST_PICTURES) break;
      if (each !== null) this.pictures.delete(each);
    }
  }

  /**
   * Calls `use` with the picture's id on the server, which is sent there again where the server has forgotten it.
   * @template T @param {Result | null} result @param {(id: string) => Promise<T>} use @returns {Promise<T>}
   */
  async withId(result, use) {
    const known = (result ?? state.document_.peek())?.id;
    try {
      if (known) return await use(known);
    } catch (error) {
      if (!(error instanceof api.ServerError && error.code === "image_not_found")) throw error;
    }
    return use(await this.remade(result));
  }

  /** Has the server make everything anew, from the picture as it was opened; returns the id. @param {Result | null} result @returns {Promise<string>} */
  async remade(result) {
    const of = /** @type {import("./state.js").Document} */ (state.document_.peek());
    if (!result) return (of.id = await api.upload(of.original));
    const image = await this.remade(result.parent);
    const mask = await encoded(fromRuns(result.mask, of.width, of.height));
    const { id } = await api.edit(result.kind, { ...result.fields, image, mask, keep: true, result: "patch" }, {});
    return (result.id = id);
  }

  /** The picture as a file of the input's format. @param {Result | null} result @returns {Promise<Blob>} */
  async file(result) {
    return result ? this.withId(result, (id) => api.file(id, "input")) : /** @type {import("./state.js").Document} */ (state.document_.peek()).original;
  }
}
