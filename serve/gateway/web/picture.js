// The pixels on the screen: the picture at several sizes, so that a large one is drawn as fast as a small one.

import { MASK_COLOR } from "./overlay.js";

const SMALLEST = 1024; // pixels of the longer side below which no smaller copy is worth its memory

/** A picture with halves, quarters... of it. */
export class Picture {
  /** @param {ImageBitmap | OffscreenCanvas} source  a bitmap is closed, a canvas becomes its own */
  constructor(source) {
    this.width = source.width;
    this.height = source.height;
    this.levels = [source instanceof OffscreenCanvas ? source : canvasOf(source, source.width, source.height)];
    if (source instanceof ImageBitmap) source.close();
    for (let last = this.levels[0]; Math.max(last.width, last.height) > 2 * SMALLEST; ) {
      last = canvasOf(last, Math.ceil(last.width / 2), Math.ceil(last.height / 2));
      this.levels.push(last);
    }
  }

  /**
   * Draws it with its corner at x, y. scale: of the canvas's pixels per the picture's.
   * @param {CanvasRenderingContext2D | OffscreenCanvasRenderingContext2D} context
   * @param {number} x @param {number} y @param {number} scale
   */
  draw(context, x, y, scale) {
    const deep = Math.max(0, Math.min(this.levels.length - 1, Math.floor(Math.log2(1 / scale) + 0.1)));
    const level = this.levels[deep];
    context.imageSmoothingEnabled = scale < 3;
    context.imageSmoothingQuality = "medium";
    const by = level.width / this.width;
    // Only what is seen: a canvas scales all that it is given.
    const { width, height } = context.canvas;
    const left = Math.max(0, Math.floor((-x / scale) * by));
    const top = Math.max(0, Math.floor((-y / scale) * by));
    const right = Math.min(level.width, Math.ceil(((width - x) / scale) * by));
    const bottom = Math.min(level.height, Math.ceil(((height - y) / scale) * by));
    if (right <= left || bottom <= top) return;
    const each = scale / by;
    context.drawImage(level, left, top, right - left, bottom - top,
      x + left * each, y + top * each, (right - left) * each, (bottom - top) * each);
  }

  /** Another picture, with a patch in its place. @param {ImageBitmap} patch  is closed @param {number} left @param {number} top */
  with(patch, left, top) {
    const canvas = canvasOf(this.levels[0], this.width, this.height);
    const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
    context.clearRect(left, top, patch.width, patch.height); // what is transparent in it covers, too
    context.drawImage(patch, left, top);
    patch.close();
    return new Picture(canvas);
  }

  /** @returns {Promise<Blob>} */
  png() {
    return this.levels[0].convertToBlob({ type: "image/png" });
  }
}

/** @param {CanvasImageSource} source @param {number} width @param {number} height */
function canvasOf(source, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingQuality = "medium";
  context.drawImage(source, 0, 0, width, height);
  return canvas;
}

/** A small copy with the mask on it, as a data URI. @param {Picture} picture @param {import("./mask.js").Mask} mask */
export function thumbnail(picture, mask) {
  const scale = 112 / Math.max(picture.width, picture.height);
  const [width, height] = [Math.max(1, Math.round(picture.width * scale)), Math.max(1, Math.round(picture.height * scale))];
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  picture.draw(context, 0, 0, scale);
  const pixels = context.getImageData(0, 0, width, height);
  for (let y = 0, at = 0; y < height; y++) {
    const row = Math.min(mask.height - 1, Math.floor((y + 0.5) / scale)) * mask.width;
    for (let x = 0; x < width; x++, at += 4) {
      if (!mask.data[row + Math.min(mask.width - 1, Math.floor((x + 0.5) / scale))]) continue;
      for (let each = 0; each < 3; each++) pixels.data[at + each] = (pixels.data[at + each] + MASK_COLOR[each] * 1.5) / 2.5;
    }
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/webp", 0.8);
}
