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
      const reply = await this.editor.withId(at.result, (image) =>
        api.edit(kind, { image, mask, feather: state.feather.value, ...fields }, {
          onJob: (id) => (job = id),
          onProgress: (progress) => state.job.value?.phase !== "stopping" && say(progress),
          signal: stopped.signal,
        }));
      const type = reply.content_type ?? of.type;
      const made = await Promise.all((reply.pictures ?? [reply.picture]).map(async (/** @type {string} */ each, /** @type {number} */ index) => {
        const blob = await api.blobOf(each, type);
        return { blob, url: URL.createObjectURL(blob), seed: reply.seeds?.[index] ?? reply.seed };
      }));
      const warnings = (reply.warnings ?? []).join(" ");
      if (warnings) state.notice.value = { what: "done", text: warnings };
      if (made.length === 1) await this.keep(made[0], label);
      else state.variants.value = { of: at.result, mask: at.mask, label, made, shown: 0 };
    } catch (error) {
      const cancelled = stopped.signal.aborted || (error instanceof api.ServerError && error.code === "cancelled");
      if (!cancelled) tell(error);
    } finally {
      state.job.value = null;
    }
  }

  /** @param {Variant} variant @param {string} label */
  async keep({ blob, url }, label) {
    URL.revokeObjectURL(url);
    const result = { blob, id: null };
    const picture = await this.editor.decode(blob, result);
    this.editor.push(label, blank(picture.width, picture.height), { result, picture });
    this.editor.prepare();
  }

  /** @param {number} index */
  async keepVariant(index) {
    const offered = state.variants.value;
    if (!offered) return;
    state.variants.value = null;
    offered.made.forEach((each, at) => at !== index && URL.revokeObjectURL(each.url));
    await this.keep(offered.made[index], offered.label);
  }

  discardVariants() {
    state.variants.value?.made.forEach((each) => URL.revokeObjectURL(each.url));
    state.variants.value = null;
  }
}

