// The login form, which leads back to the page.
import { logIn } from "./session.js";

const form = /** @type {HTMLFormElement} */ (document.querySelector("#login"));
const key = /** @type {HTMLInputElement} */ (document.querySelector("#key"));
const problem = /** @type {HTMLElement} */ (document.querySelector("#problem"));
const button = /** @type {HTMLButtonElement} */ (form.querySelector("button"));

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  button.disabled = true;
  const status = await logIn(key.value).catch(() => 0);
  if (status === 204) location.replace("./");
  else problem.textContent = inWords(status);
  button.disabled = false;
  key.select();
});
document.documentElement.dataset.ready = "yes";

/** @param {number} status */
function inWords(status) {
  if (status === 401) return "The server does not know this key. Is all of it there?";
  return status ? "The server cannot do that now. Try again in a moment." : "The server does not answer. Try again in a moment.";
}
