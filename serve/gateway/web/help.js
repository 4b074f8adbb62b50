// What the keys do.
import { html } from "lit-html";
import * as state from "./state.js";
import { button } from "./icons.js";
import { SHORTCUTS } from "./keyboard.js";

/** @param {import("./app.js").Actions} actions */
export function help(actions) {
  return html`
    <dialog class="help" aria-label="Keyboard shortcuts" @close=${() => (state.helpOpen.value = false)}>
      <header><h2>Keyboard shortcuts</h2>${button({ icon: "x", label: "Close", key: "Esc", act: actions.help })}</header>
      <div class="columns">
        ${SHORTCUTS.map(([title, keys]) => html`
          <section><h3>${title}</h3>
            <dl>${/** @type {string[][]} */ (keys).map(([key, does]) => html`<dt><kbd>${key}</kbd></dt><dd>${does}</dd>`)}</dl>
          </section>`)}
      </div>
    </dialog>`;
}

/** Opens and closes it: as a modal dialog it takes the focus, and gives it back. */
export function showHelp() {
  const dialog = /** @type {HTMLDialogElement | null} */ (document.querySelector(".help"));
  if (!dialog || dialog.open === state.helpOpen.value) return;
  if (state.helpOpen.value) dialog.showModal();
  else dialog.close();
}
