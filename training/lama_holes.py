"""Holes for the LaMa demo: thick strokes, boxes and object outlines, after LaMa's large-mask recipe.

Suvorov et al. 2022, section 3.3: a network that trains on wide holes learns to look far; narrow ones teach it to smear.
"""

import cv2
import numpy as np

from training.photographs import Split, cutouts, read_cutout

CUTOUT_LONGEST = 256
LARGEST = 0.5  # of the picture: more leaves too little to go on from
KINDS = ("strokes", "boxes", "object")


class Holes:
    """Draws holes; the object outlines are those of the cut-outs of `split`."""

    def __init__(self, split: Split) -> None:
        self._outlines = [_outline(read_cutout(path, CUTOUT_LONGEST)) for path in cutouts(split)]

    def draw(self, rng: np.random.Generator, height: int, width: int, kind: str) -> np.ndarray:
        """A hole of one of `KINDS`, bool (height, width), never empty and at most half of the picture."""
        while True:
            hole = np.zeros((height, width), np.uint8)
            if kind == "strokes":
                _strokes(rng, hole)
            elif kind == "boxes":
                _boxes(rng, hole)
            else:
                self._object(rng, hole)
            if 0.002 < hole.mean() < LARGEST:
                return hole.astype(bool)

    def _object(self, rng: np.random.Generator, hole: np.ndarray) -> None:
        """One or two outlines, somewhat widened as a user's mask is."""
        side = min(hole.shape)
        for _ in range(rng.integers(1, 3)):
            outline = self._outlines[rng.integers(len(self._outlines))]
            scale = side * rng.uniform(0.2, 0.75) / max(outline.shape)
            angle, mirror = rng.normal(0, 0.3), rng.choice([-1, 1])
            turn = scale * np.array([[np.cos(angle) * mirror, -np.sin(angle)], [np.sin(angle) * mirror, np.cos(angle)]])
            centre = rng.uniform(0.1, 0.9, 2) * hole.shape[::-1]
            shift = centre - turn @ (np.array(outline.shape[::-1]) / 2)
            size = (hole.shape[1], hole.shape[0])
            placed = cv2.warpAffine(outline, np.column_stack([turn, shift]), size, flags=cv2.INTER_LINEAR)
            width = 1 + 2 * int(rng.uniform(0, 0.02) * side)
            hole |= cv2.dilate((placed > 127).astype(np.uint8), np.ones((width, width), np.uint8))


def _outline(cutout: np.ndarray) -> np.ndarray:
    """uint8, 0 or 255, without the cut-out's own gaps: what lies between the legs is not always to be kept."""
    solid = ((cutout[..., 3] > 127) * 255).astype(np.uint8)
    return cv2.morphologyEx(solid, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))


def _strokes(rng: np.random.Generator, hole: np.ndarray) -> None:
    """One to four strokes of a wide brush that turns at random."""
    side = min(hole.shape)
    for _ in range(rng.integers(1, 5)):
        point = rng.uniform(0, 1, 2) * hole.shape[::-1]
        angle, brush = rng.uniform(0, 2 * np.pi), max(2, int(side * rng.uniform(0.05, 0.25)))
        for _ in range(rng.integers(1, 5)):
            angle += rng.normal(0, 0.8)
            end = point + side * rng.uniform(0.05, 0.3) * np.array([np.cos(angle), np.sin(angle)])
            cv2.line(hole, point.astype(int).tolist(), end.astype(int).tolist(), 1, brush)
            point = end


def _boxes(rng: np.random.Generator, hole: np.ndarray) -> None:
    side = min(hole.shape)
    for _ in range(rng.integers(1, 4)):
        width, height = (side * rng.uniform(0.1, 0.6, 2)).astype(int)
        left, top = rng.integers(hole.shape[1]), rng.integers(hole.shape[0])
        cv2.rectangle(hole, (left - width // 2, top - height // 2), (left + width // 2, top + height // 2), 1, -1)
