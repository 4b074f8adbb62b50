"""Bytes of a picture file -> Picture or Mask: the one place that says which decoder gets what.

Each format's own module reads the header first, checks it against the limits beside it, refuses by name what no decoder
reads rightly, and uses no decoder's output before it is known to be complete. No decoder's global settings are changed.
"""

import io
import warnings
from collections.abc import Callable
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from contract.pictures import is_picture
from handlers.pictures import bmp_pixels, gif_pixels, heif_pixels, jpeg_pixels, metadata, png_pixels, tiff_pixels
from handlers.pictures.containers import PNG_SIGNATURE
from handlers.pictures.masks import mask_of, transparent_in
from handlers.pictures.picture import Mask, Picture
from handlers.pictures.pixels import Decoded, NotAPicture, TooLarge, check_size, from_pillow, unsupported

__all__ = ["NotAPicture", "TooLarge", "decode_mask", "decode_picture"]

_Result = TypeVar("_Result")
_KNOWN = "PNG, JPEG, WebP, TIFF, HEIC, AVIF, GIF, BMP"


def decode_picture(data: bytes) -> Picture:
    """The first frame, upright, at the file's own depth.

    Grey stays grey; palettes become RGB, or grey where all their colours are; transparency of any kind becomes alpha;
    CMYK becomes sRGB through its profile.

    Raises:
      NotAPicture: no known format, damaged, or unsupported.
      TooLarge: past one of handlers.pictures.limits, by its header.
    """
    return _guarded(_decode_picture, data)


def decode_mask(data: bytes, picture: Picture, by_transparency: bool = False) -> Mask:
    """HxW bool: what the file marks of `picture`, by the rules of handlers.pictures.masks, or by transparency alone.

    Raises: as decode_picture; and NotAPicture where it is not as large as the picture.
    """
    return _guarded(lambda data: _decode_mask(data, picture, by_transparency), data)


def _decode_picture(data: bytes) -> Picture:
    decoded = _decoded(data)
    said, orientation, left_out = metadata.read(data)
    upright = _upright(decoded, orientation)
    if decoded.recoloured:
        said = said._replace(icc=None)
    return Picture(upright.samples, upright.alpha, said, decoded.notes + left_out)


def _decode_mask(data: bytes, picture: Picture, by_transparency: bool) -> Mask:
    decoded = _decoded(data)
    _, orientation, _ = metadata.read(data)
    upright = _upright(decoded, orientation)
    height, width = upright.samples.shape[:2]
    if (width, height) != picture.size:
        raise NotAPicture(
            f"is {width}x{height} but the picture is {picture.size[0]}x{picture.size[1]}: send a mask of the same size"
        )
    return transparent_in(upright) if by_transparency else mask_of(upright, picture)


def _upright(decoded: Decoded, orientation: int) -> Decoded:
    if decoded.upright:
        return decoded
    alpha, palette = decoded.alpha, decoded.palette
    return decoded._replace(
        samples=metadata.turned(decoded.samples, orientation),
        alpha=None if alpha is None else metadata.turned(alpha, orientation),
        palette=palette and palette._replace(indices=metadata.turned(palette.indices, orientation)),
        upright=True,
    )


def _decoded(data: bytes) -> Decoded:
    for signature, decode in _DECODERS:
        if data.startswith(signature):
            return decode(data)
    if heif_pixels.is_heif(data):
        return heif_pixels.decode(data)
    if data[4:8] == b"ftyp":
        raise unsupported(f"a file of the brand {data[8:12].decode('latin-1')!a}", f"send {_KNOWN}")
    raise NotAPicture(f"is not a picture in a known format ({_KNOWN})")


def _decode_webp(data: bytes) -> Decoded:
    image = Image.open(io.BytesIO(data), formats=["WEBP"])
    check_size(*image.size, len(data))
    notes = ("holds several frames; only the first was used",) if getattr(image, "is_animated", False) else ()
    return from_pillow(image)._replace(notes=notes)


_DECODERS: tuple[tuple[bytes, Callable[[bytes], Decoded]], ...] = (
    (PNG_SIGNATURE, png_pixels.decode),
    (b"\xff\xd8\xff", jpeg_pixels.decode),
    (b"II*\0", tiff_pixels.decode),
    (b"MM\0*", tiff_pixels.decode),
    (b"II+\0", tiff_pixels.decode),
    (b"MM\0+", tiff_pixels.decode),
    (b"RIFF", _decode_webp),
    (b"GIF8", gif_pixels.decode),
    (b"BM", bmp_pixels.decode),
)


def _guarded(decode: Callable[[bytes], _Result], data: bytes) -> _Result:
    try:
        with warnings.catch_warnings():
            # Pillow warns of what it survives, and at 90 megapixels; our own limits say what matters.
            warnings.simplefilter("ignore")
            return decode(data)
    except (NotAPicture, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise TooLarge("would take too much memory to decode: send it as PNG or JPEG") from None
    except UnidentifiedImageError:
        if is_picture(data):
            raise NotAPicture("is damaged: it ends too early or its header is broken") from None
        raise NotAPicture(f"is not a picture in a known format ({_KNOWN})") from None
    # A damaged file can make decoders raise nearly anything (OSError, ValueError, IndexError, struct.error, cv2.error).
    except Exception as error:
        raise NotAPicture(f"is damaged: it cannot be decoded ({type(error).__name__})") from None
