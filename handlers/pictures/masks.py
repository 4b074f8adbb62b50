"""What a picture marks when it is sent as a mask. The first rule that fits holds:

- The picture to edit with a transparent hole (as picture-editing services take it): the hole.
- What is partly transparent and of many colours, but not the picture: refused, nobody can tell what it marks.
- Transparent pixels are not marked: white strokes on nothing are a mask, and so are coloured ones.
- Label maps such as VOC's. A palette picture with colours, or one too dark for white: every index but 0, where index 0
  is black; else every colour but black. RGB of a few flat colours: every colour but black.
- Only 0 and 1, of any depth: 1 marks.
- White on black, of any depth or format: 128 and more of 255 in the brightest channel.
"""

import cv2
import numpy as np

from handlers.pictures.picture import RGB, Mask, Picture, Samples, to_rgb
from handlers.pictures.pixels import Decoded, NotAPicture, Palette

WHAT_A_MASK_IS = (
    "a mask is white (128 or more of 255) where to change and black elsewhere, or transparent elsewhere; or the picture"
    " itself with a transparent hole"
)
WHAT_TRANSPARENCY_MARKS = "a mask is fully transparent (alpha 0) where to change, and not elsewhere"
_ALIKE = 20  # of 255, on average: how far a copy of few colours, or of another profile, may be from the picture
_WHITE = 255 - _ALIKE
_MOST = 0.9  # of the pixels that show
_STROKES = 3  # colours of 5 bits a channel that make up that many: white, black and one more
_LABELS = 32  # colours in a map of labels; more than that is shades
_FEW = 10_000  # pixels
_DARKEST_LABEL = 32  # of 255, in the brightest channel: as in VOC's. What is darker is the noise of compression


def mask_of(decoded: Decoded, picture: Picture) -> Mask:
    """HxW bool: True where marked. Raises NotAPicture where it can't be told what is.

    decoded: upright, as large as `picture`, the one to edit.
    """
    alpha, palette = decoded.alpha, decoded.palette
    samples = _grey_where_it_is(decoded.samples)
    most = np.iinfo(samples.dtype).max
    hole = None if alpha is None or alpha.min() > most // 2 else alpha <= most // 2
    if hole is not None and hole.all():
        return ~hole
    if hole is not None:
        samples = cv2.copyTo(samples, (~hole).view(np.uint8))  # black, where it is transparent
        if _shows(picture, to_rgb(samples), hole):
            return hole
    labelled = _by_index(palette, hole) if palette else _by_colour(samples)
    if hole is not None:
        most_colours = _STROKES if palette is None or labelled is None else _LABELS
        if (colours := _colours(to_rgb(samples)[~hole])) > most_colours:
            raise NotAPicture(
                f"is partly transparent, of {colours} colours elsewhere, and not the picture: {WHAT_A_MASK_IS}"
            )
    if labelled is not None:
        return labelled if hole is None else labelled & ~hole
    brightest = _brightest(samples)
    if brightest.max() <= decoded.one:
        return np.asarray(brightest > 0)
    if alpha is not None:
        brightest = brightest.astype(np.uint32) * alpha // most
    return np.asarray(brightest > most // 2)


def transparent_in(decoded: Decoded) -> Mask:
    """HxW bool: True where fully transparent, whatever the colours. Raises NotAPicture where nothing can be."""
    if decoded.alpha is None:
        raise NotAPicture(f"has no transparency: {WHAT_TRANSPARENCY_MARKS}")
    return np.asarray(decoded.alpha == 0)


def _grey_where_it_is(samples: Samples) -> Samples:
    """HxW where all channels are one another's like: most masks are, and each step takes a third of the time then."""
    if samples.ndim == 2:
        return samples
    red, green, blue = cv2.split(samples)
    return red if np.array_equal(red, green) and np.array_equal(red, blue) else samples


def _shows(picture: Picture, rgb: RGB, hole: Mask) -> bool:
    """Whether what shows around the hole is the picture, if not to the bit. Else it is strokes or labels.

    Raises NotAPicture where it may be both.
    """
    shown = (~hole).view(np.uint8)
    if max(cv2.mean(cv2.absdiff(rgb, picture.rgb), shown)) > _ALIKE:
        return False
    white = cv2.inRange(rgb, (_WHITE,) * 3, (255,) * 3)
    if cv2.copyTo(cv2.bitwise_not(white), shown).any():
        return True
    raise NotAPicture(
        "may be white strokes, or the picture with a transparent hole and white elsewhere: send it white on black"
    )


def _by_index(palette: Palette, hole: Mask | None) -> Mask | None:
    """None where black, white and greys are all that shows."""
    indices = palette.indices if hole is None else palette.indices[~hole]
    colours = palette.colours[np.flatnonzero(np.bincount(indices.ravel()))]
    if _is_grey(colours) and colours.max() >= 128:
        return None
    if not palette.colours[0].any():
        return np.asarray(palette.indices != 0)
    coloured = np.asarray(palette.colours.any(axis=1))
    return np.asarray(coloured[palette.indices])


def _by_colour(samples: Samples) -> Mask | None:
    """None where white and black, or shades, are all there is."""
    if samples.ndim == 2:
        return None
    rgb = to_rgb(samples)
    brightest = _brightest(rgb)
    is_dark = (brightest > 0) & (brightest < 128)
    if not is_dark.any() or brightest[is_dark].min() < _DARKEST_LABEL or _is_grey(rgb):
        return None
    red, green, blue = (channel[is_dark].astype(np.int32) for channel in cv2.split(rgb))
    keys = red << 16 | green << 8 | blue
    # A few of them tell of most photographs that they are no labels.
    few = len(np.unique(keys[:_FEW])) <= _LABELS and len(np.unique(keys)) <= _LABELS
    return brightest > 0 if few else None


def _brightest(samples: Samples) -> Samples:
    """HxW: each pixel's brightest channel; many times as fast as numpy's max() along an axis of three."""
    if samples.ndim == 2:
        return samples
    red, green, blue = cv2.split(samples)
    return np.asarray(cv2.max(cv2.max(red, green), blue))


def _is_grey(colours: RGB) -> bool:
    red, green, blue = (colours[..., i] for i in range(3))
    return bool((red == green).all() and (red == blue).all())


def _colours(pixels: RGB) -> int:
    """How many colours, of 5 bits a channel, make up most of the pixels (Nx3)."""
    red, green, blue = (pixels[:, channel].astype(np.int32) >> 3 for channel in range(3))
    keys = red << 10 | green << 5 | blue
    counts = np.sort(np.bincount(keys, minlength=1))[::-1]
    return int(np.searchsorted(np.cumsum(counts), _MOST * len(pixels))) + 1
