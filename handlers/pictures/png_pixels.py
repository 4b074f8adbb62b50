"""PNG -> samples. The decoder sees the chunks that make up the picture and no other: what lies beside it, however large
or broken, is none of its. Transparency is applied here, for decoders lose it in grey pictures, or the depth with it.

A PNG's compression, filters and passes know how many bytes a pixel has, and nothing of what they mean. So the decoder
is told of a kind of pixels that it knows and that has as many: indices are grey to it.
"""

import struct
import zlib
from typing import Any, NamedTuple

import cv2
import numpy as np
from kornia_rs.io import decode_image_png_u8, decode_image_png_u16
from numpy.typing import NDArray

from handlers.pictures.containers import PNG_SIGNATURE, png_chunks
from handlers.pictures.pixels import Decoded, check_decoded, check_size, damaged, from_indices, unsupported

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGBA: 4}
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GREY_ALPHA: (8, 16), _RGBA: (8, 16)}
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_MOST_EXPANSION = 1032  # of deflate: what promises more has no claim to memory
# Bytes of a pixel -> a kind that the decoder knows: its colour type, depth and name.
_KINDS = {
    1: (_GREY, 8, "mono"), 2: (_GREY, 16, "mono"), 3: (_RGB, 8, "rgb"),
    4: (_RGBA, 8, "rgba"), 6: (_RGB, 16, "rgb"), 8: (_RGBA, 16, "rgba"),
}  # fmt: skip


class _Parts(NamedTuple):
    """pixels: the IDAT chunks as they are, and IEND."""

    width: int
    height: int
    depth: int
    colour: int
    interlaced: bool
    palette: bytes
    transparency: bytes
    frames: int
    pixels: list[bytes | memoryview]

    def file(self, width: int, colour: int, depth: int) -> bytes:
        """Makes a file of these pixels alone, said to be others."""
        head = struct.pack(">4sIIBBBBB", b"IHDR", width, self.height, depth, colour, 0, 0, self.interlaced)
        return b"".join((PNG_SIGNATURE, struct.pack(">I", 13), head, struct.pack(">I", zlib.crc32(head)), *self.pixels))


def decode(data: bytes) -> Decoded:
    """Samples of 8 bits, grey ones of fewer bits spread over 0..255, or of 16. Raises NotAPicture or TooLarge."""
    parts = _parts(data)
    notes = ("holds several frames; only the first was used",) if parts.frames > 1 else ()
    return _interpreted(parts, _samples(parts))._replace(notes=notes)


def _interpreted(parts: _Parts, samples: NDArray[Any]) -> Decoded:
    """samples: HxWxC."""
    if parts.colour == _PALETTE:
        return from_indices(samples[..., 0], parts.palette, parts.transparency)
    if parts.colour in (_GREY, _RGB):
        one = 255 // (2**parts.depth - 1) if parts.depth < 8 else 1
        alpha = _keyed(samples, parts)
        plain = samples if parts.colour == _RGB else samples[..., 0]
        return Decoded(plain * np.uint8(one) if one > 1 else plain, alpha, one=one)
    alpha = cv2.extractChannel(samples, samples.shape[2] - 1)
    if parts.colour == _GREY_ALPHA:
        return Decoded(cv2.extractChannel(samples, 0), alpha)
    return Decoded(np.asarray(cv2.cvtColor(samples, cv2.COLOR_RGBA2RGB)), alpha)


