"""The parts of which picture files are made, in the order in which they lie there.

All stop where the data end or make no sense any more, and raise nothing.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # 0xff is escaped in compressed data, and may be repeated
_SOI, _EOI = 0xD8, 0xD9
_BARE = {0x01, _SOI, _EOI}  # markers without a segment


class Part(NamedTuple):
    """name: of a chunk or box. data: its contents. end: where the next one begins in the data that were given."""

    name: bytes
    data: memoryview
    end: int


class Segment(NamedTuple):
    """marker: the byte behind 0xff. data: without its length. end: where what follows begins."""

    marker: int
    data: memoryview
    end: int


def png_chunks(data: bytes | memoryview) -> Iterator[Part]:
    """A PNG's chunks, IEND included and nothing behind it. Their checksums are not looked at."""
    view, at = memoryview(data), 8
    while at + 12 <= len(view):
        size = int.from_bytes(view[at : at + 4], "big")
        if at + 12 + size > len(view):
            return
        name = bytes(view[at + 4 : at + 8])
        yield Part(name, view[at + 8 : at + 8 + size], at + 12 + size)
        if name == b"IEND":
            return
        at += 12 + size


def jpeg_segments(data: bytes | memoryview) -> Iterator[Segment]:
    """A JPEG's segments up to its end marker, which is the last one; compressed data are passed over."""
    view, at = memoryview(data), 2
    while (found := _MARKER.search(view, at)) is not None:
        at, marker = found.end(), view[found.end() - 1]
        size = 0 if marker in _BARE else int.from_bytes(view[at : at + 2], "big")
        if at + size > len(view) or (size < 2 and marker not in _BARE):
            return
        yield Segment(marker, view[at + 2 : at + size], at + size)
        if marker == _EOI:
            return
        at += size


def riff_chunks(data: bytes | memoryview) -> Iterator[Part]:
    """The chunks of a RIFF file such as WebP."""
    view, at = memoryview(data), 12
    view = view[: 8 + int.from_bytes(view[4:8], "little")]
    while at + 8 <= len(view):
        size = int.from_bytes(view[at + 4 : at + 8], "little")
        if at + 8 + size > len(view):
            return
        end = at + 8 + size + size % 2
        yield Part(bytes(view[at : at + 4]), view[at + 8 : at + 8 + size], end)
        at = end


def bmff_boxes(data: bytes | memoryview) -> Iterator[Part]:
    """The boxes side by side in a HEIC or AVIF file, or in a box of one."""
    view, at = memoryview(data), 0
    while at + 8 <= len(view):
        size, head = int.from_bytes(view[at : at + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(view[at + 8 : at + 16], "big"), 16
        end = len(view) if size == 0 else at + size
        if end < at + head or end > len(view):
            return
        yield Part(bytes(view[at + 4 : at + 8]), view[at + head : end], end)
        at = end
