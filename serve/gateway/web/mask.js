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
  const runs = [];
  let value = 0;
  let start = 0;
  while (start < data.length) {
    let end = data.indexOf(1 - value, start);
    if (end < 0) end = data.length;
    runs.push(end - start);
    start = end;
    value = 1 - value;
  }
  return Uint32Array.from(runs);
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
 * Two masks of one size as one. how: "replace" takes the second alone, "add" what either marks, "subtract" what the
 * first marks and the second does not.
 * @param {Mask} first @param {Mask} second @param {"replace" | "add" | "subtract"} how @returns {Mask}
 */
export function combine(first, second, how) {
  if (how === "replace") return copy(second);
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
 * @param {Mask} mask @param {number} width @param {number} height @returns {Mask}
 */
export function enlarged(mask, width, height) {
  if (mask.width === width && mask.height === height) return mask;
  const result = blank(width, height);
  const bounds = boundsOf(runsOf(mask), mask.width);
  if (!bounds) return result;
  const [across, down] = [mask.width / width, mask.height / height];
  const left = Math.max(0, Math.floor((bounds.left - 1) / across));
  const right = Math.min(width, Math.ceil((bounds.right + 1) / across));
  const bottom = Math.min(height, Math.ceil((bounds.bottom + 1) / down));
  const columns = between(left, right, across, mask.width);
  const rows = between(0, height, down, mask.height);
  for (let y = Math.max(0, Math.floor((bounds.top - 1) / down)); y < bottom; y++) {
    const above = rows.first[y] * mask.width;
    const below = rows.second[y] * mask.width;
    for (let x = left, each = 0; x < right; x++, each++) {
      const [a, b] = [columns.first[each], columns.second[each]];
      const upper = mask.data[above + a] + columns.part[each] * (mask.data[above + b] - mask.data[above + a]);
      const lower = mask.data[below + a] + columns.part[each] * (mask.data[below + b] - mask.data[below + a]);
      if (upper + rows.part[y] * (lower - upper) >= 0.5) result.data[y * width + x] = 1;
    }
  }
  return result;
}

/** Between which two of a smaller row's pixels each pixel lies. @param {number} start @param {number} end @param {number} scale @param {number} size */
function between(start, end, scale, size) {
  const at = Float64Array.from({ length: end - start }, (_, each) => (start + each + 0.5) * scale - 0.5);
  return {
    first: Int32Array.from(at, (value) => Math.max(0, Math.floor(value))),
    second: Int32Array.from(at, (value) => Math.min(size - 1, Math.floor(value) + 1)),
    part: Float64Array.from(at, (value) => value - Math.floor(value)),
  };
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
