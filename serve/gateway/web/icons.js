// Icons and the buttons that carry them.
import { html, nothing } from "lit-html";

const SPRITE = new URL("./vendor/icons.svg", import.meta.url).href;

/** @param {string} name  of a symbol in vendor/icons.svg */
export const icon = (name) => html`<svg class="icon" aria-hidden="true"><use href="${SPRITE}#${name}"></use></svg>`;

/**
 * @param {{icon: string, label: string, key?: string, act: () => void, pressed?: boolean, disabled?: boolean, text?: boolean, kind?: string}} button
 *   key: its shortcut. text: whether the label is seen.
 */
export const button = ({ icon: name, label, key, act, pressed, disabled = false, text = false, kind = "" }) => html`
  <button type="button" class="button ${kind}" aria-label=${label} aria-pressed=${pressed ?? nothing} ?disabled=${disabled}
    title=${key ? `${label} (${key})` : label} @click=${act}>
    ${icon(name)}${text ? html`<span>${label}</span>` : nothing}
  </button>`;
