// A mask on the screen: tinted, with an outline that is one pixel wide at every zoom.

const MOST_PIXELS = 1.6e6; // on a larger screen the overlay is coarser: it is drawn within a frame

/** @typedef {readonly [number, number, number]} Color */

/** Rare in photographs. @type {Color} */
export const MASK_COLOR = [92, 70, 255];

export class Overlay {
  constructor() {
    this.canvas = new OffscreenCanvas(1, 1);
    this.context = /** @type {OffscreenCanvasRenderingContext2D} */ (this.canvas.getContext("2d"));
  }

  /**
   * @param {CanvasRenderingContext2D} context @param {import("./mask.js").Mask} mask
   * @param {import("./mask.js").Box | null} bounds  of what is marked
   * @param {{x: number, y: number, scale: number}} view  in the canvas's pixels
   * @param {{fill: Color, line: Color, strength: number}} look
   */
  draw(context, mask, bounds, { x, y, scale }, { fill, line, strength }) {
    if (!bounds) return;
    const left = Math.max(0, Math.floor(x + bounds.left * scale) - 2);
    const top = Math.max(0, Math.floor(y + bounds.top * scale) - 2);
    const right = Math.min(context.canvas.width, Math.ceil(x + bounds.right * scale) + 2);
    const bottom = Math.min(context.canvas.height, Math.ceil(y + bounds.bottom * scale) + 2);
    if (right <= left || bottom <= top) return;
    const step = Math.max(1, Math.sqrt(((right - left) * (bottom - top)) / MOST_PIXELS));
    const width = Math.ceil((right - left) / step);
    const height = Math.ceil((bottom - top) / step);
    if (this.canvas.width < width || this.canvas.height < height) {
      Object.assign(this.canvas, { width: Math.max(width, this.canvas.width), height: Math.max(height, this.canvas.height) });
    }
    const pixels = this.context.createImageData(width, height);
    paint(new Uint32Array(pixels.data.buffer), width, height, mask, (left - x) / scale, (top - y) / scale, step / scale,
      packed(fill, strength), packed(line, 1));
    this.context.putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = step > 1;
    context.drawImage(this.canvas, 0, 0, width, height, left, top, width * step, height * step);
  }
}

/** @param {Color} color @param {number} alpha  as an ImageData has it on a little-endian machine */
const packed = ([red, green, blue], alpha) => ((Math.round(alpha * 255) << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/**
 * @param {Uint32Array} target @param {number} width @param {number} height @param {import("./mask.js").Mask} mask
 * @param {number} left @param {number} top @param {number} step  the picture's pixels per one here
 * @param {number} fill @param {number} line
 */
function paint(target, width, height, mask, left, top, step, fill, line) {
  const columns = Int32Array.from({ length: width }, (_, each) => {
    const x = Math.floor(left + (each + 0.5) * step);
    return x < 0 || x >= mask.width ? -1 : x;
  });
  let above = new Uint8Array(width);
  let here = new Uint8Array(width);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(top + (y + 0.5) * step);
    const inside = row >= 0 && row < mask.height;
    const start = row * mask.width;
    for (let x = 0; x < width; x++) here[x] = inside && columns[x] >= 0 ? mask.data[start + columns[x]] : 0;
    for (let x = 0, at = y * width; x < width; x++, at++) {
      const marked = here[x];
      if (marked !== (x ? here[x - 1] : 0) || marked !== above[x]) target[at] = line;
      else if (marked) target[at] = fill;
    }
    [above, here] = [here, above];
  }
}
