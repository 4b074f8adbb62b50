"""Pure functions on pictures and masks: decode, encode, dilate, crop, paste back.

Arrays are RGB (never BGR), height first. A mask is bool: True marks the pixels that a model may change.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Mask = NDArray[np.bool_]
"""HxW bool: True where a model may change the picture."""

RGB = NDArray[np.uint8]
"""HxWx3 uint8, RGB, 0..255."""

MAX_PIXELS = 64_000_000
MASK_THRESHOLD = 128
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*", b"RIFF")


class NotAPicture(ValueError):
    """The bytes cannot be decoded; the message continues a sentence that starts with the field's name."""


class TooManyPixels(NotAPicture):
    """The header announces more than MAX_PIXELS; nothing was decoded."""


@dataclass(frozen=True)
class Picture:
    """An upright picture: rgb HxWx3 uint8, and alpha HxW uint8 where it had transparency."""

    rgb: RGB
    alpha: NDArray[np.uint8] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.rgb.shape[1], self.rgb.shape[0]


@dataclass(frozen=True)
class Box:
    """A pixel rectangle: left and top inside, right and bottom outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def of(self, array: NDArray[Any]) -> NDArray[Any]:
        """The view of `array` (HxW...) inside this box."""
        return array[self.top : self.bottom, self.left : self.right]


def is_picture(data: bytes | bytearray) -> bool:
    """Whether the first bytes are those of a picture format."""
    return bytes(data[:4]).startswith(_SIGNATURES)


def decode_picture(data: bytes) -> tuple[Picture, int]:
    """Returns the first frame, upright, and the number of frames.

    Raises:
      NotAPicture: no known format, or damaged.
      TooManyPixels: more than MAX_PIXELS by its header.
    """
    image, frames = _open(data)
    if _has_alpha(image):
        rgba = np.asarray(image.convert("RGBA"))
        return Picture(np.ascontiguousarray(rgba[..., :3]), np.ascontiguousarray(rgba[..., 3])), frames
    return Picture(np.array(_eight_bit(image).convert("RGB"))), frames


def decode_mask(data: bytes) -> Mask:
    """HxW bool. White is True: at least 128 of 255, or 1 where the picture holds only 0 and 1; transparent is False.

    Raises: as decode_picture.
    """
    image, _ = _open(data)
    if _has_alpha(image):
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        grey = (rgba[..., :3].max(axis=2) * rgba[..., 3] // 255).astype(np.uint8)
    else:
        grey = np.asarray(_eight_bit(image).convert("L"))
    return grey >= (1 if grey.max() == 1 else MASK_THRESHOLD)


def encode(picture: Picture | Mask, content_type: str) -> bytes:
    """A picture as PNG, JPEG (quality 95, 4:4:4, no alpha) or lossless WebP; a mask as 0/255 grey PNG.

    PNG is written at zlib's fastest level: the default takes several times a model's own time for a few per cent.
    """
    if not isinstance(picture, Picture):
        return _imencode(".png", picture.astype(np.uint8) * 255, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    bgr = picture.rgb[..., ::-1]
    if content_type == "image/jpeg":
        options = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        return _imencode(".jpg", np.ascontiguousarray(bgr), options)
    pixels = bgr if picture.alpha is None else np.dstack([bgr, picture.alpha])
    if content_type == "image/webp":
        return _imencode(".webp", np.ascontiguousarray(pixels), [cv2.IMWRITE_WEBP_QUALITY, 101])
    return _imencode(".png", np.ascontiguousarray(pixels), [cv2.IMWRITE_PNG_COMPRESSION, 1])


def dilate(mask: Mask, kernel_size: int) -> Mask:
    """Grows a mask by a square kernel; an even size acts as the next odd one, so that the mask never shifts."""
    if kernel_size <= 1:
        return mask
    kernel = np.ones((kernel_size | 1, kernel_size | 1), np.uint8)
    return cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)


def paste_back(picture: Picture, painted: RGB, mask: Mask) -> Picture:
    """Takes `painted` (as large as the picture) where the mask is True; every other sample stays what it was."""
    return Picture(np.where(mask[..., None], painted, picture.rgb), picture.alpha)


def bounding_box(mask: Mask) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def context_box(mask: Mask, native: int, context: float = 1.5) -> Box:
    """A box around the mask for a model that works at `native` x `native` pixels.

    It is square with a side of at least `native` (so that small objects are painted at full resolution) and at least
    `context` times the mask's longer side, centred on the mask, moved and at last cut to lie inside the picture.
    """
    height, width = mask.shape
    inner = bounding_box(mask)
    side = max(native, round(max(inner.width, inner.height) * context))
    left, right = _span(inner.left, inner.right, side, width)
    top, bottom = _span(inner.top, inner.bottom, side, height)
    return Box(left, top, right, bottom)


@dataclass(frozen=True)
class SquareFit:
    """How a WxH crop maps onto a square canvas: resized with its aspect kept, the rest of the canvas padded."""

    width: int
    height: int
    side: int

    @property
    def inner(self) -> tuple[int, int]:
        """(width, height) of the crop on the canvas."""
        scale = self.side / max(self.width, self.height)
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    def put(self, crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """HxW or HxWx3 uint8 -> side x side; the padding repeats the edge, so that it adds no false contour."""
        inner = _resize(crop, self.inner)
        below, right = self.side - inner.shape[0], self.side - inner.shape[1]
        return np.asarray(cv2.copyMakeBorder(inner, 0, below, 0, right, cv2.BORDER_REPLICATE))

    def put_mask(self, mask: Mask) -> Mask:
        """Any canvas pixel that a True pixel touches is True; the padding is False."""
        canvas = np.zeros((self.side, self.side), bool)
        width, height = self.inner
        # The area average of floats keeps a trace of every pixel, however small it becomes.
        canvas[:height, :width] = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0
        return canvas

    def take(self, canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The inverse of put: side x side -> the crop's own size."""
        width, height = self.inner
        return _resize(np.ascontiguousarray(canvas[:height, :width]), (self.width, self.height))


