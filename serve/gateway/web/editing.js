// Erase and Replace: asks the server, says how far it is, can be stopped, and takes or offers what comes back.
import * as api from "./api.js";
import * as state from "./state.js";
import { tell } from "./errors.js";
import { blank, fromRuns } from "./mask.js";
import { encoded } from "./png.js";

/** @typedef {import("./state.js").Variant} Variant */

export class Editing {
  /** @param {import("./editor.js").Editor} editor */
  constructor(editor) {
    this.editor = editor;
    /** @type {Promise<void>} the last variant that stays, until it is a step */ this.kept = Promise.resolve();
  }

  erase() {
    return this.run("erase", {}, "Erase");
  }

  replace() {
    const prompt = state.prompt.value.trim();
    if (!prompt) {
      state.notice.value = { what: "error", text: "Say what should be there instead: type it beside Replace." };
      return Promise.resolve();
    }
    return this.run("replace", { prompt, variants: state.variantsWanted.value }, `Replace: ${prompt}`);
  }

  /** @param {"erase" | "replace"} kind @param {Record<string, unknown>} fields @param {string} label */
  async run(kind, fields, label) {
    const at = state.current.value;
    const of = state.document_.value;
    if (!at || !of || state.job.value) return;
    if (at.mask.length < 2) {
      state.notice.value = { what: "error", text: "Mark something first: click it, drag a box around it, or paint with the brush." };
      return;
    }
    const stopped = new AbortController();
    /** @param {Partial<import("./state.js").Job>} news */
    const say = (news) => (state.job.value = state.job.value && { ...state.job.value, ...news });
    let job = "";
    state.notice.value = null;
    state.job.value = {
      kind, phase: "sending", model: "", step: 0, steps: 0, ahead: 0,
      stop: () => {
        say({ phase: "stopping" });
        if (job) api.cancel(job).catch(() => stopped.abort());
        else stopped.abort();
      },
    };
    try {
      const mask = await encoded(fromRuns(at.mask, of.width, of.height));
      const asked = { feather: state.feather.value, ...fields };
      const reply = await this.editor.withId(at.result, (image) =>
        api.edit(kind, { ...asked, image, mask, keep: true, result: "patch" }, {
          onJob: (id) => (job = id),
          onProgress: (progress) => state.job.value?.phase !== "stopping" && say(progress),
          signal: stopped.signal,
        }));
      const warnings = (reply.warnings ?? []).join(" ");
      if (warnings) state.notice.value = { what: "done", text: warnings };
      const made = await variantsOf(reply, { parent: at.result, kind, fields: asked, mask: at.mask });
      if (made.length === 1) await this.keep(made[0], label);
      else state.variants.value = { label, made, shown: 0 };
    } catch (error) {
      const cancelled = stopped.signal.aborted || (error instanceof api.ServerError && error.code === "cancelled");
      if (!cancelled) tell(error);
    } finally {
      state.job.value = null;
    }
  }

  /** @param {Variant} variant @param {string} label */
  async keep({ result, url }, label) {
    URL.revokeObjectURL(url);
    const picture = await this.editor.picture(result);
    this.editor.push(label, blank(picture.width, picture.height), { result, picture });
    this.editor.prepare();
  }

  /** @param {number} index */
  async keepVariant(index) {
    const offered = state.variants.value;
    if (!offered) return;
    this.kept = this.keep(offered.made[index], offered.label);
    state.variants.value = null;
    offered.made.forEach((each, at) => at !== index && URL.revokeObjectURL(each.url));
    await this.kept;
  }

  discardVariants() {
    state.variants.value?.made.forEach((each) => URL.revokeObjectURL(each.url));
    state.variants.value = null;
  }
}


/**
 * @param {Record<string, any>} reply
 * @param {Pick<import("./state.js").Result, "parent" | "kind" | "fields" | "mask">} asked
 * @returns {Promise<Variant[]>}
 */
function variantsOf(reply, { fields, ...asked }) {
  const pictures = /** @type {string[]} */ (reply.pictures ?? [reply.picture]);
  const { variants: _, ...once } = fields;
  return Promise.all(pictures.map(async (picture, each) => {
    const patch = await api.blobOf(picture, "image/png");
    const seed = reply.seeds?.[each] ?? reply.seed;
    const again = seed === undefined ? once : { ...once, seed };
    const result = { ...asked, fields: again, id: reply.ids?.[each] ?? reply.id, patch, box: reply.box };
    return { result, url: URL.createObjectURL(patch), seed };
  }));
}
