// The page around the canvas.
import { html, nothing } from "lit-html";
import * as history from "./history.js";
import * as state from "./state.js";
import { commands } from "./commands.js";
import { corner } from "./corner.js";
import { help } from "./help.js";
import { button, icon } from "./icons.js";
import { start } from "./start.js";
import { strip } from "./strip.js";

/** @typedef {import("./app.js").Actions} Actions */

/** @param {Actions} actions @param {{tab: string, name: string, thumbnail: string} | null} others  an edit to go on with */
export function page(actions, others) {
  const of = state.document_.value;
  return html`
    ${bar(actions)}
    ${of ? html`${tools(actions)}${strip(actions)}${commands(actions)}` : nothing}
    <section class="over" aria-label="On the picture">
      ${of ? nothing : start(actions, others)}
      ${of && state.comparing.value ? slider(actions) : nothing}
      ${notices(actions)}
      ${state.finding.value ? html`<p class="finding" role="status">${icon("loader-circle")} Looking…</p>` : nothing}
      ${corner(actions)}
      ${of ? zoom(actions) : nothing}
    </section>
    ${help(actions)}`;
}

/** @param {Actions} actions */
function bar(actions) {
  const of = state.document_.value;
  const steps = state.steps.value;
  return html`
    <header class="bar">
      <h1 class="brand">${mark()}<span>Palimpsest</span></h1>
      ${of ? html`
        ${button({ icon: "folder-open", label: "Open another picture", key: "Ctrl+O", act: actions.choosePicture })}
        <p class="name" title=${of.name}>${of.name} <span>${of.width} × ${of.height}</span></p>
        <div class="group" role="group" aria-label="History">
          ${button({ icon: "undo-2", label: "Undo", key: "Ctrl+Z", act: actions.undo, disabled: !history.canUndo(steps) })}
          ${button({ icon: "redo-2", label: "Redo", key: "Ctrl+Shift+Z", act: actions.redo, disabled: !history.canRedo(steps) })}
        </div>
        <div class="group" role="group" aria-label="Look at it">
          ${button({ icon: "columns-2", label: "Before and after", key: "C", act: actions.compare, pressed: state.comparing.value })}
          ${original()}
        </div>
        <div class="group" role="group" aria-label="Take it along">
          ${button({ icon: "clipboard-copy", label: "Copy", key: "Ctrl+C", act: actions.copy })}
          ${button({ icon: "download", label: "Download", key: "Ctrl+S", act: actions.download, text: true, kind: "strong" })}
        </div>` : html`<p class="name"></p>`}
      ${button({ icon: "circle-help", label: "Keyboard shortcuts", key: "?", act: actions.help })}
    </header>`;
}

const mark = () => html`<svg viewBox="0 0 32 32" aria-hidden="true"><rect width="32" height="32" rx="8"></rect>
  <path d="M11 25V7h6.2a5.6 5.6 0 0 1 0 11.2H11"></path><path class="faint" d="M18.5 24.5h4"></path></svg>`;

/** Shows the original as long as it is held. */
function original() {
  const set = (/** @type {boolean} */ on) => () => void (state.peeking.value = on);
  return html`<button type="button" class="button" aria-label="Hold to see the original" title="Hold to see the original (O)"
    aria-pressed=${state.peeking.value} @pointerdown=${set(true)} @pointerup=${set(false)} @pointerleave=${set(false)}
    @pointercancel=${set(false)} @blur=${set(false)}
    @keydown=${(/** @type {KeyboardEvent} */ event) => event.key === "Enter" && set(true)()} @keyup=${set(false)}>${icon("eye")}</button>`;
}

/** @param {Actions} actions */
function tools(actions) {
  const each = (/** @type {import("./state.js").ToolName} */ name, /** @type {string} */ picture, /** @type {string} */ label, /** @type {string} */ key) =>
    button({ icon: picture, label, key, act: () => actions.use(name), pressed: state.tool.value === name });
  return html`
    <nav class="tools" aria-label="Tools">
      ${each("select", "mouse-pointer-2", "Select", "V")}
      ${each("brush", "brush", "Brush", "B")}
      ${each("eraser", "eraser", "Eraser", "E")}
      ${each("hand", "hand", "Move the picture", "H")}
    </nav>`;
}

/** @param {Actions} actions */
function slider({ stage }) {
  const moved = (/** @type {Event} */ event) => {
    stage.split = Number(/** @type {HTMLInputElement} */ (event.target).value) / 1000;
    stage.redraw();
  };
  return html`
    <span class="tag before">Before</span><span class="tag after">After</span>
    <input class="compare" type="range" min="0" max="1000" .value=${String(stage.split * 1000)} @input=${moved} aria-label="Before and after">`;
}

/** @param {Actions} actions */
function zoom({ stage }) {
  return html`
    <div class="zoom" role="group" aria-label="Zoom">
      ${button({ icon: "minus", label: "Zoom out", key: "−", act: () => stage.zoom(0.8) })}
      ${button({ icon: "maximize", label: "Whole picture", key: "0", act: () => stage.fit() })}
      ${button({ icon: "plus", label: "Zoom in", key: "+", act: () => stage.zoom(1.25) })}
    </div>`;
}

/** @param {Actions} actions */
function notices(actions) {
  const notice = state.notice.value;
  const gone = !state.reachable.value;
  return html`
    <div class="notices" aria-live="polite">
      ${gone ? html`<p class="notice error">${icon("loader-circle")}<span>The server does not answer. Your edit is kept here, and goes on
        as soon as it is back: it is asked again by itself.</span></p>` : nothing}
      ${notice ? html`<p class="notice ${notice.what}"><span>${notice.text}</span>
        ${button({ icon: "x", label: "Close this message", act: () => actions.dismiss() })}</p>` : nothing}
    </div>`;
}
