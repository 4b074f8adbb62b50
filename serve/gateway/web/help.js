// What the keys do.
import { html, nothing } from "lit-html";
import * as state from "./state.js";
import { button } from "./icons.js";
import { SHORTCUTS } from "./keyboard.js";

/** @param {import("./app.js").Actions} actions */
export function help(actions) {
  if (!state.helpOpen.value) return nothing;
  return html`
    <dialog class="help" open aria-label="Keyboard shortcuts">
      <header><h2>Keyboard shortcuts</h2>${button({ icon: "x", label: "Close", key: "Esc", act: actions.help })}</header>
      <div class="columns">
        ${SHORTCUTS.map(([title, keys]) => html`
          <section><h3>${title}</h3>
            <dl>${/** @type {string[][]} */ (keys).map(([key, does]) => html`<dt><kbd>${key}</kbd></dt><dd>${does}</dd>`)}</dl>
          </section>`)}
      </div>
    </dialog>`;
}
