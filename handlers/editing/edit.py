"""A picture while a model repaints it, crop by crop: what is outside the mask can't change."""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from handlers.editing.geometry import Fit, Piece
from handlers.editing.imaging import distance_inside
from handlers.pictures.picture import RGB, Mask, Picture, Samples, from_rgb, to_rgb

Model = Callable[[RGB, Mask], RGB]
"""(HxWx3 uint8, HxW bool: what is unknown) -> HxWx3 uint8."""


class Edit:
    """`picture` with the pixels of `mask` repainted.

    Exactness: every sample outside the mask stays what it was, whatever the model does, at 8 and at 16 bits. Inside,
    pixels around which the model changes nothing stay, too; so with a model that returns what it is shown the result
    is the input bit for bit, at every size, mask, crop and scale. At scale 1 a changed pixel is exactly the model's
    (grey pictures: its luma; 16 bits: times 257). At other scales it is the model's picture resampled, never mixed with
    what was there before: an erased object leaves no trace.

    feather: over this many px from the mask's edge inwards the paint fades in; nothing fades outside.
    """

    def __init__(self, picture: Picture, mask: Mask, feather: int = 0) -> None:
        self._original, self._mask, self._feather = picture, mask, feather
        self._samples = picture.samples.copy()
        self._unknown = mask.copy()

    @property
    def picture(self) -> Picture:
        return self._original._replace(samples=self._samples)

    def repaint(self, piece: Piece, fit: Fit, model: Model) -> None:
        """Shows the model one crop and takes what it paints in the piece's hole; later pieces see it as known."""
        samples, unknown = piece.box.of(self._samples), piece.box.of(self._unknown)
        shown = fit.put(to_rgb(samples))
        painted = model(shown, fit.put_mask(unknown))
        changed = piece.hole & fit.take_mask(_differs(painted, shown))
        paint = from_rgb(fit.take(painted), like=samples)
        if self._feather:
            weight = distance_inside(piece.box.of(self._mask)) / np.float32(self._feather + 1)
            paint = _blend(samples, paint, weight.clip(max=1))
        cv2.copyTo(paint, changed.view(np.uint8), samples)
        unknown[piece.hole] = False


def _differs(a: RGB, b: RGB) -> Mask:
    """HxW bool: where any channel differs; several times as fast as numpy's any()."""
    return np.asarray(cv2.inRange(cv2.absdiff(a, b), (0, 0, 0), (0, 0, 0)) == 0)


def _blend(below: Samples, above: Samples, weight: NDArray[np.float32]) -> Samples:
    """weight HxW 0..1, of `above`."""
    weight = weight if below.ndim == 2 else weight[..., None]
    return (below + (above.astype(np.float32) - below) * weight).round().astype(below.dtype)
