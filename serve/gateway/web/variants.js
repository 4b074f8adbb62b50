// What Replace made, side by side: one is kept.
import { html } from "lit-html";
import * as state from "./state.js";
import { button } from "./icons.js";

/** @typedef {NonNullable<typeof state.variants.value>} Offered */

/** @param {Offered} offered @param {import("./app.js").Actions} actions */
export function variants(offered, actions) {
  const show = (/** @type {number} */ each) => () => {
    if (state.variants.value && state.variants.value.shown !== each) state.variants.value = { ...state.variants.value, shown: each };
  };
  return html`
    <div class="variants" role="group" aria-label="Variants">
      <p>Which one stays?</p>
      <ul>
        ${offered.made.map(({ url, seed }, each) => html`
          <li><button type="button" aria-label="Keep variant ${each + 1}" title="Seed ${seed}" aria-pressed=${offered.shown === each}
            @pointerenter=${show(each)} @focus=${show(each)} @click=${() => actions.keepVariant(each)}><img src=${url} alt=""></button></li>`)}
      </ul>
      ${button({ icon: "x", label: "None of them", key: "Esc", act: actions.discardVariants, text: true })}
    </div>`;
}
