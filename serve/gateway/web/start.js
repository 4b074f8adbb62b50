// Before there is a picture: where to get one.
import { html, nothing } from "lit-html";
import * as state from "./state.js";
import { icon } from "./icons.js";

const SAMPLES = [
  { name: "fig", says: "A fig in a bowl" },
  { name: "hillside", says: "A tree on a hillside" },
  { name: "dandelions", says: "Dandelions at dusk" },
  { name: "dog", says: "The dog on the bench" },
];

/** @param {string} file */
const at = (file) => new URL(`./samples/${file}`, import.meta.url).href;

/** @param {import("./app.js").Actions} actions @param {{tab: string, name: string, thumbnail: string} | null} others */
export function start(actions, others) {
  return html`
    <div class="start">
      <h2>Click a thing. Erase it, or say what should be there instead.</h2>
      <button type="button" class="drop" @click=${actions.choosePicture} ?disabled=${state.opening.value}>
        ${icon(state.opening.value ? "loader-circle" : "image-plus")}
        <strong>${state.opening.value ? "Opening…" : "Choose a picture"}</strong>
        <span>or drop or paste one anywhere here</span>
      </button>
      ${others ? html`
        <button type="button" class="resume" @click=${() => actions.resume(others.tab)}>
          <img src=${others.thumbnail} alt=""> <span>Go on with <strong>${others.name}</strong></span>
        </button>` : nothing}
      <p>Or try one of these</p>
      <ul class="samples">
        ${SAMPLES.map(({ name, says }) => html`
          <li><button type="button" @click=${() => actions.openSample(at(`${name}.jpg`), `${name}.jpg`)} ?disabled=${state.opening.value}>
            <img src=${at(`${name}-small.webp`)} alt="" width="320" height="240"><span>${says}</span>
          </button></li>`)}
      </ul>
    </div>`;
}
