"""A PNG writer that is as fast as the compressor behind it.

libpng's adaptive filter and zlib take 45 to 70 ms per megapixel of a photograph at their fastest level; one filter for
the whole picture and ISA-L's deflate take about 10, for files of the same size (bench/codecs.py).
"""

import struct
import zlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

deflate: ModuleType
try:
    from isal import isal_zlib as deflate
except ImportError:  # no ISA-L for this processor: the same pictures, slower
    deflate = zlib

LEVEL = 1
_UP = 2
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey and alpha, RGB, RGBA
# cap on one IDAT chunk's length, so that a reader can work in pieces
_CHUNK = 1 << 20


def write_png(pixels: NDArray[Any], beside: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """HxW or HxWxC (C 1 to 4: grey, grey + alpha, RGB, RGBA), uint8 or uint16, as a PNG file.

    beside: further chunks (name, data), written before the pixels in this order. Format: PNG specification, third
    edition.
    """
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    depth = 8 * pixels.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), *(_chunk(name, data) for name, data in beside)]
    data = deflate.compress(_filtered(pixels.reshape(height, width * channels)), LEVEL)
    chunks += [_chunk(b"IDAT", data[i : i + _CHUNK]) for i in range(0, len(data), _CHUNK)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _filtered(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Each row of bytes minus the one above (filter "Up"), behind the byte that names the filter."""
    stored = rows.astype(">u2").view(np.uint8) if rows.itemsize == 2 else rows
    filtered = np.empty((stored.shape[0], stored.shape[1] + 1), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = stored[0]
    np.subtract(stored[1:], stored[:-1], out=filtered[1:, 1:])
    return filtered


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", deflate.crc32(data, deflate.crc32(name)))
