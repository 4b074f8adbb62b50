// What went wrong, in the user's words, with what to do about it.
import { LoggedOut, ServerError, Unreachable } from "./api.js";
import * as state from "./state.js";

/** @type {Record<string, string>} */
const SAID = {
  out_of_memory: "There is not enough memory for this. Mark a smaller part or use a smaller picture, or wait until others are done and try again.",
  disk_full: "The server's disk is full. Free some space there and try again.",
  model_not_found: "The model for this is not installed. On the server, run: palimpsest archives build",
  load_failed: "The model could not be loaded. The server's log says why; try again in a minute.",
  model_failed: "The model failed with this picture. Try again, or with another mask.",
  too_large: "The picture is too large for this server. Make it smaller and open it again.",
  queue_full: "Many requests are waiting already. Try again in a moment.",
  model_not_ready: "The server was busy for too long. Try again in a moment.",
  over_share: "Your key has as much under way as it may. Try again in a moment.",
  busy: "The server is busy. Try again in a moment.",
  not_finite: "The model could not make a picture of this. Try again, with another mask or prompt.",
  worker_died: "The model stopped amid the work. Nothing of yours is lost: try again.",
  store_unreachable: "The server cannot fetch the model for this just now. Try again in a moment.",
  unavailable: "The server is starting its models. Try again in a moment.",
  deadline_exceeded: "The server took too long. Try again, with fewer steps or a smaller picture.",
  unsupported_media_type: "This is no picture that can be opened. PNG, JPEG, WebP, TIFF, HEIC, AVIF, GIF and BMP can.",
};

/** Shows an error and, where the server is gone, that it is waited for; where it asks for a key, the form is next. @param {unknown} error */
export function tell(error) {
  if (error instanceof Unreachable) state.reachable.value = false;
  else if (error instanceof LoggedOut) state.loggedOut.value = true;
  else state.notice.value = { what: "error", text: inWords(error) };
}

/** @param {unknown} error @returns {string} */
export function inWords(error) {
  if (error instanceof ServerError) {
    if (SAID[error.code]) return SAID[error.code];
    if (error.field === "image" && /not a picture|cannot be read|can't be read/.test(error.message)) return SAID.unsupported_media_type;
    return sentence(error.message);
  }
  if (error instanceof Error && error.name === "QuotaExceededError") {
    return "The browser has no room left to keep this edit. Download it, or clear what is kept.";
  }
  console.error(error);
  return "Something went wrong in this page. Your edit is kept: reload to go on.";
}

/** @param {string} message */
const sentence = (message) => message.charAt(0).toUpperCase() + message.slice(1).replace(/([^.])$/, "$1.");
