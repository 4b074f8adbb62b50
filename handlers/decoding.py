"""Bytes of a picture file -> Picture or Mask.

Pillow reads the header, before anything is decoded, and the rare modes. OpenCV decodes the common ones, in half to
three quarters of Pillow's time, and colours of 16 bits, which Pillow would cut to 8. No global setting of either is
changed.
"""

import io
import warnings
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from contract.pictures import is_picture
from handlers import metadata
from handlers.limits import LIMITS
from handlers.picture import Mask, Picture, Samples, to_rgb

MASK_THRESHOLD = 128
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# A picture of any other mode is converted, and its profile no longer describes it.
_RGB_PROFILED = ("1", "L", "LA", "La", "I;16", "I;16B", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX")


class NotAPicture(ValueError):
    """The bytes cannot be decoded; the message continues a sentence that starts with the field's name."""


class TooLarge(NotAPicture):
    """The header announces more than handlers.limits allows; nothing was decoded."""


def decode_picture(data: bytes) -> Picture:
    """The first frame, upright, at the file's own depth.

    Grey stays grey; palettes become RGB; transparency of any kind becomes alpha; CMYK becomes sRGB through its profile.

    Raises:
      NotAPicture: no known format, or damaged.
      TooLarge: past one of handlers.limits, by its header.
    """
    return _guarded(_decode_picture, data)


def decode_mask(data: bytes) -> Mask:
    """HxW bool. White is True: at least 128 of 255, or 1 where the picture holds only 0 and 1; transparent is False.

    Raises: as decode_picture.
    """
    picture = decode_picture(data)
    white = to_rgb(picture.samples).max(axis=2)
    if picture.alpha is not None:
        alpha = picture.alpha if picture.alpha.dtype == np.uint8 else picture.alpha >> 8
        white = (white.astype(np.uint16) * alpha // 255).astype(np.uint8)
    return np.asarray(white >= (1 if white.max() == 1 else MASK_THRESHOLD))


def _guarded(decode: Any, data: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            # Pillow warns of what it survives, and at 90 megapixels; our own limits say what matters.
            warnings.simplefilter("ignore")
            return decode(data)
    except (NotAPicture, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise TooLarge(f"has more than {LIMITS.max_pixels // 1_000_000} megapixels") from None
    except UnidentifiedImageError:
        if is_picture(data):
            raise NotAPicture("is damaged: it ends too early or its header is broken") from None
        raise NotAPicture("is not a picture in a known format (PNG, JPEG, WebP, TIFF, HEIC, AVIF, GIF, BMP)") from None
    # A damaged file can make decoders raise nearly anything (OSError, ValueError, IndexError, struct.error, cv2.error).
    except Exception as error:
        raise NotAPicture(f"is damaged: it cannot be decoded ({type(error).__name__})") from None


def _decode_picture(data: bytes) -> Picture:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        image = _open_heic(data)
    else:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_header(image, data)
    animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    notes: tuple[str, ...] = ("holds several frames; only the first was used",) if animated else ()
    if _is_common(image) and not animated:
        samples, alpha = _decode_fast(data, grey=_is_grey(image, data))
    else:
        converted, note = _to_plain_mode(image)
        notes += (note,) if note else ()
        samples, alpha = _split(np.asarray(converted))
    # After the pixels: Pillow turns a TIFF, and says so, when it loads it.
    said, orientation, left_out = metadata.read(image, data)
    notes += left_out
    if image.mode not in _RGB_PROFILED:
        said = said._replace(icc=None)
    return Picture(
        metadata.turned(samples, orientation),
        None if alpha is None else metadata.turned(alpha, orientation),
        said,
        notes,
    )


def _check_header(image: Image.Image, data: bytes) -> None:
    _check_size(*image.size, len(data))
    # 0xff is escaped in the compressed data, so this counts real markers.
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > LIMITS.max_jpeg_scans:
        raise TooLarge(f"is a JPEG of more than {LIMITS.max_jpeg_scans} scans, which is the limit")


def _check_size(width: int, height: int, length: int) -> None:
    pixels = width * height
    if pixels > LIMITS.max_pixels:
        raise TooLarge(f"has {width}x{height} pixels; the limit is {LIMITS.max_pixels // 1_000_000} megapixels")
    if max(width, height) > LIMITS.max_side:
        raise TooLarge(f"has {width}x{height} pixels; the limit is {LIMITS.max_side} pixels a side")
    if pixels > LIMITS.small_picture and pixels > LIMITS.max_pixels_per_byte * length:
        raise TooLarge(
            f"has {width}x{height} pixels in {length} bytes; the limit is {LIMITS.max_pixels_per_byte} pixels per byte"
        )


def _open_heic(data: bytes) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise NotAPicture("is HEIC, which this server has no decoder for: send JPEG or PNG") from None
    opened = pillow_heif.open_heif(data)
    width, height = opened.size
    _check_size(width, height, len(data))
    # The decoder turns the picture upright itself and says so in the EXIF block.
    return opened.to_pillow()


def _is_common(image: Image.Image) -> bool:
    """Whether OpenCV decodes it to the very samples of the file."""
    if image.format in ("JPEG", "MPO"):
        return image.mode in ("L", "RGB")
    if image.format == "PNG":
        return image.mode in ("L", "LA", "RGB", "RGBA", "I;16")
    if image.format == "TIFF" and image.mode in ("RGB", "RGBA"):
        return set(image.tag_v2.get(258, ())) == {16}  # type: ignore[attr-defined]
    return False


def _is_grey(image: Image.Image, data: bytes) -> bool:
    """Pillow's mode says it but for a PNG of 16 bits with alpha: byte 25 is its colour type."""
    return data[25] in (0, 4) if image.format == "PNG" else image.mode == "L"


def _decode_fast(data: bytes, grey: bool) -> tuple[Samples, Samples | None]:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise NotAPicture("is damaged: it ends too early or its data are broken")
    if pixels.ndim == 2:
        return pixels, None
    alpha = np.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
    if grey:
        return np.ascontiguousarray(pixels[..., 0]), alpha
    to_rgb_code = cv2.COLOR_BGR2RGB if alpha is None else cv2.COLOR_BGRA2RGB
    return np.asarray(cv2.cvtColor(pixels, to_rgb_code)), alpha


def _to_plain_mode(image: Image.Image) -> tuple[Image.Image, str | None]:
    """The picture in mode L, LA, RGB, RGBA or I;16, and a note where that changed its colours."""
    mode = image.mode
    if mode in ("I", "F"):
        raise NotAPicture("has samples of 32 bits: send 8 or 16")
    if mode == "CMYK":
        return _from_cmyk(image), "was converted from CMYK to sRGB"
    if mode in ("LAB", "YCbCr", "HSV"):
        return image.convert("RGB"), f"was converted from {mode} to RGB"
    if "transparency" in image.info or mode in ("PA", "RGBa", "La"):
        return image.convert("LA" if mode in ("1", "L", "La") else "RGBA"), None
    if mode.startswith("I;16") or mode in ("L", "LA", "RGB", "RGBA"):
        image.load()
        return image, None
    return image.convert("L" if mode == "1" else "RGB"), None


def _from_cmyk(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile: as without one
    return image.convert("RGB")


def _split(pixels: Samples) -> tuple[Samples, Samples | None]:
    """Samples and alpha from Pillow's array; native byte order, contiguous, and ours to write to."""
    pixels = pixels.astype(np.uint16 if pixels.dtype.itemsize == 2 else np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        colours = pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3]
        return np.ascontiguousarray(colours), np.ascontiguousarray(pixels[..., -1])
    return pixels, None
