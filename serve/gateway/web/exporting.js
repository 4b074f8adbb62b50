// The picture leaves the page: as a file of the input's format, or through the clipboard.
import * as state from "./state.js";
import { tell } from "./errors.js";

const ENDINGS = /** @type {Record<string, string>} */ ({
  "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/tiff": "tif", "image/gif": "gif",
  "image/bmp": "bmp", "image/heic": "heic", "image/avif": "avif",
});

/** As the server writes it: format and metadata are the input's. @param {import("./editor.js").Editor} editor */
export async function download(editor) {
  const of = state.document_.value;
  const at = state.current.value;
  if (!of || !at) return;
  try {
    const file = await editor.file(at.result);
    const ending = ENDINGS[file.type] ?? of.name.split(".").pop();
    const url = URL.createObjectURL(file);
    Object.assign(document.createElement("a"), { href: url, download: `${of.name.replace(/\.[^.]*$/, "")}-edited.${ending}` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  } catch (error) {
    tell(error);
  }
}

/** @param {import("./canvas.js").Stage} stage */
export async function copyPicture(stage) {
  const picture = stage.picture;
  if (!picture) return;
  if (!navigator.clipboard) {
    state.notice.value = { what: "error", text: "Browsers let pages copy pictures over https or from this machine only. Download it instead." };
    return;
  }
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": picture.png() })]);
    state.notice.value = { what: "done", text: "Copied." };
  } catch (error) {
    if (error instanceof DOMException) state.notice.value = { what: "error", text: "The browser does not let this page copy pictures. Download it instead." };
    else tell(error);
  }
}
