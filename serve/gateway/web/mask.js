// Masks: one byte per pixel, 0 or 1, as large as the picture. What is kept of one are its runs.

/** @typedef {{left: number, top: number, right: number, bottom: number}} Box  right and bottom lie outside */
/** @typedef {{width: number, height: number, data: Uint8Array}} Mask */
/** @typedef {Uint32Array} Runs  lengths of stretches in reading order: unmarked, marked, unmarked, ... */

/** @param {number} width @param {number} height @returns {Mask} */
export const blank = (width, height) => ({ width, height, data: new Uint8Array(width * height) });

/** @param {Mask} mask @returns {Mask} */
export const copy = (mask) => ({ ...mask, data: mask.data.slice() });

/** @param {Mask} mask @returns {Runs} */
export function runsOf({ data }) {
  const eights = new Float64Array(data.buffer, data.byteOffset, data.length >> 3);
  const runs = [];
  let value = 0;
  let start = 0;
  while (start < data.length) {
    const end = endOf(data, eights, start, value);
    runs.push(end - start);
    start = end;
    value = 1 - value;
  }
  return Uint32Array.from(runs);
}

/** Eight unmarked and eight marked pixels, as one number: a large mask is mostly these. */
const EIGHT_OF = new Float64Array(new Uint8Array(16).fill(1, 8).buffer);

/**
 * Where a stretch of one value ends.
 * @param {Uint8Array} data @param {Float64Array} eights  the same memory @param {number} start @param {number} value
 */
function endOf(data, eights, start, value) {
  let at = start;
  for (; at % 8 && at < data.length; at++) if (data[at] !== value) return at;
  let eight = at >> 3;
  while (eight < eights.length && eights[eight] === EIGHT_OF[value]) eight++;
  for (at = Math.max(at, eight << 3); at < data.length; at++) if (data[at] !== value) return at;
  return at;
}

/** @param {Runs} runs @param {number} width @param {number} height @returns {Mask} */
export function fromRuns(runs, width, height) {
  const mask = blank(width, height);
  let at = 0;
  runs.forEach((length, each) => {
    if (each % 2) mask.data.fill(1, at, at + length);
    at += length;
  });
  return mask;
}

/** Whether anything is marked. @param {Runs} runs */
export const isEmpty = (runs) => runs.length < 2;

/** Pixels that are marked. @param {Runs} runs */
export const areaOf = (runs) => runs.reduce((sum, length, each) => sum + (each % 2 ? length : 0), 0);

/** The smallest box around what is marked. @param {Runs} runs @param {number} width @returns {Box | null} */
export function boundsOf(runs, width) {
  if (isEmpty(runs)) return null;
  const box = { left: width, top: Infinity, right: 0, bottom: 0 };
  let at = 0;
  runs.forEach((length, each) => {
    if (each % 2) {
      const [first, last] = [at, at + length - 1];
      const [top, bottom] = [Math.floor(first / width), Math.floor(last / width)];
      box.top = Math.min(box.top, top);
      box.bottom = Math.max(box.bottom, bottom + 1);
      box.left = Math.min(box.left, top === bottom ? first % width : 0);
      box.right = Math.max(box.right, top === bottom ? (last % width) + 1 : width);
    }
    at += length;
  });
  return box;
}

/**
 * Two masks of one size as one. how: "add" takes what either marks, "subtract" what the first marks and the second does
 * not.
 * @param {Mask} first @param {Mask} second @param {"add" | "subtract"} how @returns {Mask}
 */
export function combine(first, second, how) {
  const joined = copy(first);
  const { data } = joined;
  if (how === "add") for (let each = 0; each < data.length; each++) data[each] |= second.data[each];
  else for (let each = 0; each < data.length; each++) data[each] &= 1 - second.data[each];
  return joined;
}

/** @param {Mask} mask @returns {Mask} */
export function inverted(mask) {
  const other = copy(mask);
  for (let each = 0; each < other.data.length; each++) other.data[each] = 1 - other.data[each];
  return other;
}

/**
 * Grown by a disc of so many pixels; shrunk by it where they are negative. The picture's edge shrinks nothing.
 * @param {Mask} mask @param {number} pixels @returns {Mask}
 */
export function grown(mask, pixels) {
  if (pixels < 0) return inverted(grown(inverted(mask), -pixels));
  const { width, height } = mask;
  const bounds = boundsOf(runsOf(mask), width);
  const result = copy(mask);
  if (!bounds || !pixels) return result;
  const left = Math.max(0, bounds.left - pixels);
  const right = Math.min(width, bounds.right + pixels);
  const far = pixels + 1;
  // How far each pixel is from the nearest marked one in its column, up to `far`.
  const span = right - left;
  const top = Math.max(0, bounds.top - pixels);
  const bottom = Math.min(height, bounds.bottom + pixels);
  const distance = new Uint16Array(span * (bottom - top)).fill(far);
  for (let x = 0; x < span; x++) {
    for (let y = top, near = far; y < bottom; y++) {
      near = mask.data[y * width + left + x] ? 0 : Math.min(near + 1, far);
      distance[(y - top) * span + x] = near;
    }
    for (let y = bottom - 1, near = far; y >= top; y--) {
      near = Math.min(distance[(y - top) * span + x], near + 1);
      distance[(y - top) * span + x] = near;
    }
  }
  // Along a row each pixel reaches as far as the disc is wide there.
  const reach = Array.from({ length: far }, (_, away) => Math.floor(Math.sqrt(pixels ** 2 - away ** 2)));
  for (let y = top; y < bottom; y++) {
    const row = (y - top) * span;
    let until = left;
    for (let x = 0; x < span; x++) {
      const away = distance[row + x];
      if (away > pixels) continue;
      const from = Math.max(left + x - reach[away], left, away === 0 ? until : 0);
      const to = Math.min(left + x + reach[away] + 1, right);
      if (to > from) result.data.fill(1, y * width + from, y * width + to);
      if (away === 0) until = to;
    }
  }
  return result;
}

