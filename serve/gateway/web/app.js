// Puts the page together: what can be done, and who is told what.
import { computed, effect } from "@preact/signals-core";
import { render } from "lit-html";
import * as state from "./state.js";
import * as session from "./session.js";
import * as storage from "./storage.js";
import * as keyboard from "./keyboard.js";
import * as pointer from "./pointer.js";
import * as tools from "./tools.js";
import { Stage } from "./canvas.js";
import { Editor } from "./editor.js";
import { Editing } from "./editing.js";
import { copyPicture, download } from "./exporting.js";
import { tell } from "./errors.js";
import { Selecting } from "./selecting.js";
import { watch } from "./watch.js";
import { page } from "./page.js";
import { showHelp } from "./help.js";
import { scrollToCurrent } from "./strip.js";

/** @typedef {typeof actions} Actions */
/** @typedef {import("./viewport.js").Point} Point */

const stage = new Stage(/** @type {HTMLCanvasElement} */ (document.querySelector("#canvas")));
const editor = new Editor(stage);
const selecting = new Selecting(editor);
const editing = new Editing(editor);
const hand = tools.hand(stage);
const byName = {
  select: tools.select(selecting),
  brush: tools.brush(selecting, 1),
  eraser: tools.brush(selecting, 0),
  hand,
};
const input = /** @type {HTMLInputElement} */ (document.querySelector("#file"));

/** What buttons and keys do. */
const actions = {
  stage,
  tool: () => byName[state.tool.value],
  /** @param {import("./state.js").ToolName} name */
  use(name) {
    byName[state.tool.value].hover(null);
    state.tool.value = name;
  },
  choosePicture: () => input.click(),
  /** @param {Blob & {name?: string}} file @param {string} [name] */
  open: (file, name) => editor.open(file, name),
  /** @param {string} address @param {string} name */
  async openSample(address, name) {
    try {
      await editor.open(await (await fetch(address)).blob(), name);
    } catch (error) {
      tell(error);
    }
  },
  /** @param {string} [tab] */
  async resume(tab) {
    const kept = await storage.restored(tab);
    if (kept) editor.resume(kept.document, kept.steps, kept.typed);
    return Boolean(kept);
  },
  async forget() {
    editing.discardVariants();
    editor.close();
    await storage.forgetAll().catch(tell);
    others = null;
    state.notice.value = { what: "done", text: "This browser keeps nothing of it any more." };
  },
  /** @param {Point} from @param {Point} to @param {tools.Keys} keys */
  box: (from, to, { shift, alt }) => selecting.select({ box: [from, to] }, shift ? "add" : alt ? "subtract" : "replace"),
  /** @param {number} choice */
  choose: (choice) => void selecting.choose(choice),
  /** @param {1 | -1} direction */
  grow: (direction) => selecting.grow(direction),
  invert: () => selecting.invert(),
  clear: () => selecting.clear(),
  erase: () => void editing.erase(),
  replace: () => void editing.replace(),
  /** @param {number} index */
  keepVariant: (index) => void editing.keepVariant(index),
  discardVariants: () => editing.discardVariants(),
  undo: () => void editor.undo(),
  redo: () => void editor.redo(),
  /** @param {number} index */
  go: (index) => void editor.go(index),
  compare: () => void (state.comparing.value = Boolean(state.document_.value) && !state.comparing.value),
  download: () => void download(editor),
  copy: () => void copyPicture(stage),
  async logOut() {
    try {
      await storage.keepNow();
      await session.logOut();
      location.assign("login");
    } catch (error) {
      tell(error);
    }
  },
  help: () => void (state.helpOpen.value = !state.helpOpen.value),
  dismiss: () => void (state.notice.value = null),
  escape() {
    if (state.helpOpen.value) state.helpOpen.value = false;
    else if (state.notice.value) state.notice.value = null;
    else if (state.job.value) state.job.value.stop();
    else if (state.variants.value) editing.discardVariants();
    else if (state.comparing.value) state.comparing.value = false;
    else selecting.clear();
  },
};

/** @type {Awaited<ReturnType<typeof storage.lastOfOthers>>} */
let others = null;
const root = /** @type {HTMLElement} */ (document.querySelector("#page"));
effect(() => {
  render(page(actions, others), root);
  scrollToCurrent();
  showHelp();
  if (state.job.value && document.activeElement === document.body) stage.element.focus(); // what had it makes room for the progress
});

/** A variant is looked at on the canvas itself. */
effect(() => {
  const offered = state.variants.value;
  if (!offered) {
    void editor.show(state.current.peek());
    return;
  }
  editor.picture(offered.made[offered.shown].result).then((picture) => {
    if (state.variants.peek() === offered && stage.original) stage.show(picture, stage.original);
  }, tell);
});
effect(() => void (stage.element.dataset.tool = state.tool.value));
effect(() => void (document.title = state.document_.value ? `${state.document_.value.name} – Palimpsest` : "Palimpsest"));

/** To the login form and back. What is not written down comes first: a job's result, variants of which one is to stay. */
const leaves = computed(() => state.loggedOut.value && !state.job.value && !state.variants.value && !state.opening.value);
leaves.subscribe(async (now) => {
  if (!now) return;
  try {
    await editing.kept.catch(tell);
    await storage.keepNow();
    location.assign("login");
  } catch {
    const text = "The server asks for a key, and this browser keeps no edits: log in at /login in another tab, then go on here.";
    state.notice.value = { what: "error", text };
  }
});

input.addEventListener("change", () => {
  if (input.files?.[0]) actions.open(input.files[0]);
  input.value = "";
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  const file = event.dataTransfer?.files[0];
  if (file) actions.open(file);
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
  if (file) actions.open(file, file.name || "pasted.png");
});
pointer.listen(stage, actions.tool, hand, () => keyboard.held.space);
keyboard.listen(stage, actions);
watch(() => void editor.prepare());

try {
  if (!(await actions.resume())) {
    others = await storage.lastOfOthers();
    render(page(actions, others), root);
  }
} catch (error) {
  tell(error); // a browser that keeps nothing, in a private window
}
storage.keepSteps();
document.documentElement.dataset.ready = "yes";
