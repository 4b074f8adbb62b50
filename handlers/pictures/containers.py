"""What picture files are made of, read without decoding a pixel: PNG's chunks, JPEG's segments, RIFF's chunks (WebP),
ISO boxes (HEIC, AVIF) and GIF's blocks. TIFF's directories, which EXIF has too, are in handlers.pictures.exif.

Every function takes any bytes-like object and gives memoryviews of it, never copies. None raises for what a file holds:
a walk ends where the file stops making sense (or after as many steps as no honest file needs), no length is believed
beyond the file's end, and who reads a walk looks whether what he needs was in it.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_OF_JPEG = b"plJp"
"""A chunk of ours in a PNG that stands for a JPEG without its losses: a JPEG of one pixel, coded as the other was, with
all that it said beside its pixels."""
GIF_FRAME, GIF_CONTROL = 0x2C, 0xF9
_MAX_STEPS = 100_000
_MAX_GIF_PARTS = 1_000_000
# In a scan, FF 00 is a sample and FF D0 to FF D7 are restarts.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


class PngChunk(NamedTuple):
    kind: bytes
    body: memoryview
    crc: int


def png_chunks(data: Buffer) -> Iterator[PngChunk]:
    """The chunks up to and with IEND; a file that is cut yields no IEND, and not the chunk that is cut."""
    view = memoryview(data)
    if bytes(view[:8]) != PNG_SIGNATURE:
        return
    at = 8
    for _ in range(_MAX_STEPS):
        if at + 12 > len(view):
            return
        length, kind = struct.unpack_from(">I4s", view, at)
        end = at + 8 + length
        if end + 4 > len(view):
            return
        yield PngChunk(kind, view[at + 8 : end], struct.unpack_from(">I", view, end)[0])
        if kind == b"IEND":
            return
        at = end + 4


class JpegSegment(NamedTuple):
    """marker: the byte behind FF (0xE1: APP1). body: without marker and length; empty for a marker that has none."""

    marker: int
    body: memoryview


class Jpeg(NamedTuple):
    """The segments between SOI and EOI, scans' headers among them (0xDA), their compressed data left out.

    end: the offset behind EOI, where another file may begin (a phone's video, further pictures); the file's length
    where it is not complete. complete: whether EOI was found.
    """

    segments: tuple[JpegSegment, ...]
    end: int
    complete: bool


def jpeg_segments(data: Buffer) -> Jpeg:
    """The first JPEG of a file."""
    view = memoryview(data)
    segments: list[JpegSegment] = []
    at = 2 if bytes(view[:2]) == b"\xff\xd8" else len(view)
    while len(segments) < _MAX_STEPS:
        # Between segments there may be any number of FF; decoders skip other bytes, too.
        found = _MARKER.search(view, at)
        if found is None:
            break
        at, marker = found.end(), view[found.end() - 1]
        if marker == 0xD9:
            return Jpeg(tuple(segments), at, True)
        if marker in (0x01, 0xD8):  # they have no length
            segments.append(JpegSegment(marker, view[at:at]))
            continue
        if at + 2 > len(view):
            break
        length = struct.unpack_from(">H", view, at)[0]
        if length < 2 or at + length > len(view):
            break
        segments.append(JpegSegment(marker, view[at + 2 : at + length]))
        at += length
    return Jpeg(tuple(segments), len(view), False)


def riff_chunks(data: Buffer) -> Iterator[tuple[bytes, memoryview]]:
    """The chunks (kind, body) of a RIFF file, such as a WebP; not the one that the file's end cuts."""
    view = memoryview(data)
    if bytes(view[:4]) != b"RIFF":
        return
    at = 12
    for _ in range(_MAX_STEPS):
        if at + 8 > len(view):
            return
        kind, length = struct.unpack_from("<4sI", view, at)
        if at + 8 + length > len(view):
            return
        yield kind, view[at + 8 : at + 8 + length]
        at += 8 + length + length % 2


def bmff_boxes(data: Buffer) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes (kind, body) of an ISO file, or of a body that holds boxes; not the one that the end cuts.

    A "full box" (meta, pixi) begins its body with four bytes of version and flags.
    """
    view = memoryview(data)
    at = 0
    for _ in range(_MAX_STEPS):
        if at + 8 > len(view):
            return
        length, kind = struct.unpack_from(">I4s", view, at)
        head = 8
        if length == 1 and at + 16 <= len(view):
            (length,) = struct.unpack_from(">Q", view, at + 8)
            head = 16
        elif length == 0:  # up to the file's end
            length = len(view) - at
        if length < head or at + length > len(view):
            return
        yield kind, view[at + head : at + length]
        at += length


def bmff_brands(data: Buffer) -> tuple[bytes, ...]:
    """The major brand and the compatible ones of an ISO file; () where it is none."""
    kind, body = next(bmff_boxes(data), (b"", memoryview(b"")))
    if kind != b"ftyp" or len(body) < 8:
        return ()
    brands = bytes(body[:4]) + bytes(body[8:])
    return tuple(brands[at : at + 4] for at in range(0, min(len(brands), 4 * 64) - 3, 4))


class GifBlock(NamedTuple):
    """label: GIF_FRAME, or an extension's. head: a frame's place and flags (9 bytes), then colours of its own, if any.
    body: the chain of parts of at most 255 bytes, each behind its length; before a frame's, the bits of its indices.
    """

    label: int
    head: memoryview
    body: memoryview


def gif_blocks(data: Buffer) -> Iterator[GifBlock]:
    """A GIF's frames and extensions. Of a frame that the file's end cuts, the body ends there, too."""
    view = memoryview(data)
    at = 13 + (_gif_colours(view[10]) if len(view) > 10 else 0)
    for _ in range(_MAX_STEPS):
        start = view[at : at + 2]
        if len(start) == 2 and start[0] == 0x21:
            label, head, begin = start[1], view[at:at], at + 2
            at = begin
        elif len(start) == 2 and start[0] == GIF_FRAME and at + 10 <= len(view):
            begin = at + 10 + _gif_colours(view[at + 9])
            label, head = GIF_FRAME, view[at + 1 : begin]
            at = begin + 1
        else:
            return
        for _ in range(_MAX_GIF_PARTS):
            if at >= len(view) or not view[at]:
                break
            at += 1 + view[at]
        if at < len(view) or label == GIF_FRAME:
            yield GifBlock(label, head, view[begin:at])
        at += 1


def _gif_colours(flags: int) -> int:
    """The bytes of a table of colours."""
    return 3 * 2 ** (1 + (flags & 7)) if flags & 0x80 else 0
