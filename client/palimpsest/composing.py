"""A patch put into the picture that it changes: the same samples as the whole result has, or not at all."""

import io
from collections.abc import Iterable
from contextlib import closing

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom are the first outside."""

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
# What Pillow reads as the server does, in one mode; of palettes and bits it reads the samples once it is converted.
_MODES = {
    "PNG": ("L", "LA", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("L", "RGB", "I;16"),
}
_CONVERTED = ("1", "P")
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
_TIFF_OF_JPEG = ("jpeg", "old_jpeg", "tiff_jpeg")


def opened(data: bytes) -> Image.Image:
    """The picture of a file, upright."""
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image)


def marked(mask: bytes) -> NDArray[np.bool_]:
    """HxW bool: what a grey file marks, by 128 and more of 255."""
    return np.asarray(opened(mask).convert("L")) > 127


def size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height of the upright picture, by its header; None where Pillow can't read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _upright_size(image)
    except _UNREADABLE:
        return None


def fits(below: bytes, patch: bytes, size: tuple[int, int] | None) -> bool:
    """Whether composed() of the patch and such a file is, sample for sample, what the server makes of them.

    Pillow has no mode for RGB of 16 bits, and reads such files, whole or patch, alike as their upper 8. size: of the
    upright picture as the server has it, where that is known. Reads headers only.
    """
    try:
        with Image.open(io.BytesIO(below)) as image, Image.open(io.BytesIO(patch)) as changed:
            if getattr(image, "is_animated", False) or image.format not in _MODES:
                return False
            if size is not None and _upright_size(image) != size:
                return False
            if image.mode in _CONVERTED:
                return image.format == "PNG"
            if image.format == "TIFF" and image.info.get("compression") in _TIFF_OF_JPEG:
                return False
            return image.mode == changed.mode and image.mode in _MODES[image.format]
    except _UNREADABLE:
        return False


def composed(below: bytes, patches: Iterable[tuple[bytes, Box]]) -> Image.Image:
    """The file's picture with the patches in it, one after the other."""
    image = opened(below)
    for patch, (left, top, right, bottom) in patches:
        with closing(Image.open(io.BytesIO(patch))) as changed:
            if image.mode != changed.mode:
                image = image.convert(changed.mode)
            pixels = np.array(image)
            pixels[top:bottom, left:right] = np.asarray(changed)
        image = Image.fromarray(pixels)
    return image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    # Pillow says of a TIFF how large it is once it is upright; of a PNG its own getexif decodes the pixels.
    turned = image.format != "TIFF" and Image.Image.getexif(image).get(_ORIENTATION) in _TURNED
    return (height, width) if turned else (width, height)
