"""What a picture file says beside its pixels: read once, carried along, written into the reply."""

import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import get_sampling

from handlers.limits import LIMITS
from handlers.picture import JpegCoding, Metadata, Samples

# The formats that a reply can have; what came in another one leaves as PNG.
_CONTENT_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "WEBP": "image/webp",
    "TIFF": "image/tiff",
}
_ORIENTATION = ExifTags.Base.Orientation
# A TIFF's EXIF block is the file's own directory: these tags describe its pixels, which are written anew.
_TIFF_STRUCTURE = {
    254, 255, 256, 257, 258, 259, 262, 263, 266, 273, 277, 278, 279, 282, 283, 284, 292, 293, 296, 301, 317, 318, 319,
    320, 321, 322, 323, 324, 325, 330, 332, 338, 339, 340, 341, 347, 512, 513, 514, 529, 530, 531, 532, 700, 34675,
}  # fmt: skip


def read(image: Image.Image, data: bytes) -> tuple[Metadata, int, tuple[str, ...]]:
    """What is to be kept of the file `data`, opened as `image`, by which orientation (1 to 8) to turn its pixels, and
    notes of what is left out for its size.

    Damaged or oversized blocks are left out: no picture is refused for them. So is EXIF's thumbnail, which would still
    show what an edit removed.
    """
    notes: list[str] = []
    exif, orientation = _exif(image) if _may_have_exif(image, data) else (None, 1)
    exif = _within(exif, LIMITS.max_exif_bytes, "EXIF", notes)
    icc = image.info.get("icc_profile")
    icc = _within(icc if isinstance(icc, bytes) and icc else None, LIMITS.max_icc_bytes, "colour profile", notes)
    dpi = image.info.get("dpi")
    jpeg = None
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        jpeg = JpegCoding(dict(image.quantization), max(get_sampling(image), 0))  # type: ignore[attr-defined]
    said = Metadata(
        content_type=_CONTENT_TYPES.get(image.format or "", "image/png"),
        icc=icc,
        exif=exif,
        dpi=_checked_dpi(dpi, swapped=orientation >= 5),
        jpeg=jpeg,
    )
    return said, orientation, tuple(notes)


def _within(block: bytes | None, limit: int, name: str, notes: list[str]) -> bytes | None:
    if block is None or len(block) <= limit:
        return block
    notes.append(f"has {len(block):,} bytes of {name}; the limit is {limit:,}: they are left out of the reply")
    return None


def turned(pixels: Samples, orientation: int) -> Samples:
    """HxW... as a viewer shows it: EXIF's orientations 1 to 8, of which four are mirrored."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _may_have_exif(image: Image.Image, data: bytes) -> bool:
    """In a PNG it may come after the pixels, so Pillow would decode these first, only to see."""
    return image.format != "PNG" or "Raw profile type exif" in image.info or b"eXIf" in data


def _exif(image: Image.Image) -> tuple[bytes | None, int]:
    try:
        exif = image.getexif()
        orientation = exif.pop(_ORIENTATION, 1) if _ORIENTATION in exif else 1
        if image.format == "TIFF":
            for tag in _TIFF_STRUCTURE & set(exif):
                del exif[tag]
        block = exif.tobytes() if len(exif) else None
    except Exception:  # of a damaged block Pillow may raise anything
        return None, 1
    if image.format == "TIFF":
        orientation = 1  # both decoders turn a TIFF themselves
    return block, orientation if orientation in range(1, 9) else 1


def _checked_dpi(dpi: object, swapped: bool) -> tuple[float, float] | None:
    if not (isinstance(dpi, tuple) and len(dpi) == 2):
        return None
    across, down = (float(value) for value in dpi)
    if not (0 < across < 100_000 and 0 < down < 100_000):
        return None
    return (down, across) if swapped else (across, down)
