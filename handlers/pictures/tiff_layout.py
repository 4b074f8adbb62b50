"""What a TIFF's directory says of how its page is stored; refused by name is what cannot be read rightly.

Source: TIFF 6.0 (Adobe, 1992) and its technical notes; BigTIFF (Aware Systems, 2007).
"""

import struct
from typing import NamedTuple

from handlers.pictures import tiff_tags as tags
from handlers.pictures.exif import Directory, TiffData
from handlers.pictures.limits import LIMITS
from handlers.pictures.pixels import TooLarge, check_size, damaged, unsupported

COLOURS = {
    tags.WHITE_IS_ZERO: 1, tags.BLACK_IS_ZERO: 1, tags.RGB: 3, tags.INDEXED: 1, tags.SEPARATED: 4, tags.YCBCR: 3,
    tags.CIELAB: 3,
}  # fmt: skip
"""How many of a pixel's samples are colours, by photometric interpretation."""

_COMPRESSIONS = (tags.NONE, *tags.FAX, tags.LZW, tags.JPEG, *tags.DEFLATE, tags.PACKBITS)
_UNREAD = {
    6: "old-style JPEG", 34661: "JBIG", 34676: "LogLuv", 34677: "LogLuv", 34712: "JPEG 2000", 34887: "LERC",
    34925: "LZMA", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
_WHOLE = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_MOST_PAGES, _MOST_PIECES, _MOST_CHANNELS = 100, 200_000, 16
_MOST_BITS = 64  # of a pixel, in a picture of as many pixels as there may be


class Layout(NamedTuple):
    """How one page is stored.

    data: the whole file. order: "<" or ">", that of its bytes. width, height: in pixels, within the limits.
    bits: of each sample; 1, 2, 4, 8 or 16. channels: samples of a pixel; COLOURS[photometric] to 16, colours first.
    extra: what those behind the colours are: 1 for alpha that the colours are multiplied by, 2 for other alpha.
    photometric, compression: as in handlers.pictures.tiff_tags. predictor: 1 for none, 2 where samples are differences.
    planar: whether each channel is stored by itself. lsb_first: whether a byte's first pixel is its lowest bit.
    tile: (width, height) of one; None where there are strips, of `rows` rows each, the last of what is left.
    pieces: offset and bytes of each strip or tile, plane after plane; as many as there must be, all inside the file.
    directory: for what only some kinds of pages have.
    """

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

    @property
    def grid(self) -> tuple[int, int]:
        """How many strips or tiles of a plane lie side by side, and how many below each other."""
        if self.tile is None:
            return 1, -(-self.height // self.rows)
        return -(-self.width // self.tile[0]), -(-self.height // self.tile[1])


def read_layout(tiff: TiffData) -> tuple[Layout, int]:
    """The layout of the first page that is no thumbnail and no mask, and how many such pages there are (at least 1).

    Raises:
      NotAPicture: there is no page, or it is damaged or of a kind that is not supported, which is named.
      TooLarge: past one of handlers.pictures.limits.
    """
    page, count = _page(tiff)
    return _layout(tiff, page), count


def _page(tiff: TiffData) -> tuple[Directory, int]:
    pages: list[Directory] = []
    seen: set[int] = set()
    at = tiff.first
    while at and at not in seen and len(seen) < _MOST_PAGES:
        seen.add(at)
        directory = tiff.directory(at)
        if tags.WIDTH in directory.entries:
            pages.append(directory)
        at = directory.next
    if not pages:
        raise damaged("it has no page")
    whole = [page for page in pages if not (page.whole(tags.KIND) or 0) & 5 and page.whole(tags.OLD_KIND) != 2]
    return (whole or pages)[0], max(1, len(whole))


def _layout(tiff: TiffData, page: Directory) -> Layout:
    width, height = _number(page, tags.WIDTH), _number(page, tags.HEIGHT)
    check_size(width, height, len(tiff.data))
    channels = _number(page, tags.SAMPLES, 1)
    if not 1 <= channels <= _MOST_CHANNELS:
        raise unsupported(f"a TIFF of {channels} samples a pixel")
    bits = _bits(tiff, page, channels)
    compression, photometric = _number(page, tags.COMPRESSION, 1), _number(page, tags.PHOTOMETRIC, -1)
    _check_kind(compression, photometric, channels)
    if width * height * channels * bits > LIMITS.max_pixels * _MOST_BITS:
        raise TooLarge(f"has {channels} samples of {bits} bits in each of {width}x{height} pixels")
    tiled = tags.TILE_WIDTH in page.entries
    layout = Layout(
        data=bytes(tiff.data),
        order=tiff.order,
        width=width,
        height=height,
        bits=bits,
        channels=channels,
        extra=tuple(_numbers(tiff, page, tags.EXTRA)),
        photometric=photometric,
        compression=compression,
        predictor=_predictor(page, compression, bits),
        planar=_number(page, tags.PLANAR, 1) == 2 and channels > 1,
        lsb_first=_number(page, tags.FILL_ORDER, 1) == 2,
        tile=(_number(page, tags.TILE_WIDTH), _number(page, tags.TILE_HEIGHT)) if tiled else None,
        rows=min(_number(page, tags.ROWS, height) or height, height),
        pieces=[],
        directory=page,
    )
    offsets = _numbers(tiff, page, tags.TILE_AT if tiled else tags.STRIP_AT)
    sizes = _numbers(tiff, page, tags.TILE_BYTES if tiled else tags.STRIP_BYTES)
    return layout._replace(pieces=_pieces(layout, offsets, sizes))


def _bits(tiff: TiffData, page: Directory, channels: int) -> int:
    """Returns the bits of each sample."""
    formats = set(_numbers(tiff, page, tags.FORMAT)) & set(_FORMATS)
    bits = set(_numbers(tiff, page, tags.BITS)[:channels]) or {1}
    if formats:
        raise unsupported(f"a TIFF of {max(bits)}-bit {_FORMATS[formats.pop()]} samples", "send 8 or 16 bits")
    if len(bits) > 1 or not bits <= {1, 2, 4, 8, 16}:
        raise unsupported(f"a TIFF of {' and '.join(map(str, sorted(bits)))} bits a sample", "send 8 or 16 bits")
    return bits.pop()


def _check_kind(compression: int, photometric: int, channels: int) -> None:
    if compression not in _COMPRESSIONS:
        raise unsupported(f"a TIFF compressed with {_UNREAD.get(compression, f'method {compression}')}")
    if photometric not in COLOURS:
        raise unsupported(f"a TIFF of photometric interpretation {photometric}")
    if channels < COLOURS[photometric]:
        raise unsupported(f"a TIFF of {channels} samples a pixel")


def _predictor(page: Directory, compression: int, bits: int) -> int:
    predictor = _number(page, tags.PREDICTOR, 1) if compression in (tags.LZW, *tags.DEFLATE) else 1
    if predictor not in (1, 2) or (predictor == 2 and bits < 8):
        raise unsupported(f"a TIFF with predictor {predictor}")
    return predictor


def _number(page: Directory, tag: int, default: int = 0) -> int:
    value = page.whole(tag)
    return default if value is None else value


def _numbers(tiff: TiffData, page: Directory, tag: int) -> list[int]:
    code = _WHOLE.get(page.entries.get(tag, (0, 0, 0))[0])
    value = page.value(tag)
    if code is None or value is None:
        return []
    count = len(value) // struct.calcsize(code)
    if count > _MOST_PIECES:
        raise damaged(f"it lists more than {_MOST_PIECES:,} strips or tiles")
    return list(struct.unpack(f"{tiff.order}{count}{code}", value))


def _pieces(layout: Layout, offsets: list[int], sizes: list[int]) -> list[tuple[int, int]]:
    """All of them, each inside the file."""
    if layout.tile and not all(0 < side <= 1 << 16 for side in layout.tile):
        raise damaged(f"its tiles are of {layout.tile[0]}x{layout.tile[1]} pixels")
    across, down = layout.grid
    count = across * down * (layout.channels if layout.planar else 1)
    if len(sizes) < len(offsets) == 1 and layout.compression == tags.NONE:
        sizes = [len(layout.data) - offsets[0]]  # old writers left it out
    if len(offsets) < count or len(sizes) < count:
        raise damaged(f"it has {min(len(offsets), len(sizes))} of {count} strips or tiles")
    pieces = list(zip(offsets[:count], sizes[:count], strict=True))
    if any(not size or start + size > len(layout.data) for start, size in pieces):
        raise damaged("a strip or tile lies outside the file")
    return pieces
