// Below the picture: what can be done with the mask, and then with the picture.
import { html, nothing } from "lit-html";
import * as state from "./state.js";
import { isEmpty } from "./mask.js";
import { button, icon } from "./icons.js";
import { variants } from "./variants.js";

/** @typedef {import("./app.js").Actions} Actions */

/** @param {Actions} actions */
export function commands(actions) {
  return html`
    <footer class="commands">
      ${state.variants.value ? variants(state.variants.value, actions) : html`
        ${maskRow(actions)}
        ${state.job.value ? progress(state.job.value) : editRow(actions)}`}
    </footer>`;
}

/** @param {Actions} actions */
function maskRow(actions) {
  const at = state.current.value;
  const none = !at || isEmpty(at.mask);
  const painting = state.tool.value === "brush" || state.tool.value === "eraser";
  return html`
    <div class="row mask" role="group" aria-label="Mask">
      ${!painting && !none ? hows() : nothing}
      ${painting ? range("Size", state.brushSize, 2, 300, "px") : nothing}
      ${at?.found && at.found.candidates.length > 1 ? html`
        <div class="group" role="group" aria-label="Candidates">
          ${at.found.candidates.map((_, each) => html`
            <button type="button" class="button number" aria-label="Candidate ${each + 1}" title="Candidate (${each + 1})"
              aria-pressed=${at.found?.choice === each} @click=${() => actions.choose(each)}>${each + 1}</button>`)}
        </div>` : nothing}
      ${none && !painting ? html`
        <p class="hint mouse">Click a thing to select it. Shift adds, Alt takes away; drag for a box.</p>
        <p class="hint touch">Tap a thing to select it, or drag a box around it.</p>` : html`
        <div class="group">
          ${button({ icon: "expand", label: "Grow", key: "G", act: () => actions.grow(1), disabled: none })}
          ${button({ icon: "shrink", label: "Shrink", key: "S", act: () => actions.grow(-1), disabled: none })}
          ${button({ icon: "contrast", label: "Invert", key: "I", act: actions.invert })}
          ${button({ icon: "x", label: "Clear the mask", key: "Esc", act: actions.clear, disabled: none })}
        </div>
        ${range("Feather", state.feather, 0, 64, "px")}`}
    </div>`;
}

/** Without Shift and Alt, for fingers. */
function hows() {
  const each = (/** @type {"add" | "subtract"} */ how, /** @type {string} */ name, /** @type {string} */ label, /** @type {string} */ key) =>
    button({ icon: name, label, key, pressed: state.how.value === how, act: () => (state.how.value = state.how.value === how ? "replace" : how) });
  return html`
    <div class="group" role="group" aria-label="What a click does">
      ${each("add", "circle-plus", "Add to the mask", "Shift + click")}
      ${each("subtract", "circle-minus", "Take away from the mask", "Alt + click")}
    </div>`;
}

/** @param {string} label @param {{value: number}} signal @param {number} least @param {number} most @param {string} unit */
function range(label, signal, least, most, unit) {
  return html`
    <label class="range">${label}
      <input type="range" min=${least} max=${most} .value=${String(signal.value)}
        @input=${(/** @type {Event} */ event) => (signal.value = Number(/** @type {HTMLInputElement} */ (event.target).value))}>
      <output>${signal.value} ${unit}</output>
    </label>`;
}

/** @param {Actions} actions */
function editRow(actions) {
  const typed = (/** @type {Event} */ event) => (state.prompt.value = /** @type {HTMLInputElement} */ (event.target).value);
  const chosen = (/** @type {Event} */ event) => (state.variantsWanted.value = Number(/** @type {HTMLSelectElement} */ (event.target).value));
  const submitted = (/** @type {Event} */ event) => {
    event.preventDefault();
    actions.replace();
  };
  return html`
    <form class="row edit" @submit=${submitted}>
      ${button({ icon: "wand-sparkles", label: "Erase", key: "Del", act: actions.erase, text: true, kind: "primary" })}
      <span class="or" aria-hidden="true">or</span>
      <input id="prompt" type="text" .value=${state.prompt.value} @input=${typed} placeholder="what should be there instead"
        aria-label="What should be there instead" autocomplete="off" maxlength="2000" enterkeyhint="go">
      <select aria-label="Variants" title="Variants to choose from" @change=${chosen}>
        ${[1, 2, 3, 4].map((each) => html`<option value=${each} ?selected=${each === state.variantsWanted.value}>× ${each}</option>`)}
      </select>
      <button type="submit" class="button strong" title="Replace (Ctrl+Enter)">${icon("sparkles")}<span>Replace</span></button>
    </form>`;
}

/** @param {import("./state.js").Job} job */
function progress(job) {
  const part = job.steps ? job.step / job.steps : undefined;
  return html`
    <div class="row progress" role="status">
      <div class="said">${inWords(job)}<progress max="1" .value=${part ?? nothing} aria-label="Progress"></progress></div>
      <button type="button" class="button" @click=${job.stop} ?disabled=${job.phase === "stopping"}>${icon("x")}<span>Cancel</span></button>
    </div>`;
}

const NAMES = /** @type {Record<string, string>} */ ({ sam: "Segment Anything", lama: "LaMa", sd: "Stable Diffusion" });

/** @param {import("./state.js").Job} job */
function inWords({ kind, phase, model, step, steps, ahead }) {
  const name = NAMES[model.replace(/^.*\//, "")] ?? model;
  if (phase === "sending") return "Sending…";
  if (phase === "queued") return ahead ? `Waiting: ${ahead} before you…` : "Waiting for a turn…";
  if (phase === "loading") return steps ? `Fetching ${name}: ${step} of ${steps} MiB` : `Loading ${name}…`;
  if (phase === "stopping") return "Stopping…";
  if (steps) return `${kind === "erase" ? "Erasing" : "Painting"}: step ${step} of ${steps}`;
  return kind === "erase" ? "Erasing…" : "Painting…";
}
