// The canvas: draws picture, mask and cursor when one of them has changed, at most once a frame.
import { effect } from "@preact/signals-core";
import * as state from "./state.js";
import { MASK_COLOR, Overlay } from "./overlay.js";
import { fitted, panned, toPicture, toScreen, zoomed } from "./viewport.js";
import { boundsOf, runsOf, blank } from "./mask.js";

/** @typedef {import("./viewport.js").Point} Point */
/** @typedef {import("./mask.js").Mask} Mask */
/** @typedef {import("./picture.js").Picture} Picture */

const MASK = { fill: MASK_COLOR, line: /** @type {const} */ ([255, 255, 255]), strength: 0.5 };
const HOVER = { fill: /** @type {const} */ ([255, 255, 255]), line: /** @type {const} */ ([255, 255, 255]), strength: 0.3 };

/** What is on the canvas. Whoever changes it calls redraw(). */
export class Stage {
  /** @param {HTMLCanvasElement} element */
  constructor(element) {
    this.element = element;
    this.context = /** @type {CanvasRenderingContext2D} */ (element.getContext("2d", { alpha: false }));
    /** @type {Picture | null} */ this.picture = null;
    /** @type {Picture | null} */ this.original = null;
    /** @type {Mask} */ this.mask = blank(1, 1);
    /** @type {import("./mask.js").Box | null} */ this.maskBounds = null;
    /** @type {{mask: Mask, bounds: import("./mask.js").Box | null} | null} */ this.hover = null;
    this.view = { scale: 1, x: 0, y: 0 };
    this.follows = true; // the window's size, until the user zooms or pans
    this.split = 0.5;
    /** @type {{from: Point, to: Point} | null} */ this.box = null;
    /** @type {{at: Point, radius: number} | null} */ this.brush = null;
    /** @type {Point | null} */ this.cross = null;
    this.overlays = [new Overlay(), new Overlay()];
    this.waiting = false;
    new ResizeObserver(() => this.resized()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    effect(() => {
      void [state.comparing.value, state.peeking.value, state.variants.value];
      this.redraw();
    });
  }

  get screen() {
    return { width: this.element.clientWidth, height: this.element.clientHeight };
  }

  /** @param {Picture} picture @param {Picture} original */
  show(picture, original) {
    const isNew = this.original !== original;
    [this.picture, this.original] = [picture, original];
    if (isNew) this.fit();
    this.redraw();
  }

  /** @param {Mask} mask @param {import("./mask.js").Box | null} bounds  of what is marked */
  showMask(mask, bounds) {
    [this.mask, this.maskBounds] = [mask, bounds];
    this.redraw();
  }

  /** @param {Mask | null} mask */
  showHover(mask) {
    if (!mask && !this.hover) return;
    this.hover = mask && { mask, bounds: boundsOf(runsOf(mask), mask.width) };
    this.redraw();
  }

  fit() {
    if (!this.picture) return;
    this.follows = true;
    this.view = fitted(this.picture, this.screen);
    this.redraw();
  }

  /** @param {number} factor @param {Point} [at]  on the screen */
  zoom(factor, at = [this.screen.width / 2, this.screen.height / 2]) {
    if (!this.picture) return;
    this.follows = false;
    this.view = zoomed(this.view, factor, at, this.picture, this.screen);
    this.redraw();
  }

  /** @param {number} dx @param {number} dy */
  pan(dx, dy) {
    if (!this.picture) return;
    this.follows = false;
    this.view = panned(this.view, dx, dy, this.picture, this.screen);
    this.redraw();
  }

  /** A point of the window in the picture. @param {Point} point @returns {Point} */
  pictureAt([x, y]) {
    const box = this.element.getBoundingClientRect();
    return toPicture(this.view, [x - box.left, y - box.top]);
  }

  resized() {
    const ratio = devicePixelRatio;
    Object.assign(this.element, {
      width: Math.round(this.element.clientWidth * ratio),
      height: Math.round(this.element.clientHeight * ratio),
    });
    if (this.picture) this.view = this.follows ? fitted(this.picture, this.screen) : panned(this.view, 0, 0, this.picture, this.screen);
    this.draw(); // at once: a canvas is empty after its size changed
  }

  redraw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const { context, element, picture } = this;
    const ratio = devicePixelRatio;
    context.fillStyle = getComputedStyle(element).backgroundColor;
    context.fillRect(0, 0, element.width, element.height);
    if (!picture || !this.original) return;
    const view = { x: this.view.x * ratio, y: this.view.y * ratio, scale: this.view.scale * ratio };
    const shown = state.peeking.value ? this.original : picture;
    backdrop(context, view, picture);
    shown.draw(context, view.x, view.y, view.scale);
    if (state.comparing.value) {
      this.drawOriginalHalf(view, this.original);
    } else if (!state.peeking.value && !state.variants.value) {
      if (this.hover) this.overlays[1].draw(context, this.hover.mask, this.hover.bounds, view, HOVER);
      this.overlays[0].draw(context, this.mask, this.maskBounds, view, MASK);
      this.drawMarks(ratio);
    }
  }

