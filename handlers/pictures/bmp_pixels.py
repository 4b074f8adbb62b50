"""BMP -> samples.

Its pixels lie in the file nearly as in memory, and no decoder reads all of its layouts rightly: OpenCV loses its way in
skips of run-length codes, Pillow in grey palettes of 4 bits; neither knows all bit masks.

Source: Microsoft's BITMAPINFOHEADER to BITMAPV5HEADER; OS/2's of 12 and 64 bytes.
"""

import struct
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from handlers.pictures.pixels import Decoded, check_size, damaged, from_indices, unsupported

_OS2_1, _OS2_2 = 12, 64
_HEADERS = (_OS2_1, 40, 52, 56, _OS2_2, 108, 124)
_PLAIN, _RLE8, _RLE4, _MASKS, _MASKS_AND_ALPHA = 0, 1, 2, 3, 6
_BITS = {
    _PLAIN: (1, 2, 4, 8, 16, 24, 32), _RLE8: (8,), _RLE4: (4,), _MASKS: (16, 32), _MASKS_AND_ALPHA: (16, 32),
}  # fmt: skip
_USUAL_MASKS = {16: (0x7C00, 0x3E0, 0x1F, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}
_END_OF_ROW, _END, _SKIP = 0, 1, 2
_NAMES = {4: "JPEG", 5: "PNG"}
_MOST_CODES = 1_000_000  # of a run-length coded picture: each is read by itself


class _Layout(NamedTuple):
    header: int
    width: int
    height: int
    top_down: bool
    bits: int
    compression: int
    colours: int  # in the palette; 0 for as many as there can be
    start: int  # of the pixels


def decode(data: bytes) -> Decoded:
    """Grey or RGB of 8 bits, with alpha where there is a mask for it; fewer bits a channel are spread over 0..255.

    Raises NotAPicture, which names what is not supported, or TooLarge.
    """
    layout = _layout(data)
    if layout.compression in (_RLE8, _RLE4):
        return from_indices(np.ascontiguousarray(_unrolled(data, layout)[::-1]), _palette(data, layout))
    stored = _rows(data, layout)
    rows = stored if layout.top_down else stored[::-1]
    if layout.bits <= 8:
        return from_indices(_unpacked(rows, layout.bits)[:, : layout.width], _palette(data, layout))
    if layout.bits == 24:
        bgr = rows[:, : 3 * layout.width].reshape(layout.height, layout.width, 3)
        return Decoded(np.ascontiguousarray(bgr[..., ::-1]))
    return _masked(rows.view(f"<u{layout.bits // 8}")[:, : layout.width], _masks(data, layout))


def _layout(data: bytes) -> _Layout:
    if len(data) < 26:
        raise damaged("it has no header")
    start, header = struct.unpack_from("<II", data, 10)
    if header not in _HEADERS:
        raise unsupported(f"a BMP with a header of {header} bytes")
    if len(data) < 14 + header:
        raise damaged("its header ends too early")
    colours = compression = 0
    if header == _OS2_1:
        width, height, _, bits = struct.unpack_from("<4H", data, 18)
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        (colours,) = struct.unpack_from("<I", data, 46)
    if width < 0:
        raise damaged(f"its header says {width} pixels across")
    check_size(width, abs(height), len(data))
    if compression not in _BITS or (header == _OS2_2 and compression >= _MASKS):
        raise unsupported(f"a BMP compressed with {_NAMES.get(compression, f'method {compression}')}")
    if bits not in _BITS[compression]:
        raise unsupported(f"a BMP of {bits} bits a pixel with method {compression}")
    if compression in (_RLE8, _RLE4) and height < 0:
        raise damaged("what is run-length coded goes upwards")
    if start < 14 + header:
        raise damaged("its pixels begin inside its header")
    return _Layout(header, width, abs(height), height < 0, bits, compression, colours, start)


def _rows(data: bytes, layout: _Layout) -> NDArray[np.uint8]:
    """HEIGHTxBYTES, as they lie in the file; of the last one the padding may be missing."""
    used, length = -(-layout.width * layout.bits // 8), -(-layout.width * layout.bits // 32) * 4
    stored = data[layout.start : layout.start + length * layout.height]
    if len(stored) < length * (layout.height - 1) + used:
        raise damaged("it ends too early")
    return np.frombuffer(stored.ljust(length * layout.height, b"\0"), np.uint8).reshape(layout.height, length)


def _palette(data: bytes, layout: _Layout) -> bytes:
    """Red, green and blue of each index."""
    size = 3 if layout.header == _OS2_1 else 4
    begin = 14 + layout.header
    count = min(layout.colours or 2**layout.bits, 2**layout.bits, (layout.start - begin) // size)
    table = np.frombuffer(data[begin : begin + count * size], np.uint8).reshape(-1, size)
    return table[:, 2::-1].tobytes()


def _unpacked(rows: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Indices of 1 to 8 bits, the leftmost in a byte's upper ones."""
    if bits == 8:
        return np.ascontiguousarray(rows)
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    return ((rows[..., None] >> shifts) & np.uint8(2**bits - 1)).reshape(len(rows), -1)


def _masks(data: bytes, layout: _Layout) -> tuple[int, ...]:
    """Returns the masks of red, green, blue and alpha, which may have none."""
    if layout.compression == _PLAIN:
        return _USUAL_MASKS[layout.bits]
    has_alpha = layout.compression == _MASKS_AND_ALPHA or layout.header >= 56
    count = 4 if has_alpha else 3
    if len(data) < 54 + 4 * count:
        raise damaged("its header ends too early")
    return (*struct.unpack_from(f"<{count}I", data, 54), 0)[:4]


def _masked(values: NDArray[Any], masks: tuple[int, ...]) -> Decoded:
    """values: HxW of 16 or 32 bits."""
    *colours, alpha = masks
    given = [mask for mask in masks if mask]
    if not all(colours) or sum(given) != reduce(or_, given) or max(given) >> 8 * values.itemsize:
        raise damaged("the bit masks of its channels are none")
    return Decoded(np.dstack([_channel(values, mask) for mask in colours]), _channel(values, alpha) if alpha else None)


def _channel(values: NDArray[Any], mask: int) -> NDArray[np.uint8]:
    """HxW: the bits of the mask, spread over 0..255."""
    low = mask & -mask
    most = mask // low
    if most & (most + 1):
        raise damaged("the bit masks of its channels are none")
    if most > 255:
        raise unsupported(f"a BMP of {most.bit_length()} bits a channel")
    spread = (np.arange(most + 1) * 255 + most // 2) // most
    return spread.astype(np.uint8)[(values & mask) // low]


def _unrolled(data: bytes, layout: _Layout) -> NDArray[np.uint8]:
    """HxW, in the file's order: what run-length codes say, of whole bytes or of halves. What they skip is 0."""
    width, height, halves = layout.width, layout.height, layout.compression == _RLE4
    indices = bytearray(width * height)
    at, x, y = layout.start, 0, 0
    for _ in range(_MOST_CODES):
        if y >= height:
            break
        if at + 2 > len(data):
            if y == height - 1 and x >= width:
                break  # only the end's own code is missing
            raise damaged("it ends too early")
        count, value = data[at], data[at + 1]
        at += 2
        if count == 0 and value == _END:
            break
        if count == 0 and value == _END_OF_ROW:
            x, y = 0, y + 1
        elif count == 0 and value == _SKIP:
            right, up = data[at : at + 2].ljust(2, b"\0")
            at, x, y = at + 2, x + right, y + up
        else:
            if count:
                run = (bytes((value >> 4, value & 15)) * (count // 2 + 1) if halves else bytes((value,)) * count)[
                    :count
                ]
            else:
                size = -(-value // 2) if halves else value
                run = data[at : at + size]
                run = bytes(half for byte in run for half in (byte >> 4, byte & 15))[:value] if halves else run
                at += size + size % 2
            run = run[: max(0, width - x)]
            indices[y * width + x : y * width + x + len(run)] = run
            x += len(run)
    else:
        raise unsupported(f"a BMP of more than {_MOST_CODES:,} run-length codes")
    return np.frombuffer(indices, np.uint8).reshape(height, width)
