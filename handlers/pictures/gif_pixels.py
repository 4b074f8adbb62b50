"""GIF -> samples: the first frame, on the screen that the file describes."""

import io
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.pictures.containers import GIF_CONTROL, GIF_FRAME, gif_blocks
from handlers.pictures.pixels import Decoded, check_decoded, check_size, damaged, from_indices, unsupported

_HAS_COLOURS, _INTERLACED, _HAS_TRANSPARENT = 0x80, 0x40, 1


class _Frame(NamedTuple):
    """codes: its compressed indices, as they are in the file. transparent: an index."""

    left: int
    top: int
    width: int
    height: int
    interlaced: bool
    colours: bytes
    transparent: int | None
    codes: memoryview


def decode(data: bytes) -> Decoded:
    """Grey or RGB of 8 bits; transparent where its colour is, and where the frame leaves the screen free, as viewers
    show it. Raises NotAPicture or TooLarge.
    """
    frame, several = _first(data)
    wide, high = struct.unpack_from("<HH", data, 6)
    width, height = max(wide, frame.left + frame.width), max(high, frame.top + frame.height)
    check_size(frame.width, frame.height, len(data))
    check_size(width, height, len(data))
    inside = np.s_[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width]
    indices = np.zeros((height, width), np.uint8)
    indices[inside] = _indices(frame)
    alphas = b"" if frame.transparent is None else b"\xff" * frame.transparent + b"\0"
    decoded = from_indices(indices, frame.colours, alphas)
    if (frame.width, frame.height) != (width, height):
        alpha = np.zeros((height, width), np.uint8)
        alpha[inside] = 255 if decoded.alpha is None else decoded.alpha[inside]
        decoded = decoded._replace(alpha=alpha)
    return decoded._replace(notes=("holds several frames; only the first was used",) if several else ())


def _first(data: bytes) -> tuple[_Frame, bool]:
    """Decodes the first picture, and says whether there are more."""
    if data[:6] not in (b"GIF87a", b"GIF89a") or len(data) < 13:
        raise damaged("its header is broken")
    transparent: int | None = None
    first: _Frame | None = None
    for label, head, body in gif_blocks(data):
        if label == GIF_CONTROL and len(body) > 4 and body[0] >= 4:
            transparent = body[4] if body[1] & _HAS_TRANSPARENT else None
        elif label == GIF_FRAME and first is not None:
            return first, True
        elif label == GIF_FRAME:
            left, top, width, height, flags = struct.unpack_from("<4HB", head)
            colours = bytes(head[9:] if flags & _HAS_COLOURS else _shared_colours(data))
            first = _Frame(left, top, width, height, bool(flags & _INTERLACED), colours, transparent, body)
    if first is None:
        raise damaged("it has no frame, or ends before it")
    return first, False


def _shared_colours(data: bytes) -> bytes:
    if not data[10] & _HAS_COLOURS:
        raise unsupported("a GIF without colours of its own")
    return data[13 : 13 + 3 * 2 ** (1 + (data[10] & 7))]


def _indices(frame: _Frame) -> NDArray[np.uint8]:
    """Pillow undoes the compression, and refuses what has too few pixels: a file of this frame alone, without colours,
    is grey to it."""
    if not frame.codes or not 1 <= frame.codes[0] <= 8:
        raise damaged("its indices are not of 1 to 8 bits")
    screen = struct.pack("<2H3x", frame.width, frame.height)
    place = struct.pack("<4HB", 0, 0, frame.width, frame.height, _INTERLACED * frame.interlaced)
    file = b"".join((b"GIF89a", screen, b",", place, frame.codes, b"\0;"))
    pixels = np.array(Image.open(io.BytesIO(file), formats=["GIF"]))
    return check_decoded(pixels, frame.height, frame.width, 8)
