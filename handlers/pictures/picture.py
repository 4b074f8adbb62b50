"""A picture as every part of a handler sees it: samples, transparency, and what the file said beside them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from handlers.pictures.exif import Exif
from handlers.pictures.resolution import Resolution

Mask = NDArray[np.bool_]
"""HxW bool: True where a model may change the picture."""

RGB = NDArray[np.uint8]
"""HxWx3 uint8, RGB, 0..255: what the models work on."""

Box = tuple[int, int, int, int]
"""left, top, right, bottom of a rectangle of pixels: left and top inside, right and bottom outside."""

Samples = NDArray[Any]
"""HxW (grey) or HxWx3 (RGB), uint8 or uint16: as stored in the file."""


class JpegCoding(NamedTuple):
    """How a JPEG was compressed.

    tables: quantization tables, 64 values row by row, of the first components; the last one is that of the others, too.
    subsampling: Pillow's name of the chroma's. rgb: stored as RGB, not as YCbCr.
    """

    tables: tuple[tuple[int, ...], ...]
    subsampling: int
    rgb: bool = False


class Metadata(NamedTuple):
    """What a file said beside its pixels, as far as a reply keeps it.

    content_type: the format of a reply in "the input's own" format.
    icc: colour profile. exif: upright, without thumbnail. xmp: a packet of UTF-8 XML.
    png_colour: a PNG's colour chunks, and png_text its text chunks: (name, data).
    comment: a JPEG's. jpeg: where the file was a JPEG.
    text: further text for a PNG, by keyword; replaces what png_text says under it.
    """

    content_type: str = "image/png"
    icc: bytes | None = None
    exif: Exif = Exif()
    xmp: bytes | None = None
    resolution: Resolution | None = None
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    png_text: tuple[tuple[bytes, bytes], ...] = ()
    comment: bytes | None = None
    jpeg: JpegCoding | None = None
    text: Mapping[str, str] = MappingProxyType({})


class Picture(NamedTuple):
    """An upright picture.

    alpha: HxW in the samples' dtype. notes: for the client, each to follow a field's name.
    """

    samples: Samples
    alpha: Samples | None = None
    metadata: Metadata = Metadata()
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.samples.shape[1], self.samples.shape[0]

    @property
    def rgb(self) -> RGB:
        """The samples for a model; a copy only where they are not RGB of 8 bits already."""
        return to_rgb(self.samples)

    def cropped(self, box: Box) -> "Picture":
        """What lies in the box. Of what the file said only how its colours are meant, and the further text."""
        columns, rows = slice(box[0], box[2]), slice(box[1], box[3])
        said = self.metadata
        return Picture(
            np.ascontiguousarray(self.samples[rows, columns]),
            None if self.alpha is None else np.ascontiguousarray(self.alpha[rows, columns]),
            Metadata(said.content_type, said.icc, png_colour=said.png_colour, jpeg=said.jpeg, text=said.text),
        )


def to_rgb(samples: Samples) -> RGB:
    """Samples of either kind and depth -> HxWx3 uint8; 16 bits keep their upper 8."""
    eight_bit = samples if samples.dtype == np.uint8 else (samples >> 8).astype(np.uint8)
    return eight_bit if eight_bit.ndim == 3 else np.repeat(eight_bit[..., None], 3, axis=2)


def from_rgb(rgb: RGB, like: Samples) -> Samples:
    """HxWx3 uint8 -> samples of `like`'s kind (grey: luma) and depth (16 bits: times 257, so that white stays white).

    A grey value that went through to_rgb comes back as it was.
    """
    plain = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY) if like.ndim == 2 else rgb
    return np.asarray(plain) if like.dtype == np.uint8 else plain.astype(np.uint16) * np.uint16(257)