  /** @param {{x: number, y: number, scale: number}} view @param {Picture} original */
  drawOriginalHalf(view, original) {
    const { context, element } = this;
    const at = Math.round(this.split * element.width);
    context.save();
    context.beginPath();
    context.rect(0, 0, at, element.height);
    context.clip();
    original.draw(context, view.x, view.y, view.scale);
    context.restore();
    context.fillStyle = "#fff";
    context.fillRect(at - 1, 0, 2, element.height);
  }

  /** @param {number} ratio */
  drawMarks(ratio) {
    const { context } = this;
    context.save();
    context.scale(ratio, ratio);
    if (this.box) {
      const [x1, y1] = toScreen(this.view, this.box.from);
      const [x2, y2] = toScreen(this.view, this.box.to);
      twice(context, () => context.strokeRect(x1, y1, x2 - x1, y2 - y1), [6, 4]);
    }
    if (this.brush) {
      const [x, y] = toScreen(this.view, this.brush.at);
      const radius = this.brush.radius * this.view.scale;
      twice(context, () => {
        context.beginPath();
        context.arc(x, y, Math.max(radius, 2), 0, 2 * Math.PI);
        context.stroke();
      });
    }
    if (this.cross) {
      const [x, y] = toScreen(this.view, this.cross);
      twice(context, () => {
        context.beginPath();
        for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
          context.moveTo(x + dx * 4, y + dy * 4);
          context.lineTo(x + dx * 14, y + dy * 14);
        }
        context.stroke();
      });
    }
    context.restore();
  }
}

/** A line that is seen on every picture. @param {CanvasRenderingContext2D} context @param {() => void} draw */
function twice(context, draw, dashes = /** @type {number[]} */ ([])) {
  context.setLineDash([]);
  context.lineWidth = 3.5;
  context.strokeStyle = "rgb(0 0 0 / 55%)";
  draw();
  context.setLineDash(dashes);
  context.lineWidth = 1.5;
  context.strokeStyle = "#fff";
  draw();
}

/** Squares, where the picture is transparent. @param {CanvasRenderingContext2D} context
 * @param {{x: number, y: number, scale: number}} view @param {Picture} picture */
function backdrop(context, { x, y, scale }, picture) {
  context.fillStyle = (squares ??= /** @type {CanvasPattern} */ (context.createPattern(tile(), "repeat")));
  const left = Math.max(0, x);
  const top = Math.max(0, y);
  context.fillRect(left, top, Math.min(context.canvas.width, x + picture.width * scale) - left,
    Math.min(context.canvas.height, y + picture.height * scale) - top);
}

/** @type {CanvasPattern | undefined} */
let squares;

function tile() {
  const canvas = new OffscreenCanvas(16, 16);
  const context = /** @type {OffscreenCanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.fillStyle = "#fff";
  context.fillRect(0, 0, 16, 16);
  context.fillStyle = "#dcdcdc";
  context.fillRect(0, 0, 8, 8);
  context.fillRect(8, 8, 8, 8);
  return canvas;
}
