"""TIFF -> samples.

Decoders of TIFF read some layouts, pass over what they do not know in others, and tell which is which nowhere: OpenCV
takes planes for pixels and leaves the rest of its memory as it was, Pillow cuts 16 bits to 8 and inverts what is not
inverted. So the layout is read here, and a decoder gets what every one reads rightly: the strips or tiles of one plane
as a grey picture of 8 bits whose rows are the file's own bytes. libtiff (through Pillow) undoes the compression;
samples, planes, predictor, photometric interpretation and alpha are put together here.

Source: TIFF 6.0 (Adobe, 1992) and its technical notes; BigTIFF (Aware Systems, 2007).
"""

import io
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.exif import Directory, TiffData
from handlers.jpeg_pixels import from_cmyk
from handlers.limits import LIMITS
from handlers.pixels import Decoded, TooLarge, check_size, damaged, from_indices, unmultiplied, unsupported

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_AT, _SAMPLES, _ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_T4, _T6, _PREDICTOR, _COLOUR_MAP = 292, 293, 317, 320
_TILE_WIDTH, _TILE_HEIGHT, _TILE_AT, _TILE_BYTES = 322, 323, 324, 325
_EXTRA, _FORMAT, _JPEG_TABLES, _SUBSAMPLING, _REFERENCE, _PROFILE = 338, 339, 347, 530, 532, 34675
_KIND, _OLD_KIND = 254, 255

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INDEXED, _TRANSPARENCY, _SEPARATED, _YCBCR, _CIELAB = 0, 1, 2, 3, 4, 5, 6, 8
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _INDEXED: 1, _SEPARATED: 4, _YCBCR: 3, _CIELAB: 3}
_LOSSLESS = {1: "", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate"}
_DEFLATE, _FAX, _JPEG = (8, 32946), (2, 3, 4), 7
_MOST_AT_ONCE = 80_000_000  # bytes; Pillow refuses 179 million pixels
_NAMES = {
    6: "old-style JPEG", 34661: "JBIG", 34676: "LogLuv", 34677: "LogLuv", 34712: "JPEG 2000", 34887: "LERC",
    34925: "LZMA", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_MOST_PAGES, _MOST_PIECES = 100, 200_000
_MOST_CHANNELS = 16
_MOST_BITS = 64  # of a pixel, in a picture of as many pixels as there may be


class _Layout(NamedTuple):
    """Of one page. pieces: offset and bytes of each strip or tile, plane after plane. tile: (width, height) of one."""

    data: bytes
    order: str
    width: int
    height: int
    bits: int
    channels: int
    extra: tuple[int, ...]
    photometric: int
    compression: int
    predictor: int
    planar: bool
    lsb_first: bool
    tile: tuple[int, int] | None
    rows: int
    pieces: list[tuple[int, int]]
    directory: Directory


def decode(data: bytes) -> Decoded:
    """The first page that is no thumbnail and no mask, as stored: EXIF's orientation is the caller's to apply.

    Grey, palette and RGB of 1 to 8 and of 16 bits, with or without alpha; CMYK and CIELAB of 8 become sRGB.
    Raises NotAPicture, which names what is not supported, or TooLarge.
    """
    tiff = TiffData(data)
    page, pages = _page(tiff)
    layout = _layout(tiff, page)
    notes = (f"holds {pages} pages; only the first was used",) if pages > 1 else ()
    decoded = _decode_jpeg(layout) if layout.compression == _JPEG else _interpreted(layout, _samples(layout))
    return decoded._replace(notes=notes + decoded.notes)


def _page(tiff: TiffData) -> tuple[Directory, int]:
    """The page to show, and how many there are, thumbnails and masks not counted."""
    pages: list[Directory] = []
    seen: set[int] = set()
    at = tiff.first
    while at and at not in seen and len(seen) < _MOST_PAGES:
        seen.add(at)
        directory = tiff.directory(at)
        if _WIDTH in directory.entries:
            pages.append(directory)
        at = directory.next
    if not pages:
        raise damaged("it has no page")
    whole = [page for page in pages if not (page.whole(_KIND) or 0) & 5 and page.whole(_OLD_KIND) != 2]
    return (whole or pages)[0], max(1, len(whole))


def _layout(tiff: TiffData, page: Directory) -> _Layout:
    def number(tag: int, default: int = 0) -> int:
        value = page.whole(tag)
        return default if value is None else value

    width, height = number(_WIDTH), number(_HEIGHT)
    check_size(width, height, len(tiff.data))
    compression, photometric = number(_COMPRESSION, 1), number(_PHOTOMETRIC, -1)
    channels = number(_SAMPLES, 1)
    if not 1 <= channels <= _MOST_CHANNELS:
        raise unsupported(f"a TIFF of {channels} samples a pixel")
    formats = set(_numbers(tiff, page, _FORMAT)) & set(_FORMATS)
    bits = set(_numbers(tiff, page, _BITS)[:channels]) or {1}
    if formats:
        raise unsupported(f"a TIFF of {max(bits)}-bit {_FORMATS[formats.pop()]} samples", "send 8 or 16 bits")
    if len(bits) > 1 or not bits <= {1, 2, 4, 8, 16}:
        raise unsupported(f"a TIFF of {' and '.join(map(str, sorted(bits)))} bits a sample", "send 8 or 16 bits")
    if compression not in (*_LOSSLESS, *_FAX, _JPEG):
        raise unsupported(f"a TIFF compressed with {_NAMES.get(compression, f'method {compression}')}")
    if photometric not in _COLOURS:
        raise unsupported(f"a TIFF of photometric interpretation {photometric}")
    if channels < _COLOURS[photometric]:
        raise unsupported(f"a TIFF of {channels} samples a pixel")
    if width * height * channels * max(bits) > LIMITS.max_pixels * _MOST_BITS:
        raise TooLarge(f"has {channels} samples of {max(bits)} bits in each of {width}x{height} pixels")
    predictor = number(_PREDICTOR, 1) if compression in (5, 8, 32946) else 1
    if predictor not in (1, 2) or (predictor == 2 and bits <= {1, 2, 4}):
        raise unsupported(f"a TIFF with predictor {predictor}")
    tiled = _TILE_WIDTH in page.entries
    offsets = _numbers(tiff, page, _TILE_AT if tiled else _STRIP_AT)
    sizes = _numbers(tiff, page, _TILE_BYTES if tiled else _STRIP_BYTES)
    layout = _Layout(
        data=bytes(tiff.data),
        order=tiff.order,
        width=width,
        height=height,
        bits=bits.pop(),
        channels=channels,
        extra=tuple(_numbers(tiff, page, _EXTRA)),
        photometric=photometric,
        compression=compression,
        predictor=predictor,
        planar=number(_PLANAR, 1) == 2 and channels > 1,
        lsb_first=number(_FILL_ORDER, 1) == 2,
        tile=(number(_TILE_WIDTH), number(_TILE_HEIGHT)) if tiled else None,
        rows=min(number(_ROWS, height) or height, height),
        pieces=[],
        directory=page,
    )
    return layout._replace(pieces=_pieces(layout, offsets, sizes))


def _numbers(tiff: TiffData, page: Directory, tag: int) -> list[int]:
    code = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}.get(page.entries.get(tag, (0, 0, 0))[0])
    value = page.value(tag)
    if code is None or value is None:
        return []
    count = len(value) // struct.calcsize(code)
    if count > _MOST_PIECES:
        raise damaged(f"it lists more than {_MOST_PIECES:,} strips or tiles")
    return list(struct.unpack(f"{tiff.order}{count}{code}", value))


def _pieces(layout: _Layout, offsets: list[int], sizes: list[int]) -> list[tuple[int, int]]:
    """All of them, each inside the file."""
    across, down = 1, -(-layout.height // layout.rows)
    if layout.tile:
        if not all(0 < side <= 1 << 16 for side in layout.tile):
            raise damaged(f"its tiles are of {layout.tile[0]}x{layout.tile[1]} pixels")
        across, down = -(-layout.width // layout.tile[0]), -(-layout.height // layout.tile[1])
    count = across * down * (layout.channels if layout.planar else 1)
    if len(sizes) < len(offsets) == 1 and layout.compression == 1:
        sizes = [len(layout.data) - offsets[0]]  # old writers left it out
    if len(offsets) < count or len(sizes) < count:
        raise damaged(f"it has {min(len(offsets), len(sizes))} of {count} strips or tiles")
    pieces = list(zip(offsets[:count], sizes[:count], strict=True))
    if any(not size or start + size > len(layout.data) for start, size in pieces):
        raise damaged("a strip or tile lies outside the file")
    return pieces


# From bytes to samples


def _samples(layout: _Layout) -> NDArray[Any]:
    """HxWxC, uint8 (values of the file's own bits) or uint16."""
    if not layout.planar:
        return _plane(layout, layout.channels, layout.pieces)
    each = len(layout.pieces) // layout.channels
    planes = [_plane(layout, 1, layout.pieces[i * each : (i + 1) * each]) for i in range(layout.channels)]
    return np.concatenate(planes, axis=2)


def _plane(layout: _Layout, channels: int, pieces: list[tuple[int, int]]) -> NDArray[Any]:
    """Samples of one plane: HxWxchannels."""
    if layout.tile is None:
        rows = _bytes(layout, channels, layout.width, layout.height, layout.rows, pieces)
        return _unpacked(layout, rows, layout.width, channels)
    # One tile beside the other, as rows of a picture that is one tile wide.
    (wide, high), (across, down) = layout.tile, _grid(layout)
    rows = _bytes(layout, channels, wide, high * len(pieces), high, pieces)
    tiles = _unpacked(layout, rows, wide, channels).reshape(down, across, high, wide, channels)
    joined = tiles.swapaxes(1, 2).reshape(down * high, across * wide, channels)
    return np.ascontiguousarray(joined[: layout.height, : layout.width])


def _grid(layout: _Layout) -> tuple[int, int]:
    assert layout.tile is not None
    return -(-layout.width // layout.tile[0]), -(-layout.height // layout.tile[1])


def _bytes(
    layout: _Layout, channels: int, width: int, height: int, rows: int, pieces: list[tuple[int, int]]
) -> NDArray[np.uint8]:
    """The rows as they were before compression: height x bytes of a row. rows: in each piece but the last."""
    length = -(-width * channels * layout.bits // 8)
    if length * height > 4 * max(1 << 24, 2 * layout.width * layout.height * channels):
        raise damaged("its tiles are larger than any picture")
    view = memoryview(layout.data)
    strips = [view[start : start + size] for start, size in pieces]
    counts = [min(rows, height - index * rows) for index in range(len(pieces))]
    if layout.compression in _FAX:
        if layout.bits * channels != 1:
            raise damaged("fax compression is for pictures of one bit")
        return np.packbits(_by_libtiff(layout, width, rows, strips, counts), axis=1)
    if layout.compression == 1:
        whole: list[bytes | memoryview] = [
            _exactly(strip, count * length) for strip, count in zip(strips, counts, strict=True)
        ]
    elif layout.compression in _DEFLATE and not layout.lsb_first:
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
    layout: _Layout, width: int, rows: int, strips: list[memoryview], counts: list[int]
) -> NDArray[np.uint8]:
    """A grey picture of 8 bits (fax: of one, as 0 and 1) in the file's own strips, as many at once as Pillow takes."""
    together = max(1, _MOST_AT_ONCE // (rows * width))
    parts = []
    for first in range(0, len(strips), together):
        height = sum(counts[first : first + together])
        tags = {
            _WIDTH: [width], _HEIGHT: [height], _BITS: [1 if layout.compression in _FAX else 8], _SAMPLES: [1],
            _COMPRESSION: [layout.compression], _PHOTOMETRIC: [_BLACK_IS_ZERO], _ROWS: [rows],
            _FILL_ORDER: [2 if layout.lsb_first else 1],
        }  # fmt: skip
        for tag in (_T4, _T6) if layout.compression in _FAX else ():
            if (value := layout.directory.whole(tag)) is not None:
                tags[tag] = [value]
        pixels = np.array(_opened(layout.order, tags, strips[first : first + together], (_STRIP_AT, _STRIP_BYTES)))
        if pixels.shape != (height, width):
            raise damaged("its data are not what its header says")
        parts.append(pixels.astype(np.uint8))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _opened(
    order: str,
    tags: dict[int, list[int]],
    strips: list[memoryview],
    where: tuple[int, int],
    blobs: dict[int, bytes] | None = None,
) -> Image.Image:
    """What libtiff makes of the strips or tiles in a file of ours. where: the tags of their offsets and sizes."""
    sizes = [len(strip) for strip in strips]
    offsets = [8]
    for size in sizes[:-1]:
        offsets.append(offsets[-1] + size)
    start = 8 + sum(sizes)
    values: dict[int, tuple[int, int, bytes]] = {
        tag: (4, len(numbers), struct.pack(f"{order}{len(numbers)}I", *numbers))
        for tag, numbers in {**tags, where[0]: offsets, where[1]: sizes}.items()
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


def _unpacked(layout: _Layout, rows: NDArray[np.uint8], width: int, channels: int) -> NDArray[Any]:
    """Rows of bytes -> HxWxchannels, without the predictor."""
    height = rows.shape[0]
    samples: NDArray[Any]
    if layout.bits == 16:
        samples = rows.view(layout.order + "u2").astype(np.uint16).reshape(height, width, channels)
    elif layout.bits == 8:
        samples = rows.reshape(height, width, channels)
    else:
        # libtiff has put the bits of what it decompressed into their order already.
        if layout.lsb_first and layout.compression == 1:
            rows = np.packbits(np.unpackbits(rows, axis=1, bitorder="little"), axis=1)
        bits = np.unpackbits(rows, axis=1)[:, : width * channels * layout.bits]
        weights = 1 << np.arange(layout.bits - 1, -1, -1, dtype=np.uint8)
        samples = (bits.reshape(height, width, channels, layout.bits) * weights).sum(axis=3, dtype=np.uint8)
    if layout.predictor == 2:
        samples = np.cumsum(samples, axis=1, dtype=samples.dtype)
    return samples


# From samples to a picture


def _interpreted(layout: _Layout, samples: NDArray[Any]) -> Decoded:
    colours = _COLOURS[layout.photometric]
    if layout.photometric == _INDEXED:
        return _indexed(layout, samples)
    full = _spread(samples, layout.bits)
    alpha, premultiplied = _alpha(layout, full, colours)
    plain = full[..., :colours]
    if premultiplied and alpha is not None:
        plain = unmultiplied(plain, alpha)
    if layout.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO):
        grey = plain[..., 0]
        white_is_zero = layout.photometric == _WHITE_IS_ZERO
        return Decoded(np.ascontiguousarray(~grey if white_is_zero else grey), alpha)
    if layout.photometric == _RGB:
        return Decoded(np.ascontiguousarray(plain), alpha)
    if layout.bits != 8:
        raise unsupported(f"a TIFF of {layout.bits} bits in CMYK, YCbCr or CIELAB", "send 8 bits, or RGB")
    size = (layout.width, layout.height)
    if layout.photometric == _SEPARATED:
        image = Image.frombytes("CMYK", size, np.ascontiguousarray(plain).tobytes())
        return from_cmyk(image, layout.directory.value(_PROFILE))._replace(alpha=alpha)
    if layout.photometric == _CIELAB:
        image = Image.frombytes("LAB", size, np.ascontiguousarray(plain).tobytes(), "raw", "LAB")
        rgb = np.array(image.convert("RGB"))
        return Decoded(rgb, alpha, notes=("was converted from LAB to RGB",), recoloured=True)
    return _from_ycbcr(layout, plain, alpha)


def _spread(samples: NDArray[Any], bits: int) -> NDArray[Any]:
    """Of fewer than 8 bits: over 0..255, so that white stays white."""
    return samples * np.uint8(255 // (2**bits - 1)) if bits < 8 else samples


def _alpha(layout: _Layout, full: NDArray[Any], colours: int) -> tuple[NDArray[Any] | None, bool]:
    """The first extra sample that is alpha, and whether colours are multiplied by it. One of unknown use is none."""
    for index, kind in enumerate(layout.extra[: layout.channels - colours]):
        if kind in (1, 2):
            return np.ascontiguousarray(full[..., colours + index]), kind == 1
    return None, False


def _indexed(layout: _Layout, samples: NDArray[Any]) -> Decoded:
    entries = 2**layout.bits
    given = layout.directory.value(_COLOUR_MAP)
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
        return Decoded(colours[indices])
    return from_indices(indices, colours.tobytes())._replace(alpha=alpha)


def _from_ycbcr(layout: _Layout, plain: NDArray[np.uint8], alpha: NDArray[Any] | None) -> Decoded:
    """Without subsampling, and with the usual reference levels only."""
    across_down = layout.directory.value(_SUBSAMPLING)
    if across_down is None or struct.unpack(layout.order + "2H", across_down[:4]) != (1, 1):
        raise unsupported("a TIFF of subsampled YCbCr that is not JPEG-compressed")
    if layout.directory.value(_REFERENCE) is not None:
        raise unsupported("a TIFF of YCbCr with reference levels of its own")
    image = Image.frombytes("YCbCr", (layout.width, layout.height), np.ascontiguousarray(plain).tobytes())
    return Decoded(np.array(image.convert("RGB")), alpha, notes=("was converted from YCbCr to RGB",), recoloured=True)


def _decode_jpeg(layout: _Layout) -> Decoded:
    """JPEG in TIFF (technical note 2): libtiff decodes it as a whole."""
    kinds = {(1, _WHITE_IS_ZERO): "L", (1, _BLACK_IS_ZERO): "L", (3, _RGB): "RGB", (3, _YCBCR): "RGB"}
    mode = kinds.get((layout.channels, layout.photometric))
    if mode is None or layout.bits != 8 or (layout.planar and layout.channels > 1):
        raise unsupported("a TIFF of such a kind compressed with JPEG")
    tags = {
        _WIDTH: [layout.width], _HEIGHT: [layout.height], _BITS: [8], _COMPRESSION: [_JPEG], _SAMPLES: [1],
        _PHOTOMETRIC: [_BLACK_IS_ZERO if mode == "L" else layout.photometric],
    }  # fmt: skip
    where = (_TILE_AT, _TILE_BYTES) if layout.tile else (_STRIP_AT, _STRIP_BYTES)
    tags |= {_TILE_WIDTH: [layout.tile[0]], _TILE_HEIGHT: [layout.tile[1]]} if layout.tile else {_ROWS: [layout.rows]}
    tables = layout.directory.value(_JPEG_TABLES)
    if mode == "RGB":
        tags |= {_SAMPLES: [3], _BITS: [8, 8, 8]}
    if layout.photometric == _YCBCR and (ratio := layout.directory.value(_SUBSAMPLING)):
        tags[_SUBSAMPLING] = list(struct.unpack(layout.order + "2H", ratio[:4]))
    strips = [memoryview(layout.data)[start : start + size] for start, size in layout.pieces]
    image = _opened(layout.order, tags, strips, where, {_JPEG_TABLES: tables} if tables else None)
    pixels = np.array(image)
    if image.mode != mode or pixels.shape[:2] != (layout.height, layout.width):
        raise damaged("its data are not what its header says")
    return Decoded(~pixels if layout.photometric == _WHITE_IS_ZERO else pixels)
