"""A TIFF writer for what Pillow has none for: RGB of 16 bits, alpha of 16 bits, and EXIF kept byte for byte.

Uncompressed: LZW saves an eighth of a photograph.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.pictures.exif import Entry, Exif, entry, write_exif
from handlers.pictures.exif_tags import ICC, LONG, SHORT, UNDEFINED, XMP

_STRIP = 1 << 20  # bytes, so that a reader can work in pieces


def write_tiff(
    pixels: NDArray[Any],
    exif: Exif = Exif(),  # noqa: B008  (a NamedTuple: nobody can change it)
    resolution: tuple[Entry, ...] = (),
    icc: bytes | None = None,
    xmp: bytes | None = None,
) -> bytes:
    """HxW or HxWxC (C 1 to 4: grey, grey + alpha, RGB, RGBA), uint8 or uint16, as a TIFF file in exif's byte order.

    exif: without entries of `resolution`, which are in the same byte order.
    """
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    order, row = exif.order, width * channels * pixels.itemsize
    rows = max(1, _STRIP // row)
    sizes = [min(rows, height - top) * row for top in range(0, height, rows)]

    def number(tag: int, *values: int, type_: int = SHORT) -> Entry:
        return entry(order, tag, type_, *values)

    entries = [
        number(0x100, width, type_=LONG),
        number(0x101, height, type_=LONG),
        number(0x102, *[8 * pixels.itemsize] * channels),
        number(0x103, 1),  # no compression
        number(0x106, 2 if channels > 2 else 1),  # RGB, or grey with 0 for black
        number(0x115, channels),
        number(0x116, rows, type_=LONG),
        number(0x117, *sizes, type_=LONG),
        number(0x11C, 1),  # the samples of a pixel side by side
        *resolution,
    ]
    if channels in (2, 4):
        entries.append(number(0x152, 2))  # the last sample: alpha that the colours aren't multiplied by
    if xmp:
        entries.append(Entry(XMP, 1, len(xmp), xmp))
    if icc:
        entries.append(Entry(ICC, UNDEFINED, len(icc), icc))

    def head(start: int) -> bytes:
        offsets = [start + sum(sizes[:1]) * index for index in range(len(sizes))]
        return write_exif(exif, [*entries, number(0x111, *offsets, type_=LONG)])

    stored = np.ascontiguousarray(pixels.astype(pixels.dtype.newbyteorder(order), copy=False))
    return b"".join((head(len(head(0))), stored.data))
