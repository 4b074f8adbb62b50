"""What a picture file says beside its pixels: read once, carried along, written into the reply.

Kept, in every format that has a place for it: the colour profile, the EXIF entries that exif_tags lists, XMP, and the
resolution; PNG's colour and text chunks in a PNG, a JPEG's comment and its quantization in a JPEG. Nothing else: a
thumbnail, a layer, a preview, a depth map, a maker's note or a signature would still show what an edit removed, or be
wrong about it. What is left out is named in a note.
"""

import numpy as np

from handlers.pictures import beside, exif, resolution
from handlers.pictures.beside import Found
from handlers.pictures.exif import Exif, TiffData
from handlers.pictures.limits import LIMITS
from handlers.pictures.picture import Metadata, Samples
from handlers.pictures.texts import is_plain_xmp, named, upright, xmp_orientation

# The formats that a reply can have; what came in another one leaves as PNG.
_CONTENT_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "TIFF": "image/tiff"}


def read(data: bytes) -> tuple[Metadata, int, tuple[str, ...]]:
    """What is to be kept of a picture file; how its stored pixels must be turned to be upright; notes of what is left
    out.

    The orientation is 1 to 8 as in EXIF: from the EXIF block, else from XMP; in HEIC and AVIF from the container's own
    properties. Where a decoder turns the pixels itself (Pillow and OpenCV do so with TIFF, libheif with HEIC), the
    caller must not turn them again.

    Whatever is damaged is left out and named. Raises nothing.
    """
    found = beside.find(data)
    notes: list[str] = []
    kept, orientation = _exif(found, notes)
    xmp = _xmp(found, notes)
    if found.turned_by_container:
        orientation = found.orientation
    elif orientation == 1 and found.xmp:
        orientation = xmp_orientation(found.xmp)
    if orientation != 1 and xmp:
        xmp = upright(xmp)
    if not _fits(found.png_text_size, LIMITS.max_png_text_bytes, "PNG text", notes):
        found.png_text.clear()
    size = found.resolution or resolution.from_exif(kept)
    said = Metadata(
        content_type=_CONTENT_TYPES.get(found.format, "image/png"),
        icc=_within(found.icc, LIMITS.max_icc_bytes, "colour profile", notes),
        exif=exif.turned(kept, orientation),
        xmp=xmp,
        resolution=size and size.turned(orientation),
        png_colour=tuple(found.png_colour),
        png_text=tuple(found.png_text),
        comment=found.comment,
        jpeg=found.jpeg,
    )
    if found.left_out:
        notes.insert(0, f"holds what the reply leaves out: {named(found.left_out)}")
    return said, orientation, tuple(notes)


def turned(pixels: Samples, orientation: int) -> Samples:
    """HxW... as a viewer shows it: EXIF's orientations 1 to 8, of which four are mirrored."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _exif(found: Found, notes: list[str]) -> tuple[Exif, int]:
    """The first block that can be read, and its orientation."""
    kept, orientation = Exif(), 1
    blocks = [block for block in found.exif if TiffData.is_one(block)]
    if len(blocks) < len(found.exif):
        found.left_out.append("a damaged EXIF block")
    if len(blocks) > 1:
        found.left_out.append("a second EXIF block")
    if blocks:
        kept, orientation, left_out = exif.read_exif(TiffData(blocks[0]), own_file=found.format == "TIFF")
        found.left_out += left_out
    if kept and _within(exif.write_exif(kept), LIMITS.max_exif_bytes, "EXIF", notes) is None:
        kept = Exif(kept.order)
    return kept, orientation


def _xmp(found: Found, notes: list[str]) -> bytes | None:
    if found.xmp is None or (packet := _within(found.xmp, LIMITS.max_xmp_bytes, "XMP", notes)) is None:
        return None
    if not is_plain_xmp(packet):
        found.left_out.append("XMP that is damaged or holds pictures")
        return None
    return packet


def _within(block: bytes | None, limit: int, name: str, notes: list[str]) -> bytes | None:
    return block if block is None or _fits(len(block), limit, name, notes) else None


def _fits(size: int, limit: int, name: str, notes: list[str]) -> bool:
    if size > limit:
        notes.append(f"has {size:,} bytes of {name}; the limit is {limit:,}: they are left out of the reply")
    return size <= limit