def _parts(data: bytes) -> _Parts:
    pixels: list[bytes | memoryview] = []
    kinds: list[bytes] = []
    header = palette = transparency = b""
    frames = 0
    for name, body, crc in png_chunks(data):
        if not kinds and name != b"IHDR":
            raise unsupported("an Apple PNG (CgBI)") if name == b"CgBI" else damaged("it does not begin with IHDR")
        kinds.append(name)
        if name == b"IHDR" and not header:
            header = bytes(body)
        elif name == b"IDAT":
            pixels += [struct.pack(">I4s", len(body), name), body, struct.pack(">I", crc)]
        elif name == b"PLTE":
            palette = bytes(body)
        elif name == b"tRNS":
            transparency = bytes(body)
        elif name == b"acTL" and len(body) >= 4:
            frames = int.from_bytes(body[:4], "big")
        elif not name[0] & 0x20 and name != b"IEND":
            raise unsupported(f"a PNG with the critical chunk {name.decode('latin-1')!a}")
    if len(header) != 13:
        raise damaged("it has no header")
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", header)
    if depth not in _DEPTHS.get(colour, ()) or methods[:2] != [0, 0] or methods[2] > 1:
        raise damaged(f"its header says {depth} bits of colour type {colour}, which there is not")
    if colour == _PALETTE and not palette:
        raise damaged("it has no palette")
    check_size(width, height, len(data))
    stored = sum(map(len, pixels[1::3]))
    if stored * _MOST_EXPANSION < height * (width * _CHANNELS[colour] * depth // 8):
        raise damaged("it ends too early")
    return _Parts(width, height, depth, colour, methods[2] == 1, palette, transparency, frames, [*pixels, _IEND])


def _samples(parts: _Parts) -> NDArray[Any]:
    """HxWxC uint8 or uint16, as stored: of fewer than 8 bits each in a byte of its own."""
    channels, height, width = _CHANNELS[parts.colour], parts.height, parts.width
    if parts.depth < 8:
        return (_unpacked_passes(parts) if parts.interlaced else _unpacked(parts))[..., None]
    pixels = _read(parts, width, channels * parts.depth // 8)
    if parts.colour == _GREY_ALPHA:  # which the decoder took for grey of 16 bits, or for RGBA of 8
        if parts.depth == 8:
            return pixels.astype(">u2").view(np.uint8).reshape(height, width, 2)
        return pixels.view(">u2").astype(np.uint16)
    return pixels


def _read(parts: _Parts, width: int, size: int) -> NDArray[Any]:
    """height x width x C, `size` bytes together: as many of uint8, or half as many of uint16."""
    colour, depth, kind = _KINDS[size]
    read = decode_image_png_u16 if depth == 16 else decode_image_png_u8
    try:
        pixels = read(parts.file(width, colour, depth), (parts.height, width), kind)
    except BaseException as error:  # of no kind of its own; and a panic in Rust is no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise damaged("it ends too early or its data are broken") from None
        raise
    return check_decoded(pixels, parts.height, width, depth)


def _unpacked(parts: _Parts) -> NDArray[np.uint8]:
    """HxW: samples of fewer than 8 bits, of which the decoder reads a byte's worth as one."""
    packed = _read(parts, (parts.width * parts.depth + 7) // 8, 1)[..., 0]
    shifts = np.arange(8 - parts.depth, -1, -parts.depth)
    table = ((np.arange(256)[:, None] >> shifts) & (2**parts.depth - 1)).astype(np.uint8)
    return np.ascontiguousarray(table.take(packed, axis=0).reshape(parts.height, -1)[:, : parts.width])


def _unpacked_passes(parts: _Parts) -> NDArray[np.uint8]:
    """HxW, of an interlaced picture: each pass is a picture of its own, whose rows begin with whole bytes."""
    sides = [(-(-(parts.height - y) // down), -(-(parts.width - x) // across)) for y, x, down, across in _ADAM7]
    sizes = [height * (1 + (width * parts.depth + 7) // 8) if width > 0 else 0 for height, width in sides]
    stored = zlib.decompressobj().decompress(b"".join(parts.pixels[1:-1:3]), sum(sizes) + 1)
    if len(stored) < sum(sizes):
        raise damaged("it ends too early")
    samples, at = np.empty((parts.height, parts.width), np.uint8), 0
    for (y, x, down, across), (height, width), size in zip(_ADAM7, sides, sizes, strict=True):
        if size:
            data = zlib.compress(stored[at : at + size], 0)
            head, crc = struct.pack(">I4s", len(data), b"IDAT"), struct.pack(">I", zlib.crc32(b"IDAT" + data))
            own = parts._replace(width=width, height=height, interlaced=False, pixels=[head, data, crc, _IEND])
            samples[y::down, x::across] = _unpacked(own)
            at += size
    return samples


def _keyed(samples: NDArray[Any], parts: _Parts) -> NDArray[Any] | None:
    """Alpha of a picture of which one colour is transparent; None where there is none. samples: HxWxC, as stored."""
    channels = samples.shape[2]
    if len(parts.transparency) < 2 * channels:
        return None
    key = np.frombuffer(parts.transparency[: 2 * channels], ">u2") & np.uint16(2**parts.depth - 1)
    transparent = tuple(key.tolist())
    opaque = cv2.bitwise_not(cv2.inRange(samples, transparent, transparent))
    return np.asarray(opaque if parts.depth <= 8 else opaque.astype(np.uint16) * np.uint16(257))