/**
 * As large as a picture of which it was made on a smaller copy; between its pixels the edge is a straight line.
 * @param {Mask} mask @param {number} width @param {number} height @param {Box} bounds  outside it nothing is marked
 * @returns {Mask}
 */
export function enlarged(mask, width, height, bounds) {
  if (mask.width === width && mask.height === height) return mask;
  const result = blank(width, height);
  const columns = cells(width, mask.width);
  const rows = cells(height, mask.height);
  for (let down = bounds.top; down <= bounds.bottom; down++) {
    const above = mask.data.subarray(Math.max(0, down - 1) * mask.width).subarray(0, mask.width);
    const below = mask.data.subarray(Math.min(mask.height - 1, down) * mask.width).subarray(0, mask.width);
    const [full, mixed] = kinds(above, below, columns.starts, bounds);
    for (let y = rows.starts[down]; y < rows.starts[down + 1]; y++) {
      const row = y * width;
      for (let each = 0; each < full.length; each += 2) result.data.fill(1, row + full[each], row + full[each + 1]);
      for (const cell of mixed) {
        const [a, b] = [Math.max(0, cell - 1), Math.min(mask.width - 1, cell)];
        const left = above[a] + rows.parts[y] * (below[a] - above[a]);
        const right = above[b] + rows.parts[y] * (below[b] - above[b]);
        for (let x = columns.starts[cell]; x < columns.starts[cell + 1]; x++) {
          if (left + columns.parts[x] * (right - left) >= 0.5) result.data[row + x] = 1;
        }
      }
    }
  }
  return result;
}

/**
 * Cell n lies between the centres of a smaller row's pixels n - 1 and n. starts: where each begins in the larger row;
 * parts: how far from the one centre to the other each pixel is.
 * @param {number} size @param {number} smaller
 */
function cells(size, smaller) {
  const at = Float64Array.from({ length: size }, (_, each) => ((each + 0.5) * smaller) / size - 0.5);
  const starts = new Uint32Array(smaller + 2).fill(size);
  for (let each = size - 1; each >= 0; each--) starts[Math.floor(at[each]) + 1] = each;
  for (let cell = smaller; cell >= 0; cell--) starts[cell] = Math.min(starts[cell], starts[cell + 1]);
  return { starts, parts: at.map((value) => value - Math.floor(value)) };
}

/**
 * Between two rows: stretches of the larger row whose cells are marked at every corner, and the cells at an edge.
 * @param {Uint8Array} above @param {Uint8Array} below @param {Uint32Array} starts @param {Box} bounds
 * @returns {[number[], number[]]} from, to, from, to, ...; cells
 */
function kinds(above, below, starts, { left, right }) {
  /** @type {number[]} */ const full = [];
  /** @type {number[]} */ const mixed = [];
  const last = above.length - 1;
  const outside = Math.max(0, left - 1);
  for (let cell = left, before = above[outside] + below[outside]; cell <= right; cell++) {
    const here = above[Math.min(cell, last)] + below[Math.min(cell, last)];
    if (before + here === 4) {
      if (full[full.length - 1] === starts[cell]) full[full.length - 1] = starts[cell + 1];
      else full.push(starts[cell], starts[cell + 1]);
    } else if (before + here) mixed.push(cell);
    before = here;
  }
  return [full, mixed];
}

/**
 * A round brush's way from one point to another, marked or unmarked; returns what it touched.
 * @param {Mask} mask @param {[number, number]} from @param {[number, number]} to @param {number} radius
 * @param {0 | 1} value @returns {Box}
 */
export function stroke(mask, from, to, radius, value) {
  const box = {
    left: Math.max(0, Math.floor(Math.min(from[0], to[0]) - radius)),
    top: Math.max(0, Math.floor(Math.min(from[1], to[1]) - radius)),
    right: Math.min(mask.width, Math.ceil(Math.max(from[0], to[0]) + radius) + 1),
    bottom: Math.min(mask.height, Math.ceil(Math.max(from[1], to[1]) + radius) + 1),
  };
  const [dx, dy] = [to[0] - from[0], to[1] - from[1]];
  const length = dx * dx + dy * dy;
  for (let y = box.top; y < box.bottom; y++) {
    for (let x = box.left; x < box.right; x++) {
      const [px, py] = [x + 0.5 - from[0], y + 0.5 - from[1]];
      const along = length ? Math.max(0, Math.min(1, (px * dx + py * dy) / length)) : 0;
      const [ax, ay] = [px - along * dx, py - along * dy];
      if (ax * ax + ay * ay <= radius * radius) mask.data[y * mask.width + x] = value;
    }
  }
  return box;
}
