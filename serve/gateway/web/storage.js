// What the browser keeps of the edit, so that a reload or a crash loses nothing. Bounded: by the history, and in tabs.
import { createStore, del, get, keys, set } from "idb-keyval";
import { effect } from "@preact/signals-core";
import * as state from "./state.js";
import { randomName } from "./random.js";
import { tell } from "./errors.js";

/** @typedef {import("./state.js").Result} Result */
/**
 * What is written: blobs by their names, results by their number.
 * @typedef {object} Kept
 * @property {Omit<import("./state.js").Document, "original"> & {original: string}} document
 * @property {(Omit<Result, "patch" | "parent"> & {patch: string, parent: number | null})[]} results
 * @property {(Omit<import("./state.js").State, "result"> & {result: number | null})[]} steps
 * @property {number} index
 * @property {Typed} typed
 * @property {number} when
 */
/** @typedef {{prompt: string, feather: number}} Typed  for the next edit */

const MOST_TABS = 3;
const PAUSE = 300; // milliseconds without a further step before it is written
const store = createStore("palimpsest", "edits");

/** Of this tab, reloads included. */
let tab = sessionStorage.getItem("tab") ?? take(randomName());
/** @type {Map<Blob, string>} */ let names = new Map();
/** Writes run one after the other. */ let writing = Promise.resolve();

/** @param {string} name */
function take(name) {
  sessionStorage.setItem("tab", name);
  return name;
}

/** Writes every step down, a moment after it, and what is typed. */
export function keepSteps() {
  let timer = 0;
  effect(() => {
    void [state.document_.value, state.steps.value, state.prompt.value, state.feather.value];
    clearTimeout(timer);
    timer = setTimeout(save, PAUSE);
  });
  addEventListener("pagehide", save);
}

const save = () => void keepNow().catch(tell);

/** Writes what there is now; fails in a browser that keeps nothing. @returns {Promise<void>} */
export function keepNow() {
  const document = state.document_.value;
  const { states, index } = state.steps.value;
  const typed = { prompt: state.prompt.value, feather: state.feather.value };
  if (!document) return writing;
  const written = writing.then(() => write(document, states, index, typed));
  writing = written.catch(() => {});
  return written;
}

/**
 * Blobs lie beside the record, each written once: a record is written with every step.
 * @param {import("./state.js").Document} document @param {readonly import("./state.js").State[]} states @param {number} index
 * @param {Typed} typed
 */
async function write(document, states, index, typed) {
  const results = resultsOf(states);
  const blobs = new Set([document.original, ...results.map(({ patch }) => patch)]);
  for (const blob of blobs) {
    if (names.has(blob)) continue;
    const name = `${tab}:blob:${randomName()}`;
    await set(name, blob, store);
    names.set(blob, name);
  }
  const kept = {
    document: { ...document, original: names.get(document.original) },
    results: results.map((each) => ({ ...each, patch: names.get(each.patch), parent: each.parent && results.indexOf(each.parent) })),
    steps: states.map((each) => ({ ...each, result: each.result && results.indexOf(each.result) })),
    index,
    typed,
    when: Date.now(),
  };
  await set(`${tab}:edit`, kept, store);
  for (const [blob, name] of names) {
    if (blobs.has(blob)) continue;
    await del(name, store);
    names.delete(blob);
  }
  await forgetOldTabs();
}

/** All that the states are made of, each after its parent. @param {readonly import("./state.js").State[]} states */
function resultsOf(states) {
  /** @type {Set<Result>} */ const found = new Set();
  /** @param {Result | null} result */
  const add = (result) => {
    if (!result) return;
    add(result.parent);
    found.add(result);
  };
  for (const { result } of states) add(result);
  return [...found];
}

/** @returns {Promise<{tab: string, name: string, thumbnail: string} | null>} the last edit of another tab, if there is one */
export async function lastOfOthers() {
  const last = (await edits()).find((each) => each.tab !== tab);
  return last ? { tab: last.tab, name: last.kept.document.name, thumbnail: last.kept.steps[last.kept.index].thumbnail } : null;
}

/**
 * What was kept of this tab, or of another, which this one then goes on with.
 * @param {string} [from]
 * @returns {Promise<{document: import("./state.js").Document, steps: import("./history.js").History<import("./state.js").State>, typed: Typed} | null>}
 */
export async function restored(from = tab) {
  const kept = /** @type {Kept | undefined} */ (await get(`${from}:edit`, store));
  if (!kept) return null;
  tab = take(from);
  const blobs = new Map();
  for (const name of [kept.document.original, ...kept.results.map(({ patch }) => patch)]) blobs.set(name, await get(name, store));
  if (![...blobs.values()].every((blob) => blob instanceof Blob)) return null;
  /** @type {Result[]} */ const results = [];
  for (const each of kept.results) {
    results.push({ ...each, patch: blobs.get(each.patch), parent: each.parent === null ? null : results[each.parent] });
  }
  const states = kept.steps.map((step) => ({ ...step, result: step.result === null ? null : results[step.result] }));
  names = new Map([...blobs].map(([name, blob]) => [blob, name]));
  return { document: { ...kept.document, original: blobs.get(kept.document.original) }, steps: { states, index: kept.index }, typed: kept.typed };
}

/** Everything that the browser keeps for this page goes. */
export async function forgetAll() {
  await writing;
  for (const key of await keys(store)) await del(key, store);
  names = new Map();
}

async function forgetOldTabs() {
  const all = await keys(store);
  if (all.filter(isEdit).length <= MOST_TABS) return;
  const old = (await edits()).filter((each) => each.tab !== tab).slice(MOST_TABS - 1);
  for (const key of all) {
    if (old.some((each) => String(key).startsWith(`${each.tab}:`))) await del(key, store);
  }
}

/** @param {IDBValidKey} key */
const isEdit = (key) => String(key).endsWith(":edit");

/** Newest first. */
async function edits() {
  const found = [];
  for (const key of (await keys(store)).filter(isEdit)) {
    const kept = /** @type {Kept} */ (await get(key, store));
    found.push({ tab: String(key).slice(0, -":edit".length), kept });
  }
  return found.sort((a, b) => b.kept.when - a.kept.when);
}
