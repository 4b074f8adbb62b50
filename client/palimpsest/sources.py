"""What users give as pictures and masks -> what is sent: files, or what the server has already."""

import io
import os
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_FAST = {"compress_level": 1}  # of a PNG: half of the time that it takes by default, for a tenth more bytes


class Source:
    """A picture or mask. id: what the server calls it, if it was told. data: its file's bytes, if they are here."""

    id: str | None
    data: bytes | None


class File(Source):
    """A file's bytes."""

    data: bytes

    def __init__(self, data: bytes) -> None:
        self.id, self.data = None, data


class Upload(Source):
    """A picture that the server keeps for a while, by its id; other calls take it in a picture's or a mask's place.

    data: the file's bytes, which are sent again once the server has forgotten it; None where nobody here has them: then
    that is NotFound.

    Example: `picture = client.upload("bench.jpg"); client.erase(picture, box=(600, 300, 700, 400))`.
    """

    id: str

    def __init__(self, id: str, data: bytes | None = None) -> None:
        self.id, self.data = id, data

    def __repr__(self) -> str:
        return f"Upload({self.id!r})"


FileInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[Any]
"""A path; a file's bytes; a Pillow picture; an array, HxW (grey), HxWx2 (grey and alpha), HxWx3 (RGB) or HxWx4 (RGBA)
of uint8, or HxW of uint16. Of a Pillow picture and of an array the pixels count as they lie."""

PictureInput: TypeAlias = FileInput | Source
"""Also an Upload or an earlier result."""

MaskInput: TypeAlias = FileInput | Source
"""As large as the picture. An array of bool, HxW, True where to change; or else as a picture: 128 or more of 255 marks.
A Segmentation is the mask that it found."""


def picture_source(given: PictureInput) -> Source:
    """May read a file or encode pixels. Raises TypeError and ValueError for what is no picture, OSError of the file."""
    return _source(given, "image")


def mask_source(given: MaskInput) -> Source:
    """Raises as picture_source."""
    if isinstance(given, np.ndarray) and given.dtype == np.bool_ and given.ndim == 2:
        return File(_png(Image.fromarray(given)))
    return _source(given, "mask")


def _source(given: Any, field: str) -> Source:
    if isinstance(given, Source):
        return given
    if isinstance(given, str | os.PathLike):
        return File(Path(given).read_bytes())
    if isinstance(given, bytes | bytearray | memoryview):
        return File(bytes(given))
    if isinstance(given, Image.Image):
        return File(_from_pillow(given, field))
    if isinstance(given, np.ndarray):
        return File(_from_array(given, field))
    raise TypeError(
        f"{field} must be a path, bytes, a Pillow picture, an array or a result, not {type(given).__name__}"
    )


def _from_pillow(image: Image.Image, field: str) -> bytes:
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        raise ValueError(f"{field} is a Pillow picture of mode {image.mode}: convert it to RGB, or send its file")
    return _png(image)


def _from_array(array: NDArray[Any], field: str) -> bytes:
    if array.dtype == np.uint16 and array.ndim == 2:
        return _png(Image.fromarray(array))
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels > 4:
        raise ValueError(
            f"{field} is an array of {array.dtype} and shape {array.shape}: HxW, HxWx2, HxWx3 or HxWx4 of uint8 and HxW"
            " of uint16 are pictures"
        )
    return _png(Image.fromarray(array[..., 0] if array.ndim == 3 and channels == 1 else array))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=b"", **_FAST)
    return buffer.getvalue()
