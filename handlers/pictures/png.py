"""A PNG writer that is as fast as the compressor behind it.

libpng's adaptive filter and zlib take 45 to 70 ms per megapixel of a photograph at their fastest level; one filter for
the whole picture and ISA-L's deflate take about 10, for files of the same size (bench/codecs.py).
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
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
_BLOCK = 1 << 18  # bytes that are filtered and compressed at a time: they stay in the processor's cache


def write_png(pixels: NDArray[Any], beside: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """HxW or HxWxC (C 1 to 4: grey, grey + alpha, RGB, RGBA), uint8 or uint16, as a PNG file.

    beside: further chunks (name, data), written before the pixels in this order. Format: PNG specification, third
    edition.
    """
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    depth = 8 * pixels.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, _COLOUR_TYPES[channels], 0, 0, 0)
    compressed = _compressed(pixels.reshape(height, width * channels))
    chunks = ((b"IHDR", header), *beside, *((b"IDAT", data) for data in compressed), (b"IEND", b""))
    return b"".join((b"\x89PNG\r\n\x1a\n", *(part for name, data in chunks for part in _chunk(name, data))))


def _compressed(rows: NDArray[Any]) -> Iterator[bytes]:
    stream = deflate.compressobj(LEVEL)
    for block in _filtered(rows):
        if data := stream.compress(block):
            yield data
    yield stream.flush()


def _filtered(rows: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    """Some rows at a time, each as bytes minus the one above (filter "Up") behind the byte that names the filter."""
    size = rows.shape[1] * rows.itemsize
    step = max(1, _BLOCK // size)
    above = np.zeros((1, size), np.uint8)
    for at in range(0, len(rows), step):
        stored = rows[at : at + step]
        stored = stored.astype(">u2").view(np.uint8) if rows.itemsize == 2 else stored
        filtered = np.empty((len(stored), size + 1), np.uint8)
        filtered[:, 0] = _UP
        np.subtract(stored[:1], above, out=filtered[:1, 1:])
        np.subtract(stored[1:], stored[:-1], out=filtered[1:, 1:])
        above = stored[-1:]
        yield filtered


def _chunk(name: bytes, data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    return struct.pack(">I", len(data)), name, data, struct.pack(">I", deflate.crc32(data, deflate.crc32(name)))
