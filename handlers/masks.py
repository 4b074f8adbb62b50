"""What a picture marks when it is sent as a mask.

- White on black, of any depth or format: 128 and more of 255 in the brightest channel. Only 0 and 1: 1 marks.
- Transparent pixels are not marked: white strokes on nothing are a mask, too, and so are coloured ones.
- A palette picture with colours, or one too dark for white (label maps such as VOC's): every index but 0, where index 0
  is black or transparent; else every colour but black.
- The photograph itself with a transparent hole (as picture-editing services take it): the hole. A picture counts as one
  if what shows of it needs many colours. Between that and strokes nobody can tell, and it is refused.
"""

import numpy as np
from numpy.typing import NDArray

from handlers.picture import Mask, to_rgb
from handlers.pixels import Decoded, NotAPicture, Palette

THRESHOLD = 128
"""Of 255, for white and for what is opaque."""

WHAT_A_MASK_IS = (
    "a mask is white (128 or more of 255) where to change and black elsewhere, or transparent elsewhere; or the picture"
    " itself with a transparent hole"
)
_MOST = 0.9  # of the pixels that show
_STROKES = 3  # colours of 5 bits a channel that make up that many: white, black and one more
_PHOTOGRAPH = 8  # more than so many do in a photograph


def mask_of(decoded: Decoded) -> Mask:
    """HxW bool: True where marked. Raises NotAPicture where strokes and photograph can't be told apart."""
    if decoded.palette is not None and (marked := _by_label(decoded.palette, decoded.alpha)) is not None:
        return marked
    rgb = to_rgb(decoded.samples)
    white = rgb.max(axis=2)
    opacity = None if decoded.alpha is None else to_rgb(decoded.alpha)[..., 0]
    if opacity is not None and opacity.min() < THRESHOLD:
        colours = _colours(rgb[opacity >= THRESHOLD])
        if colours > _PHOTOGRAPH:
            return np.asarray(opacity < THRESHOLD)
        if colours > _STROKES:
            raise NotAPicture(f"is partly transparent, and of {colours} colours elsewhere: {WHAT_A_MASK_IS}")
    if opacity is not None:
        white = (white.astype(np.uint16) * opacity // 255).astype(np.uint8)
    return np.asarray(white >= (1 if white.max() == 1 else THRESHOLD))


def _by_label(palette: Palette, alpha: NDArray[np.uint8] | None) -> Mask | None:
    """None where the palette is that of a mask in black, white and greys."""
    used = np.flatnonzero(np.bincount(palette.indices.ravel(), minlength=256))
    colours = palette.colours[used]
    grey = bool((colours == colours[:, :1]).all())
    if grey and colours.max() >= THRESHOLD:
        return None
    zero_is_nothing = not palette.colours[0].any() or (alpha is not None and not alpha[palette.indices == 0].any())
    by_index = palette.indices != 0
    by_colour = np.asarray(palette.colours.any(axis=1))[palette.indices]
    marked = by_index if zero_is_nothing or grey else by_colour
    return np.asarray(marked if alpha is None else marked & (alpha >= THRESHOLD))


def _colours(pixels: NDArray[np.uint8]) -> int:
    """How many colours, of 5 bits a channel, make up most of the pixels (Nx3)."""
    if not len(pixels):
        return 0
    keys = (pixels >> 3).astype(np.int32) @ np.array([1024, 32, 1], np.int32)
    counts = np.sort(np.bincount(keys, minlength=1))[::-1]
    return int(np.searchsorted(np.cumsum(counts), _MOST * len(pixels))) + 1
