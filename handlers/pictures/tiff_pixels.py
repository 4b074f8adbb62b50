"""TIFF -> samples as pictures have them: what stored ones mean, by photometric interpretation, palette and alpha."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.pictures import tiff_tags as tags
from handlers.pictures.exif import TiffData
from handlers.pictures.jpeg_pixels import from_cmyk
from handlers.pictures.pixels import Decoded, Palette, damaged, from_indices, unmultiplied, unsupported
from handlers.pictures.tiff_layout import COLOURS, Layout, read_layout
from handlers.pictures.tiff_samples import read_jpeg, read_samples


def decode(data: bytes) -> Decoded:
    """The first page that is no thumbnail and no mask, as stored: EXIF's orientation is the caller's to apply.

    Grey, palette and RGB of 1 to 8 and of 16 bits, with or without alpha; CMYK, YCbCr and CIELAB of 8 become sRGB.
    HxW or HxWx3 and, for alpha, HxW; uint8, those of fewer bits spread over 0..255, or uint16 for 16 bits.

    Raises:
      NotAPicture: damaged, or not supported, which is named. Of damaged data, Pillow's errors are let through.
      TooLarge: past one of handlers.pictures.limits.
    """
    layout, pages = read_layout(TiffData(data))
    notes = (f"holds {pages} pages; only the first was used",) if pages > 1 else ()
    decoded = _from_jpeg(layout) if layout.compression == tags.JPEG else _interpreted(layout, read_samples(layout))
    return decoded._replace(notes=notes + decoded.notes)


def _from_jpeg(layout: Layout) -> Decoded:
    pixels = read_jpeg(layout)
    return Decoded(~pixels if layout.photometric == tags.WHITE_IS_ZERO else pixels)


def _interpreted(layout: Layout, samples: NDArray[Any]) -> Decoded:
    colours = COLOURS[layout.photometric]
    if layout.photometric == tags.INDEXED:
        return _indexed(layout, samples)
    full = _spread(samples, layout.bits)
    alpha, premultiplied = _alpha(layout, full, colours)
    plain = full[..., :colours]
    if premultiplied and alpha is not None:
        plain = unmultiplied(plain, alpha)
    if layout.photometric in (tags.WHITE_IS_ZERO, tags.BLACK_IS_ZERO):
        grey = plain[..., 0]
        white_is_zero = layout.photometric == tags.WHITE_IS_ZERO
        one = 255 // (2**layout.bits - 1) if layout.bits < 8 else 1
        return Decoded(np.ascontiguousarray(~grey if white_is_zero else grey), alpha, one=one)
    if layout.photometric == tags.RGB:
        return Decoded(np.ascontiguousarray(plain), alpha)
    if layout.bits != 8:
        raise unsupported(f"a TIFF of {layout.bits} bits in CMYK, YCbCr or CIELAB", "send 8 bits, or RGB")
    size = (layout.width, layout.height)
    if layout.photometric == tags.SEPARATED:
        image = Image.frombytes("CMYK", size, np.ascontiguousarray(plain).tobytes())
        return from_cmyk(image, layout.directory.value(tags.PROFILE))._replace(alpha=alpha)
    if layout.photometric == tags.CIELAB:
        image = Image.frombytes("LAB", size, np.ascontiguousarray(plain).tobytes(), "raw", "LAB")
        rgb = np.array(image.convert("RGB"))
        return Decoded(rgb, alpha, notes=("was converted from LAB to RGB",), recoloured=True)
    return _from_ycbcr(layout, plain, alpha)


def _spread(samples: NDArray[Any], bits: int) -> NDArray[Any]:
    """Spreads samples of fewer than 8 bits over 0..255, so that white stays white."""
    return samples * np.uint8(255 // (2**bits - 1)) if bits < 8 else samples


def _alpha(layout: Layout, full: NDArray[Any], colours: int) -> tuple[NDArray[Any] | None, bool]:
    """The first extra sample that is alpha, and whether colours are multiplied by it. One of unknown use is none."""
    for index, kind in enumerate(layout.extra[: layout.channels - colours]):
        if kind in (1, 2):
            return np.ascontiguousarray(full[..., colours + index]), kind == 1
    return None, False


def _indexed(layout: Layout, samples: NDArray[Any]) -> Decoded:
    entries = 2**layout.bits
    given = layout.directory.value(tags.COLOUR_MAP)
    if given is None or len(given) < 6 * entries:
        raise damaged("it has no colour map")
    table = np.frombuffer(given[: 6 * entries], layout.order + "u2").reshape(3, entries).T
    # Some writers fill it with 8 bits.
    colours = (table if table.max() < 256 else table >> 8).astype(np.uint8)
    alpha, premultiplied = _alpha(layout, _spread(samples, layout.bits), 1)
    if premultiplied or (alpha is not None and alpha.dtype == np.uint16):
        raise unsupported("a palette TIFF with such alpha")
    indices = np.ascontiguousarray(samples[..., 0])
    if layout.bits == 16:
        return Decoded(colours[indices], palette=Palette(indices, colours))
    return from_indices(indices, colours.tobytes())._replace(alpha=alpha)


def _from_ycbcr(layout: Layout, plain: NDArray[np.uint8], alpha: NDArray[Any] | None) -> Decoded:
    """Converts YCbCr without subsampling, and with the usual reference levels only."""
    across_down = layout.directory.value(tags.SUBSAMPLING)
    if across_down is None or struct.unpack(layout.order + "2H", across_down[:4]) != (1, 1):
        raise unsupported("a TIFF of subsampled YCbCr that is not JPEG-compressed")
    if layout.directory.value(tags.REFERENCE) is not None:
        raise unsupported("a TIFF of YCbCr with reference levels of its own")
    image = Image.frombytes("YCbCr", (layout.width, layout.height), np.ascontiguousarray(plain).tobytes())
    return Decoded(np.array(image.convert("RGB")), alpha, notes=("was converted from YCbCr to RGB",), recoloured=True)
