"""HEIC and AVIF -> samples. Which of the two a file is, its pictures say, not its major brand: `mif1` is either."""

import io
import struct
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.pictures.containers import bmff_boxes, bmff_brands
from handlers.pictures.heif import primary_properties
from handlers.pictures.pixels import Decoded, check_decoded, check_size, damaged, from_pillow, unmultiplied, unsupported

_HEIC = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs"}
_AVIF = {b"avif", b"avis"}
_EITHER = {b"mif1", b"mif2", b"msf1", b"miaf", b"MiHB", b"MiHE", b"MiHA", b"MiPr", b"MA1A", b"MA1B"}
_MOST_META = 1 << 20


class _Kind(NamedTuple):
    avif: bool
    bits: int


def is_heif(data: bytes) -> bool:
    """Whether the file's brands, whichever comes first, are those of a HEIC or AVIF picture."""
    return bool(set(bmff_brands(data)) & (_HEIC | _AVIF | _EITHER))


def decode(data: bytes) -> Decoded:
    """AVIF as stored; HEIC upright, for libheif applies the container's turns itself.

    10 and 12 bits are spread over 0..65535, so that white stays white. Raises NotAPicture or TooLarge.
    """
    kind = _kind(data)
    properties = primary_properties(data)
    for name, value in properties:
        if name == b"ispe" and len(value) >= 12:  # of the picture as it is coded: what is shown of it may be a corner
            width, height = struct.unpack(">II", value[4:12])
            check_size(width, height, len(data))
    if kind.avif:
        return _cropped(_decode_avif(data, kind.bits), properties)
    return _decode_heic(data)._replace(upright=True)


def _kind(data: bytes) -> _Kind:
    meta = next((bytes(body[:_MOST_META]) for kind, body in bmff_boxes(data) if kind == b"meta"), b"")
    bits = 8
    at = meta.find(b"av1C")
    if at >= 0:
        flags = meta[at + 6] if len(meta) > at + 6 else 0
        bits = 12 if flags & 0x20 and flags & 0x40 else 10 if flags & 0x40 else 8
        return _Kind(True, bits)
    return _Kind(bool(set(bmff_brands(data)) & _AVIF) and b"hvcC" not in meta, 8)


def _decode_avif(data: bytes, bits: int) -> Decoded:
    if data[8:12] not in _AVIF:
        data = data[:8] + b"avif" + data[12:]  # by which decoders know it
    image = Image.open(io.BytesIO(data), formats=["AVIF"])
    check_size(*image.size, len(data))
    animated = getattr(image, "n_frames", 1) > 1
    notes = ("holds several frames; only the first was used",) if animated else ()
    if bits == 8:
        return from_pillow(image)._replace(notes=notes)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    width, height = image.size
    deep = _spread(check_decoded(pixels, height, width, 16), bits)
    if deep.ndim == 2:
        return Decoded(deep, notes=notes)
    if deep.shape[2] == 4:
        alpha = np.ascontiguousarray(deep[..., 3])
        return Decoded(np.asarray(cv2.cvtColor(deep, cv2.COLOR_BGRA2RGB)), alpha, notes=notes)
    return Decoded(np.asarray(cv2.cvtColor(deep, cv2.COLOR_BGR2RGB)), notes=notes)


def _cropped(decoded: Decoded, properties: list[tuple[bytes, bytes]]) -> Decoded:
    """Crops to the part that the container says is to be shown, if it does; libheif does that itself."""
    aperture = next((value for name, value in properties if name == b"clap"), None)
    if aperture is None:
        return decoded
    # Sides, and how far the middle lies from the picture's: each a numerator and a denominator.
    width, of_width, height, of_height, right, of_right, down, of_down = struct.unpack(">IIIIiIiI", aperture[:32])
    spans = (
        _span(decoded.samples.shape[0], height, of_height, down, of_down),
        _span(decoded.samples.shape[1], width, of_width, right, of_right),
    )
    alpha = None if decoded.alpha is None else np.ascontiguousarray(decoded.alpha[spans])
    return decoded._replace(samples=np.ascontiguousarray(decoded.samples[spans]), alpha=alpha)


def _span(whole: int, side: int, of_side: int, moved: int, of_moved: int) -> slice:
    part, odd = divmod(side, of_side)
    start, half = divmod((whole - part) * of_moved + 2 * moved, 2 * of_moved)
    if odd or half or part == 0 or start < 0 or start + part > whole:
        raise damaged("its clean aperture lies outside the picture, or between pixels")
    return slice(start, start + part)


def _decode_heic(data: bytes) -> Decoded:
    try:
        import pillow_heif
    except ImportError:
        raise unsupported("HEIC, which this server has no decoder for", "send JPEG or PNG") from None
    opened = pillow_heif.open_heif(data, convert_hdr_to_8bit=False)
    primary = opened[opened.primary_index]
    width, height = primary.size
    check_size(width, height, len(data))
    mode, bits = primary.mode, int(str(primary.info.get("bit_depth", 8)))
    pixels = np.array(primary)
    if mode not in ("L", "LA", "RGB", "RGBA", "L;16", "LA;16", "RGB;16", "RGBA;16", "RGBa", "RGBa;16"):
        raise unsupported(f"HEIC of the mode {mode}")
    if pixels.dtype == np.uint16:
        pixels = _spread(pixels >> (16 - bits), bits)
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        colours, alpha = pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3], pixels[..., -1]
        colours = unmultiplied(colours, alpha) if mode.startswith("RGBa") else colours
        return Decoded(np.ascontiguousarray(colours), np.ascontiguousarray(alpha))
    return Decoded(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _spread(samples: NDArray[Any], bits: int) -> NDArray[Any]:
    """0..2^bits - 1 -> 0..65535, rounded."""
    most = 2**bits - 1
    if int(samples.max(initial=0)) > most:
        raise damaged(f"its samples have more than {bits} bits")
    table = (np.arange(most + 1, dtype=np.uint32) * 65535 + most // 2) // most
    return table.astype(np.uint16)[samples]
