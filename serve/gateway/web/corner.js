// A quiet corner: where the models are, and whether they are the small ones.
import { html, nothing } from "lit-html";
import * as state from "./state.js";
import { isLoggedIn } from "./session.js";

const OURS = [["sam", "Select"], ["lama", "Erase"], ["sd", "Replace"]];
const PLACES = /** @type {Record<string, string>} */ ({ gpu: "on the GPU", memory: "in memory", parked: "parked", disk: "on disk" });
const STATES = /** @type {Record<string, string>} */ ({ loading: "loading", waking: "waking", parking: "being parked", failed: "failed to load" });

/** @param {import("./app.js").Actions} actions */
export function corner(actions) {
  const models = state.models.value;
  if (!models.length) return nothing;
  const used = OURS.map(([name, does]) => ({ does, name, model: models.find((each) => each.name === name) ?? models.find((each) => each.name === `demo/${name}`) }));
  const demo = used.some(({ model }) => model?.name.startsWith("demo/"));
  return html`
    <details class="corner">
      <summary>
        ${used.map(({ model }) => html`<i class="dot ${model ? model.place : "missing"} ${model?.state ?? ""}"></i>`)}
        ${demo ? "Demo models" : "Models"}
      </summary>
      <dl>
        ${used.map(({ does, name, model }) => html`
          <dt>${does} <span>${name}</span></dt>
          <dd>${model ? (STATES[model.state] ?? PLACES[model.place]) : "not installed"}${model?.queue ? `, ${model.queue} waiting` : ""}</dd>`)}
      </dl>
      <p>${state.device.value}</p>
      ${demo ? html`<p>These are small ones, for trying things out. The real ones come with
        <code>palimpsest archives build --models full</code> on the server, and a restart.</p>` : nothing}
      ${isLoggedIn() ? html`<button type="button" class="button strong" @click=${actions.logOut}>Log out</button>` : nothing}
    </details>`;
}