def grow_to_cells(mask: Mask, cell: int) -> Mask:
    """Fills every cell x cell block (sides must be multiples of cell) that holds a True pixel.

    A diffusion model sees the mask once per latent; a thin stroke between two samples would be lost.
    """
    height, width = mask.shape
    touched = mask.reshape(height // cell, cell, width // cell, cell).any(axis=(1, 3))
    return touched.repeat(cell, axis=0).repeat(cell, axis=1)


def _open(data: bytes) -> tuple[Image.Image, int]:
    try:
        with warnings.catch_warnings():
            # Our own limit is lower than Pillow's, and its warning for 90 to 180 megapixels would say so twice.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise TooManyPixels(
                f"has {image.width}x{image.height} pixels; the limit is {MAX_PIXELS // 1_000_000} megapixels"
            )
        frames = int(getattr(image, "n_frames", 1))
        image.load()
        return ImageOps.exif_transpose(image), frames
    except Image.DecompressionBombError:
        raise TooManyPixels(f"has more than {MAX_PIXELS // 1_000_000} megapixels") from None
    except UnidentifiedImageError:
        if is_picture(data):
            raise NotAPicture("is damaged: it ends too early or its header is broken") from None
        raise NotAPicture("is not a picture in a known format (PNG, JPEG, WebP, TIFF, GIF, BMP)") from None
    except NotAPicture:
        raise
    # A damaged file can make Pillow's decoders raise nearly anything (OSError, ValueError, IndexError, struct.error).
    except Exception as error:
        raise NotAPicture(f"is damaged: it cannot be decoded ({type(error).__name__})") from None


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535).astype(np.uint32) >> 8).astype(np.uint8))


def _imencode(extension: str, pixels: NDArray[np.uint8], options: list[int]) -> bytes:
    done, buffer = cv2.imencode(extension, pixels, options)
    if not done:
        raise ValueError(f"cannot encode a {extension[1:]} of shape {pixels.shape}")
    return bytes(buffer)


def _resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    if size == (width, height):
        return pixels
    method = cv2.INTER_AREA if size[0] < width or size[1] < height else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, size, interpolation=method))


def _span(low: int, high: int, side: int, limit: int) -> tuple[int, int]:
    side = min(side, limit)
    start = min(max((low + high - side) // 2, 0), limit - side)
    return start, start + side
