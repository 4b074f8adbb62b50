"""A TIFF's strips or tiles -> samples.

Decoders of TIFF read some layouts, pass over what they do not know in others, and tell which is which nowhere: OpenCV
takes planes for pixels and leaves the rest of its memory as it was, Pillow cuts 16 bits to 8 and inverts what is not
inverted. So a decoder gets what every one reads rightly: the strips or tiles of one plane as a grey picture of 8 bits
whose rows are the file's own bytes. libtiff (through Pillow) undoes the compression; samples, planes and predictor are
put together here.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.pictures import tiff_tags as tags
from handlers.pictures.pixels import damaged, unsupported
from handlers.pictures.tiff_layout import Layout

_MOST_AT_ONCE = 80_000_000  # bytes; Pillow refuses 179 million pixels


def read_samples(layout: Layout) -> NDArray[Any]:
    """HxWxC as stored, without compression and predictor; C: layout.channels. Not for JPEG, which read_jpeg reads.

    uint8 of 0 to 2**layout.bits - 1, or uint16 for 16 bits. Raises NotAPicture where the data are damaged or do not fit
    the layout; Pillow's errors are let through.
    """
    if not layout.planar:
        return _plane(layout, layout.channels, layout.pieces)
    each = len(layout.pieces) // layout.channels
    planes = [_plane(layout, 1, layout.pieces[i * each : (i + 1) * each]) for i in range(layout.channels)]
    return np.concatenate(planes, axis=2)


def read_jpeg(layout: Layout) -> NDArray[np.uint8]:
    """HxW (grey, as stored) or HxWx3 (RGB, YCbCr turned into it), uint8, of JPEG in TIFF (technical note 2).

    libtiff decodes it as a whole. Raises as read_samples; NotAPicture also for what is neither grey, RGB nor YCbCr.
    """
    kinds = {(1, tags.WHITE_IS_ZERO): "L", (1, tags.BLACK_IS_ZERO): "L", (3, tags.RGB): "RGB", (3, tags.YCBCR): "RGB"}
    mode = kinds.get((layout.channels, layout.photometric))
    if mode is None or layout.bits != 8 or (layout.planar and layout.channels > 1):
        raise unsupported("a TIFF of such a kind compressed with JPEG")
    fields = {
        tags.WIDTH: [layout.width], tags.HEIGHT: [layout.height], tags.COMPRESSION: [tags.JPEG],
        tags.PHOTOMETRIC: [tags.BLACK_IS_ZERO if mode == "L" else layout.photometric],
        tags.SAMPLES: [layout.channels], tags.BITS: [8] * layout.channels,
    }  # fmt: skip
    if layout.tile:
        where = (tags.TILE_AT, tags.TILE_BYTES)
        fields |= {tags.TILE_WIDTH: [layout.tile[0]], tags.TILE_HEIGHT: [layout.tile[1]]}
    else:
        where = (tags.STRIP_AT, tags.STRIP_BYTES)
        fields[tags.ROWS] = [layout.rows]
    tables = layout.directory.value(tags.JPEG_TABLES)
    if layout.photometric == tags.YCBCR and (ratio := layout.directory.value(tags.SUBSAMPLING)):
        fields[tags.SUBSAMPLING] = list(struct.unpack(layout.order + "2H", ratio[:4]))
    strips = [memoryview(layout.data)[start : start + size] for start, size in layout.pieces]
    image = _opened(layout.order, fields, strips, where, {tags.JPEG_TABLES: tables} if tables else None)
    pixels = np.array(image)
    if image.mode != mode or pixels.shape[:2] != (layout.height, layout.width):
        raise damaged("its data are not what its header says")
    return pixels


def _plane(layout: Layout, channels: int, pieces: list[tuple[int, int]]) -> NDArray[Any]:
    """Samples of one plane: HxWxchannels."""
    if layout.tile is None:
        rows = _bytes(layout, channels, layout.width, layout.height, layout.rows, pieces)
        return _unpacked(layout, rows, layout.width, channels)
    # One tile beside the other, as rows of a picture that is one tile wide.
    (wide, high), (across, down) = layout.tile, layout.grid
    rows = _bytes(layout, channels, wide, high * len(pieces), high, pieces)
    tiles = _unpacked(layout, rows, wide, channels).reshape(down, across, high, wide, channels)
    joined = tiles.swapaxes(1, 2).reshape(down * high, across * wide, channels)
    return np.ascontiguousarray(joined[: layout.height, : layout.width])


def _bytes(
    layout: Layout, channels: int, width: int, height: int, rows: int, pieces: list[tuple[int, int]]
) -> NDArray[np.uint8]:
    """The rows as they were before compression: height x bytes of a row. rows: in each piece but the last."""
    length = -(-width * channels * layout.bits // 8)
    if length * height > 4 * max(1 << 24, 2 * layout.width * layout.height * channels):
        raise damaged("its tiles are larger than any picture")
    view = memoryview(layout.data)
    strips = [view[start : start + size] for start, size in pieces]
    counts = [min(rows, height - index * rows) for index in range(len(pieces))]
    if layout.compression in tags.FAX:
        if layout.bits * channels != 1:
            raise damaged("fax compression is for pictures of one bit")
        return np.packbits(_by_libtiff(layout, width, rows, strips, counts), axis=1)
    if layout.compression == tags.NONE:
        whole: list[bytes | memoryview] = [
            _exactly(strip, count * length) for strip, count in zip(strips, counts, strict=True)
        ]
    elif layout.compression in tags.DEFLATE and not layout.lsb_first:
        whole = [_inflated(strip, count * length) for strip, count in zip(strips, counts, strict=True)]
    else:
        return _by_libtiff(layout, length, rows, strips, counts)
    return np.frombuffer(b"".join(whole), np.uint8).reshape(height, length)


def _exactly(strip: bytes | memoryview, size: int) -> bytes | memoryview:
    if len(strip) < size:
        raise damaged("a strip or tile is shorter than its rows")
    return strip[:size]


def _inflated(strip: memoryview, size: int) -> bytes:
    try:
        data = zlib.decompressobj().decompress(strip, size)
    except zlib.error:
        raise damaged("a strip or tile cannot be decompressed") from None
    return bytes(_exactly(data, size))


def _by_libtiff(
    layout: Layout, width: int, rows: int, strips: list[memoryview], counts: list[int]
) -> NDArray[np.uint8]:
    """A grey picture of 8 bits (fax: of one, as 0 and 1) in the file's own strips, as many at once as Pillow takes."""
    is_fax = layout.compression in tags.FAX
    together = max(1, _MOST_AT_ONCE // (rows * width))
    parts = []
    for first in range(0, len(strips), together):
        height = sum(counts[first : first + together])
        fields = {
            tags.WIDTH: [width], tags.HEIGHT: [height], tags.BITS: [1 if is_fax else 8], tags.SAMPLES: [1],
            tags.COMPRESSION: [layout.compression], tags.PHOTOMETRIC: [tags.BLACK_IS_ZERO], tags.ROWS: [rows],
            tags.FILL_ORDER: [2 if layout.lsb_first else 1],
        }  # fmt: skip
        for tag in (tags.T4, tags.T6) if is_fax else ():
            if (value := layout.directory.whole(tag)) is not None:
                fields[tag] = [value]
        some = strips[first : first + together]
        pixels = np.array(_opened(layout.order, fields, some, (tags.STRIP_AT, tags.STRIP_BYTES)))
        if pixels.shape != (height, width):
            raise damaged("its data are not what its header says")
        parts.append(pixels.astype(np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _opened(
    order: str,
    fields: dict[int, list[int]],
    strips: list[memoryview],
    where: tuple[int, int],
    blobs: dict[int, bytes] | None = None,
) -> Image.Image:
    """What libtiff makes of the strips or tiles in a file of ours.

    fields: whole numbers by tag; blobs: bytes by tag. where: the tags of the offsets and sizes.
    """
    sizes = [len(strip) for strip in strips]
    offsets = [8]
    for size in sizes[:-1]:
        offsets.append(offsets[-1] + size)
    start = 8 + sum(sizes)
    values: dict[int, tuple[int, int, bytes]] = {
        tag: (4, len(numbers), struct.pack(f"{order}{len(numbers)}I", *numbers))
        for tag, numbers in {**fields, where[0]: offsets, where[1]: sizes}.items()
    }
    values |= {tag: (7, len(blob), blob) for tag, blob in (blobs or {}).items()}
    entries, behind = b"", b""
    for tag, (type_, count, packed) in sorted(values.items()):
        entries += struct.pack(order + "HHI", tag, type_, count)
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
        else:
            entries += struct.pack(order + "I", start + 2 + 12 * len(values) + 4 + len(behind))
            behind += packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    file = b"".join((head, *strips, struct.pack(order + "H", len(values)), entries, bytes(4), behind))
    image = Image.open(io.BytesIO(file), formats=["TIFF"])
    image.load()
    return image


def _unpacked(layout: Layout, rows: NDArray[np.uint8], width: int, channels: int) -> NDArray[Any]:
    """Rows of bytes -> HxWxchannels, without the predictor."""
    height = rows.shape[0]
    samples: NDArray[Any]
    if layout.bits == 16:
        samples = rows.view(layout.order + "u2").astype(np.uint16).reshape(height, width, channels)
    elif layout.bits == 8:
        samples = rows.reshape(height, width, channels)
    else:
        # libtiff has put the bits of what it decompressed into their order already.
        if layout.lsb_first and layout.compression == tags.NONE:
            rows = np.packbits(np.unpackbits(rows, axis=1, bitorder="little"), axis=1)
        bits = np.unpackbits(rows, axis=1)[:, : width * channels * layout.bits]
        weights = 1 << np.arange(layout.bits - 1, -1, -1, dtype=np.uint8)
        samples = (bits.reshape(height, width, channels, layout.bits) * weights).sum(axis=3, dtype=np.uint8)
    if layout.predictor == 2:
        samples = np.cumsum(samples, axis=1, dtype=samples.dtype)
    return samples
