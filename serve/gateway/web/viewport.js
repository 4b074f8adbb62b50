// Which part of the picture is seen, and how large. Pure: points are [x, y]; lengths on the screen are CSS pixels.

/** @typedef {{scale: number, x: number, y: number}} Viewport  scale: screen per picture; x, y: its corner on the screen */
/** @typedef {{width: number, height: number}} Size */
/** @typedef {[number, number]} Point */

const MOST = 32;
const MARGIN = 24;

/** The whole picture, in the middle; small ones are not blown up. @param {Size} picture @param {Size} screen */
export function fitted(picture, screen, margin = MARGIN) {
  const room = { width: screen.width - 2 * margin, height: screen.height - 2 * margin };
  const scale = Math.max(0.001, Math.min(room.width / picture.width, room.height / picture.height, 4));
  return {
    scale,
    x: (screen.width - picture.width * scale) / 2,
    y: (screen.height - picture.height * scale) / 2,
  };
}

/**
 * Larger by a factor, with the point on the screen where it is.
 * @param {Viewport} view @param {number} factor @param {Point} at @param {Size} picture @param {Size} screen
 */
export function zoomed(view, factor, at, picture, screen) {
  const least = Math.min(fitted(picture, screen).scale, 1) / 2;
  const scale = Math.min(Math.max(view.scale * factor, least), MOST);
  const by = scale / view.scale;
  return inside({ scale, x: at[0] - (at[0] - view.x) * by, y: at[1] - (at[1] - view.y) * by }, picture, screen);
}

/** @param {Viewport} view @param {number} dx @param {number} dy @param {Size} picture @param {Size} screen */
export const panned = (view, dx, dy, picture, screen) =>
  inside({ ...view, x: view.x + dx, y: view.y + dy }, picture, screen);

/** Some of the picture stays in sight. @param {Viewport} view @param {Size} picture @param {Size} screen */
function inside(view, picture, screen) {
  const keep = 64;
  const clamped = (/** @type {number} */ at, /** @type {number} */ size, /** @type {number} */ room) =>
    Math.min(Math.max(at, Math.min(keep, room / 2) - size), room - Math.min(keep, room / 2));
  return {
    scale: view.scale,
    x: clamped(view.x, picture.width * view.scale, screen.width),
    y: clamped(view.y, picture.height * view.scale, screen.height),
  };
}

/** @param {Viewport} view @param {Point} point @returns {Point} */
export const toPicture = (view, [x, y]) => [(x - view.x) / view.scale, (y - view.y) / view.scale];

/** @param {Viewport} view @param {Point} point @returns {Point} */
export const toScreen = (view, [x, y]) => [x * view.scale + view.x, y * view.scale + view.y];
