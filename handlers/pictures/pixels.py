"""What decoders hand on, and how they refuse."""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from handlers.pictures.limits import LIMITS
from handlers.pictures.picture import RGB, Samples


class NotAPicture(ValueError):
    """The bytes cannot be decoded; the message continues a sentence that starts with the field's name."""


class TooLarge(NotAPicture):
    """The header announces more than handlers.pictures.limits allows; nothing was decoded."""


class Palette(NamedTuple):
    """indices: HxW uint8 or uint16. colours: Nx3, one for each index that there may be."""

    indices: NDArray[Any]
    colours: RGB


class Decoded(NamedTuple):
    """samples, alpha: as in Picture, as they lie in the file unless `upright`. palette: where the file has one.

    notes: for the client. recoloured: whether the file's colour profile no longer describes the samples.
    one: what the file's 1 is among the samples; more than that where fewer than 8 bits were spread over 0..255.
    """

    samples: Samples
    alpha: Samples | None = None
    palette: Palette | None = None
    notes: tuple[str, ...] = ()
    recoloured: bool = False
    upright: bool = False
    one: int = 1


def damaged(why: str) -> NotAPicture:
    return NotAPicture(f"is damaged: {why}")


def unsupported(what: str, advice: str = "send PNG, JPEG, WebP or TIFF of 8 or 16 bits") -> NotAPicture:
    """what: of a sentence such as `is a JPEG of 12 bits`."""
    return NotAPicture(f"is {what}, which is unsupported: {advice}")


def check_size(width: int, height: int, length: int) -> None:
    """Checks a picture in a file of `length` bytes; raises NotAPicture where there are no pixels, or TooLarge."""
    pixels = width * height
    if pixels <= 0:
        raise damaged(f"its header says {width}x{height} pixels")
    if pixels > LIMITS.max_pixels:
        raise TooLarge(f"has {width}x{height} pixels; the limit is {LIMITS.max_pixels // 1_000_000} megapixels")
    if max(width, height) > LIMITS.max_side:
        raise TooLarge(f"has {width}x{height} pixels; the limit is {LIMITS.max_side} pixels a side")
    if pixels > LIMITS.small_picture and pixels > LIMITS.max_pixels_per_byte * length:
        raise TooLarge(
            f"has {width}x{height} pixels in {length} bytes; the limit is {LIMITS.max_pixels_per_byte} pixels per byte"
        )


def check_decoded(pixels: NDArray[Any] | None, height: int, width: int, depth: int) -> NDArray[Any]:
    """A decoder's array, if it is what the header announced; NotAPicture otherwise."""
    if pixels is None:
        raise damaged("it ends too early or its data are broken")
    if pixels.shape[:2] != (height, width) or pixels.dtype != (np.uint16 if depth > 8 else np.uint8):
        raise damaged("its data are not what its header says")
    return pixels


def from_indices(indices: NDArray[np.uint8], colours: bytes, alphas: bytes = b"") -> Decoded:
    """A palette picture; grey where all its colours are.

    colours: RGB by index, black where there are none. alphas: by index, opaque where there are none.
    """
    table = np.zeros((256, 3), np.uint8)
    given = np.frombuffer(colours[:768], np.uint8)
    own = given[: len(given) // 3 * 3].reshape(-1, 3)
    table[: len(own)] = own
    alpha = None
    if alphas:
        opacity = np.full(256, 255, np.uint8)
        opacity[: len(alphas)] = np.frombuffer(alphas[:256], np.uint8)
        alpha = np.asarray(cv2.LUT(indices, opacity))
    is_grey = bool((own == own[:, :1]).all())
    channels = [cv2.LUT(indices, table[:, channel]) for channel in range(1 if is_grey else 3)]
    return Decoded(np.asarray(cv2.merge(channels)), alpha, Palette(indices, table))


def unmultiplied(plain: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Colours (HxWxC) that were multiplied by alpha (HxW), divided by it; as they are where nothing shows."""
    most = np.iinfo(plain.dtype).max
    wide = alpha[..., None].astype(np.uint32)
    divided = (plain.astype(np.uint32) * most + wide // 2) // np.maximum(wide, 1)
    return np.where(wide > 0, np.minimum(divided, most), plain).astype(plain.dtype)


def from_pillow(image: Image.Image) -> Decoded:
    """A picture in one of the modes that Pillow reads WebP and AVIF in: grey or RGB of 8 bits, alpha or none."""
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise unsupported(f"a picture of the mode {image.mode}")
    pixels = np.array(image)
    if image.mode in ("L", "RGB"):
        return Decoded(pixels)
    colours = pixels[..., 0] if image.mode == "LA" else pixels[..., :3]
    return Decoded(np.ascontiguousarray(colours), np.ascontiguousarray(pixels[..., -1]))
