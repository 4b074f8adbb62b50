"""JPEG -> samples: the first picture of the file, up to its end marker and no further."""

import io
import struct
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from handlers.pictures.containers import jpeg_segments
from handlers.pictures.limits import LIMITS
from handlers.pictures.pixels import Decoded, NotAPicture, TooLarge, check_decoded, check_size, damaged, unsupported

_SOS = 0xDA
_FRAMES = {
    0xC0: "", 0xC1: "", 0xC2: "",
    0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xC9: "arithmetic-coded",
    0xCA: "arithmetic-coded", 0xCB: "lossless", 0xCD: "hierarchical", 0xCE: "hierarchical", 0xCF: "lossless",
}  # fmt: skip
_END = b"\xff\xd9"
# Ways in which compressed data might go on: a decoder that has all it needs looks at neither.
_TAILS = (
    b"\x00" * 64,
    b"\xaa\x15" * 32,
    b"".join(bytes([0xFF, 0xD0 + restart]) + b"\x55\xaa" * 16 for restart in range(8)) * 2,
)


class _Parts(NamedTuple):
    width: int
    height: int
    components: int
    file: bytes  # of the first picture alone
    ended: bool  # whether it has its end marker
    scans: list[bytes]
    progressive: bool


def decode(data: bytes) -> Decoded:
    """Grey or RGB of 8 bits; CMYK becomes sRGB through its profile. Raises NotAPicture or TooLarge."""
    parts = _parts(data)
    if not parts.ended:
        _check_complete(parts)
    file = parts.file if parts.ended else parts.file + _TAILS[0] + _END
    if parts.components == 4:
        return _decode_cmyk(file)
    pixels = check_decoded(_by_opencv(file), parts.height, parts.width, 8)
    if parts.components == 1:
        return Decoded(pixels)
    return Decoded(np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)))


def _by_opencv(file: bytes) -> NDArray[Any] | None:
    return cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)


def _parts(data: bytes) -> _Parts:
    jpeg = jpeg_segments(data)
    frame, kind, scans = b"", 0, list[bytes]()
    for marker, body in jpeg.segments:
        if marker in _FRAMES and not frame:
            frame, kind = bytes(body), marker
        elif marker == _SOS:
            scans.append(bytes(body))
            if len(scans) > LIMITS.max_jpeg_scans:
                raise TooLarge(f"is a JPEG of more than {LIMITS.max_jpeg_scans} scans, which is the limit")
    if len(frame) < 6:
        raise damaged("it has no frame header")
    precision, height, width, components = struct.unpack(">BHHB", frame[:6])
    if _FRAMES[kind]:
        raise unsupported(f"a {_FRAMES[kind]} JPEG")
    if precision != 8:
        raise unsupported(f"a JPEG of {precision} bits")
    if components not in (1, 3, 4):
        raise unsupported(f"a JPEG of {components} components")
    check_size(width, height, len(data))
    file = data if jpeg.end == len(data) else data[: jpeg.end]
    file = file if jpeg.complete else file.rstrip(b"\xff")
    return _Parts(width, height, components, file, jpeg.complete, scans, kind == 0xC2)


def _check_complete(parts: _Parts) -> None:
    """Raises NotAPicture for a picture without an end marker that lacks more than that."""
    if parts.progressive and not _has_all_scans(parts.scans):
        raise damaged("it ends too early")
    first, *others = (parts.file + tail + _END for tail in _TAILS)
    pixels = _by_opencv(first)
    if pixels is None or not all(_is_of(pixels, other) for other in others):
        raise damaged("it ends too early")


def _is_of(pixels: NDArray[Any], file: bytes) -> bool:
    """Whether a file holds just these pixels; its own are gone afterwards."""
    decoded = _by_opencv(file)
    return decoded is not None and np.array_equal(pixels, decoded)


def _has_all_scans(scans: list[bytes]) -> bool:
    """Whether the scans of a progressive picture bring each coefficient of each component to full precision."""
    done: dict[int, set[int]] = {}
    for scan in scans:
        if len(scan) < 4 + 2 * scan[0]:
            return False
        first, last, precision = scan[-3:]
        for component in scan[1 : 1 + 2 * scan[0] : 2]:
            done.setdefault(component, set()).update(range(first, last + 1) if precision & 15 == 0 else ())
    return bool(done) and all(len(coefficients & set(range(64))) == 64 for coefficients in done.values())


def _decode_cmyk(file: bytes) -> Decoded:
    image = Image.open(io.BytesIO(file), formats=["JPEG"])
    if image.mode != "CMYK":
        raise NotAPicture(f"is damaged: four components, but {image.mode}")
    image.load()
    return from_cmyk(image, image.info.get("icc_profile"))


def from_cmyk(image: Image.Image, profile: bytes | None) -> Decoded:
    """A picture of mode CMYK as sRGB, through its profile where that can be read."""
    converted = image.convert("RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            through = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            converted = through or converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile: as without one
    return Decoded(np.array(converted), notes=("was converted from CMYK to sRGB",), recoloured=True)
