// The strip of states: every step, and the way back to it.
import { html } from "lit-html";
import * as state from "./state.js";
import { button } from "./icons.js";

/** @param {import("./app.js").Actions} actions */
export function strip(actions) {
  const { states, index } = state.steps.value;
  return html`
    <aside class="strip" aria-label="Steps">
      <ol>
        ${states.map(({ label, thumbnail }, each) => html`
          <li><button type="button" class=${each > index ? "undone" : ""} aria-current=${each === index ? "step" : "false"} title=${label}
            aria-label="Step ${each + 1}: ${label}" @click=${() => actions.go(each)}>
            <img src=${thumbnail} alt=""><span>${label}</span>
          </button></li>`)}
      </ol>
      ${button({ icon: "trash-2", label: "Forget this edit", act: actions.forget })}
    </aside>`;
}

/** The step that is shown comes into sight, when it is another one. */
let shown = -1;
export function scrollToCurrent() {
  const { index } = state.steps.value;
  if (index === shown) return;
  shown = index;
  const list = document.querySelector(".strip ol");
  const item = /** @type {HTMLElement | undefined} */ (list?.children[index]);
  if (!list || !item) return;
  list.scrollTop = item.offsetTop - list.clientHeight / 2;
  list.scrollLeft = item.offsetLeft - list.clientWidth / 2;
}
