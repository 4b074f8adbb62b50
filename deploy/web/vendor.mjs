// Copies what the editing page uses of other people's from node_modules (npm ci, checked by package-lock.json), and
// writes down version, licence and checksum of each. `make vendor` runs it.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const root = join(here, "..", "..");

const ICONS = [
  "brush", "circle-help", "circle-plus", "circle-minus", "clipboard-copy", "columns-2", "contrast", "download", "eraser",
  "eye", "folder-open", "hand", "image-plus", "loader-circle", "maximize", "minus", "mouse-pointer-2", "plus",
  "redo-2", "shrink", "expand", "sparkles", "trash-2", "undo-2", "wand-sparkles", "x", "feather", "cpu", "check",
];

/** Where each package's files go, by the name that they have there. */
const FOLDERS = {
  "serve/gateway/web/vendor": {
    "lit-html": { "lit-html.js": "lit-html.js", LICENSE: "lit-html.LICENSE" },
    "@preact/signals-core": { "dist/signals-core.mjs": "signals-core.js", LICENSE: "signals-core.LICENSE" },
    "idb-keyval": { "dist/index.js": "idb-keyval.js", LICENCE: "idb-keyval.LICENSE" },
    "lucide-static": { LICENSE: "icons.LICENSE" },
  },
  "tests/data/axe": { "axe-core": { "axe.min.js": "axe.min.js", LICENSE: "LICENSE" } },
};

for (const [folder, packages] of Object.entries(FOLDERS)) {
  const target = join(root, folder);
  rmSync(target, { recursive: true, force: true });
  mkdirSync(target, { recursive: true });
  const manifest = [];
  for (const [name, files] of Object.entries(packages)) {
    const source = join(here, "node_modules", name);
    const { version, license } = JSON.parse(readFileSync(join(source, "package.json"), "utf8"));
    const written = Object.entries(files).map(([from, to]) => [to, withoutMap(readFileSync(join(source, from), "utf8"))]);
    if (name === "lucide-static") written.push(["icons.svg", sprite(source)]);
    for (const [to, text] of written) writeFileSync(join(target, to), text);
    manifest.push({ name, version, license, sha256: Object.fromEntries(written.map(([to, text]) => [to, sha256(text)])) });
  }
  writeFileSync(join(target, "manifest.json"), JSON.stringify(manifest, null, 2) + "\n");
}

/** Source maps stay behind: a browser's tools would ask for them in vain. */
function withoutMap(text) {
  return text.replace(/\n?\/\/# sourceMappingURL=.*\s*$/, "\n");
}

/** One file with the icons that the page uses. */
function sprite(source) {
  const symbols = ICONS.map((name) => {
    const drawn = readFileSync(join(source, "icons", `${name}.svg`), "utf8").match(/<svg[^>]*>([\s\S]*)<\/svg>/)[1];
    return `<symbol id="${name}" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="1.75" ` +
      `stroke-linecap="round" stroke-linejoin="round">${drawn.replace(/\s*\n\s*/g, "")}</symbol>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg">\n${symbols.join("\n")}\n</svg>\n`;
}

function sha256(text) {
  return createHash("sha256").update(text).digest("hex");
}
