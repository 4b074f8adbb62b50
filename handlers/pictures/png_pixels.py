"""PNG -> samples. Decoders see the chunks that make up the picture and no other: what lies beside it, however large or
broken, is none of theirs. Transparency is applied here, for they lose it in grey pictures, or the depth with it.
"""

import io
import struct
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.pictures.containers import PNG_SIGNATURE, png_chunks
from handlers.pictures.pixels import Decoded, check_decoded, check_size, damaged, from_indices, unsupported

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_DEPTHS = {_GREY: (1, 2, 4, 8, 16), _RGB: (8, 16), _PALETTE: (1, 2, 4, 8), _GREY_ALPHA: (8, 16), _RGBA: (8, 16)}
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


class _Parts(NamedTuple):
    width: int
    height: int
    depth: int
    colour: int
    palette: bytes
    transparency: bytes
    frames: int
    file: bytes  # of the pixels alone


def decode(data: bytes) -> Decoded:
    """Samples of 8 bits, grey ones of fewer bits spread over 0..255, or of 16. Raises NotAPicture or TooLarge."""
    parts = _parts(data)
    notes = ("holds several frames; only the first was used",) if parts.frames > 1 else ()
    # OpenCV first, whatever is needed of it: it refuses a file that ends too early, where Pillow leaves rows black.
    pixels = check_decoded(
        cv2.imdecode(np.frombuffer(parts.file, np.uint8), cv2.IMREAD_UNCHANGED), parts.height, parts.width, parts.depth
    )
    if parts.colour == _PALETTE:
        return from_indices(_by_pillow(parts, "P"), parts.palette, parts.transparency)._replace(notes=notes)
    if parts.depth < 8:
        grey = _by_pillow(parts, "L")
        return Decoded(grey, _keyed(grey[..., None], parts), notes=notes, one=255 // (2**parts.depth - 1))
    if parts.colour == _GREY:
        return Decoded(pixels, _keyed(pixels[..., None], parts), notes=notes)
    if parts.colour == _RGB:
        rgb = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
        return Decoded(rgb, _keyed(rgb, parts), notes=notes)
    alpha = np.ascontiguousarray(pixels[..., 3])
    if parts.colour == _GREY_ALPHA:
        return Decoded(np.ascontiguousarray(pixels[..., 0]), alpha, notes=notes)
    return Decoded(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB)), alpha, notes=notes)


def _parts(data: bytes) -> _Parts:
    kept: list[bytes | memoryview] = [PNG_SIGNATURE]
    kinds: list[bytes] = []
    header = palette = transparency = b""
    frames = 0
    for name, body, crc in png_chunks(data):
        if not kinds and name != b"IHDR":
            raise unsupported("an Apple PNG (CgBI)") if name == b"CgBI" else damaged("it does not begin with IHDR")
        kinds.append(name)
        suggested = name == b"PLTE" and header[9:10] != bytes([_PALETTE])  # to viewers of few colours
        if name in _PIXELS and not suggested:
            kept += [struct.pack(">I4s", len(body), name), body, struct.pack(">I", crc)]
        elif not name[0] & 0x20 and not suggested:
            raise unsupported(f"a PNG with the critical chunk {name.decode('latin-1')!a}")
        if name == b"IHDR" and not header:
            header = bytes(body)
        elif name == b"PLTE":
            palette = bytes(body)
        elif name == b"tRNS":
            transparency = bytes(body)
        elif name == b"acTL" and len(body) >= 4:
            frames = int.from_bytes(body[:4], "big")
    if len(header) != 13:
        raise damaged("it has no header")
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", header)
    if depth not in _DEPTHS.get(colour, ()) or methods[:2] != [0, 0] or methods[2] > 1:
        raise damaged(f"its header says {depth} bits of colour type {colour}, which there is not")
    if colour == _PALETTE and not palette:
        raise damaged("it has no palette")
    check_size(width, height, len(data))
    if b"IEND" not in kinds:
        kept.append(_IEND)
    return _Parts(width, height, depth, colour, palette, transparency, frames, b"".join(kept))


def _by_pillow(parts: _Parts, mode: str) -> NDArray[np.uint8]:
    """HxW: the indices of a palette, or grey of less than 8 bits spread over 0..255."""
    image = Image.open(io.BytesIO(parts.file), formats=["PNG"])
    image.load()
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    return check_decoded(pixels, parts.height, parts.width, 8)


def _keyed(samples: NDArray[Any], parts: _Parts) -> NDArray[Any] | None:
    """Alpha of a picture of which one colour is transparent; None where there is none. samples: HxWxC."""
    channels = samples.shape[2]
    if len(parts.transparency) < 2 * channels:
        return None
    key = np.frombuffer(parts.transparency[: 2 * channels], ">u2") & np.uint16(2**parts.depth - 1)
    if parts.depth < 8:
        key = key * np.uint16(255 // (2**parts.depth - 1))
    opaque = (samples != key.astype(samples.dtype)).any(axis=2)
    return opaque.astype(samples.dtype) * np.array(np.iinfo(samples.dtype).max, samples.dtype)
