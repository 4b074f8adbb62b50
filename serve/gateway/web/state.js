// What the page knows, as signals: whoever reads one in drawing is drawn anew when it changes.
import { signal, computed } from "@preact/signals-core";
import * as history from "./history.js";

/** @typedef {import("./mask.js").Runs} Runs */
/** @typedef {import("./viewport.js").Point} Point */

/**
 * The picture that is edited. id: the server's for the file as it was opened; null until it is there.
 * @typedef {{name: string, type: string, width: number, height: number, original: Blob, id: string | null}} Document
 */

/**
 * What an edit made: the rectangle that it changed, and how to make it again where the server has forgotten it.
 * @typedef {object} Result
 * @property {Result | null} parent  the picture that was edited; null: as it was opened
 * @property {string} id  the server's, of the whole picture
 * @property {Blob} patch  PNG
 * @property {[number, number, number, number]} box  where it lies: left, top, right, bottom
 * @property {"erase" | "replace"} kind
 * @property {Record<string, unknown>} fields  of the request, the seed included
 * @property {Runs} mask
 */

/**
 * What a click found. base: what was selected before it; candidates: most probable first.
 * @typedef {{base: Runs, how: "replace" | "add" | "subtract", candidates: Runs[], choice: number}} Found
 */

/**
 * @typedef {object} State  one step in the history
 * @property {string} label
 * @property {Result | null} result  null: the picture as it was opened
 * @property {Runs} mask
 * @property {Found | null} found  whose candidates can be switched to
 * @property {string} thumbnail  a data URI
 * @property {number} bytes
 */

/** @typedef {"select" | "brush" | "eraser" | "hand"} ToolName */
/** @typedef {{kind: "erase" | "replace", phase: "sending" | import("./api.js").Progress["phase"] | "stopping", model: string,
 *   step: number, steps: number, ahead: number, stop: () => void}} Job */
/** @typedef {{result: Result, url: string, seed: number}} Variant */
/** @typedef {{text: string, what: "error" | "done"}} Notice */

export const document_ = signal(/** @type {Document | null} */ (null));
export const steps = signal(/** @type {history.History<State>} */ (history.empty()));
export const current = computed(() => history.current(steps.value) ?? null);

export const tool = signal(/** @type {ToolName} */ ("select"));
export const how = signal(/** @type {"replace" | "add" | "subtract"} */ ("replace")); // what a click does to the mask
export const brushSize = signal(40); // across, in the picture's pixels
export const feather = signal(0);
export const prompt = signal("");
export const variantsWanted = signal(1);

export const job = signal(/** @type {Job | null} */ (null));
export const finding = signal(false); // a click waits for its answer
export const variants = signal(/** @type {{label: string, made: Variant[], shown: number} | null} */ (null));
export const notice = signal(/** @type {Notice | null} */ (null));
export const reachable = signal(true);
export const loggedOut = signal(false); // the server asks for a key
export const models = signal(/** @type {import("./api.js").ModelStatus[]} */ ([]));
export const device = signal("");

export const comparing = signal(false); // the slider
export const peeking = signal(false); // the original, as long as a key is held
export const helpOpen = signal(false);
export const opening = signal(false);
