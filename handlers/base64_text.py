"""Bytes and arrays as text that travels in JSON."""

import base64
import binascii
import re
from io import BytesIO
from typing import Any

import numpy as np

from handlers.errors import BadRequest

_DATA_URI = re.compile(r"^data:[\w.+/-]*(;[\w=.+-]+)*;base64,", re.ASCII)


def to_base64(data: bytes) -> str:
    """Standard base64 without line breaks."""
    return base64.b64encode(data).decode("ascii")


def from_base64(text: str, name: str) -> bytes:
    """Accepts a data URI, base64url, line breaks and missing padding; anything else is a BadRequest for `name`."""
    payload = "".join(_DATA_URI.sub("", text, count=1).split()).rstrip("=")
    payload = payload.replace("-", "+").replace("_", "/")
    # 4n+1 characters cannot come from any number of bytes: the text was cut.
    if len(payload) % 4 == 1:
        raise BadRequest(f"{name} is cut off: its base64 text does not end at a whole byte", name)
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{name} is neither base64 nor a data URI of a picture", name) from None


def array_to_text(array: np.ndarray[Any, np.dtype[Any]]) -> str:
    """An array as base64 of the .npy format in float16, small enough to travel in JSON."""
    buffer = BytesIO()
    np.save(buffer, array.astype(np.float16), allow_pickle=False)
    return to_base64(buffer.getvalue())


def text_to_array(text: Any, shape: tuple[int, ...], name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The inverse of array_to_text; the array must be finite and of `shape`."""
    if not isinstance(text, str):
        raise BadRequest(f"{name} must be the text that an earlier reply carried", name)
    try:
        array = np.load(BytesIO(from_base64(text, name)), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise BadRequest(f"{name} is not the text that an earlier reply carried", name) from None
    if array.shape != shape or array.dtype != np.float16 or not np.isfinite(array).all():
        raise BadRequest(f"{name} must hold finite float16 values of shape {list(shape)}", name)
    return array.astype(np.float32)
