"""Pictures in replies, as small as chat programs take them."""

import base64
import binascii
import io

import numpy as np
from mcp.types import ImageContent
from PIL import Image

from palimpsest import composing, files
from palimpsest.fields import Format
from palimpsest.mcp.places import MOST_BYTES, Refused

MOST_SHOWN = 700_000
"""Bytes of a reply's pictures: some chat programs refuse what is more than 1 MB, which base64 makes of it."""
SHOWN_FORMATS: tuple[Format, ...] = ("png", "jpeg", "webp")
_SIDES = (1568, 1024, 512, 256)  # pixels; models see no more than the first
_DIMMED = 0.3


def decoded(text: str, field: str) -> bytes:
    """What base64 or a data URI holds. Raises Refused."""
    if len(text) > MOST_BYTES * 4 // 3:
        raise Refused(f"{field} is larger than {MOST_BYTES >> 20} MiB")
    _, _, inside = text.rpartition(",") if text.startswith("data:") else ("", "", text)
    try:
        return base64.b64decode("".join(inside.split()), validate=True)
    except binascii.Error as error:
        raise Refused(f"{field} is no base64: {error}") from None


def format_to_show(data: bytes | None) -> Format:
    """Of what is made of a picture: its own, where chat programs show that."""
    return next((each for each in SHOWN_FORMATS if data is not None and files.is_format(data, each)), "png")


def shown(data: bytes, most: int) -> tuple[ImageContent, list[str]]:
    """The file where chat programs show such and it has at most so many bytes; else a picture like it, and a warning
    where that is smaller.
    """
    format = format_to_show(data)
    if len(data) <= most and files.is_format(data, format):
        return _content(data, format), []
    image = composing.opened(data)
    content, size = _reduced(image, most)
    if size == image.size:
        return content, []
    said = (
        f"shown smaller, {size[0]}x{size[1]} instead of {image.width}x{image.height}: output names a file for all of it"
    )
    return content, [said]


def overlaid(picture: bytes, mask: bytes, most: int) -> ImageContent | None:
    """The picture, dark outside of the mask; None where Pillow can't read such a picture."""
    if composing.size_of(picture) != composing.size_of(mask):
        return None
    selected = composing.opened(mask).convert("L")
    image = _in_eight_bits(composing.opened(picture)).convert("RGB")
    for each in (image, selected):
        each.thumbnail((_SIDES[0], _SIDES[0]))
    dimmed = image.point(lambda value: round(value * _DIMMED))
    return _reduced(Image.composite(image, dimmed, selected), most)[0]


def _reduced(image: Image.Image, most: int) -> tuple[ImageContent, tuple[int, int]]:
    """With its size."""
    image = _in_eight_bits(image)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    for side in _SIDES:
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85, method=2)
        if buffer.tell() <= most:
            break
    return _content(buffer.getvalue(), "webp"), image.size


def _in_eight_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if image.mode == "I;16" else image


def _content(data: bytes, kind: str) -> ImageContent:
    return ImageContent(data=base64.b64encode(data).decode(), mime_type=f"image/{kind}")
