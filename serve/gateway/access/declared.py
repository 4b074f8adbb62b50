"""How many pixels a picture has, by what its file's beginning says: nothing is decoded, and nobody relies on it."""

import base64
import binascii
from contextlib import suppress

from serve.memory_file import Part

_HEAD = 128 * 1024  # bytes: a JPEG says its size behind its metadata
_SIZES_IN_JPEG = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_MOST_SEGMENTS = 1000
_BARE_IN_JPEG = frozenset({0x01, *range(0xD0, 0xD9)})


def pixels(picture: Part | str) -> float:
    """Of PNG, JPEG, WebP, GIF and BMP; of all else, multipart and JSON included, its bytes count as pixels."""
    if isinstance(picture, str):
        return len(picture)
    head = picture.file.read(picture.start, min(picture.start + _HEAD, picture.stop))
    if picture.text:
        head = _decoded(head)
    with suppress(IndexError):
        if size := _size(head):
            return size[0] * size[1]
    return picture.size


def _size(head: bytes) -> tuple[int, int] | None:
    """Width and height. Raises IndexError where the file ends before it says them."""
    if head.startswith(b"\x89PNG"):
        return _number(head, 16, 4, "big"), _number(head, 20, 4, "big")
    if head.startswith(b"GIF8"):
        return _number(head, 6, 2), _number(head, 8, 2)
    if head.startswith(b"BM"):
        if _number(head, 14, 4) == 12:
            return _number(head, 18, 2), _number(head, 20, 2)
        return _number(head, 18, 4), abs(_number(head, 22, 4) - (2**32 if head[25] > 127 else 0))
    if head.startswith(b"RIFF"):
        return _webp(head)
    return _jpeg(head) if head.startswith(b"\xff\xd8") else None


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X":
        return _number(head, 24, 3) + 1, _number(head, 27, 3) + 1
    if kind == b"VP8L":
        packed = _number(head, 21, 4)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    return (_number(head, 26, 2) & 0x3FFF, _number(head, 28, 2) & 0x3FFF) if kind == b"VP8 " else None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        if head[at] != 0xFF:
            return None
        kind = head[at + 1]
        if kind in _SIZES_IN_JPEG:
            return _number(head, at + 7, 2, "big"), _number(head, at + 5, 2, "big")
        if kind == 0xFF or kind in _BARE_IN_JPEG:
            at += 1 if kind == 0xFF else 2
        else:
            at += 2 + _number(head, at + 2, 2, "big")
    return None


def _number(head: bytes, at: int, size: int, order: str = "little") -> int:
    if at + size > len(head):
        raise IndexError
    return int.from_bytes(head[at : at + size], "big" if order == "big" else "little")


def _decoded(text: bytes) -> bytes:
    """The beginning of what base64 or a data URI holds; nothing where it is neither."""
    start = text.find(b",") + 1 if text.startswith(b"data:") else 0
    inside = text[start : start + (len(text) - start) // 4 * 4]
    try:
        return base64.b64decode(inside)
    except binascii.Error:
        return b""
