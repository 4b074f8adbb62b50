"""Bytes and arrays as text that travels in JSON."""

import binascii
import re
from io import BytesIO
from typing import Any

import numpy as np
import pybase64

from contract.buffers import unquoted
from handlers.requests.errors import BadRequest

# Up to its comma; there may be others in quotes. Bounded, for any file may begin like this.
_DATA_URI = re.compile(rb'\s{0,100}data:((?:[^",]|"[^"]{0,1000}+"){0,1000}+),', re.IGNORECASE)
_MAX_PERCENT = 16 * 2**20
_ALPHABET = bytes.maketrans(b"-_", b"+/")


def to_base64(data: bytes) -> str:
    """Standard base64 without line breaks."""
    return pybase64.b64encode_as_string(data)


def from_base64(text: str | bytes, name: str) -> bytes:
    """Base64, base64url or a data URI (RFC 2397), with line breaks and without padding as well.

    Anything else is a BadRequest for `name`. No step makes an object per line or character: texts may have 100 MB.
    """
    data = _ascii(text, name) if isinstance(text, str) else text
    head = _DATA_URI.match(data)
    if head:
        data = data[head.end() :]
        if b"%" in data:
            if len(data) > _MAX_PERCENT:
                limit = _MAX_PERCENT >> 20
                raise BadRequest(f"{name}: a percent-encoded data URI may have {limit} MiB: send base64", name, 413)
            data = unquoted(data)
        if not head[1].rstrip().lower().endswith(b";base64"):
            return data
    try:
        return pybase64.b64decode(data, validate=True)
    except binascii.Error:  # it is none, or of one of the other forms: a copy less for most
        return _decoded(data.translate(_ALPHABET, b" \t\r\n\f\v").rstrip(b"="), name)


def _decoded(text: bytes, name: str) -> bytes:
    """text: without padding."""
    # 4n+1 characters cannot come from any number of bytes: the text was cut.
    if len(text) % 4 == 1:
        raise BadRequest(f"{name} is cut off: its base64 text does not end at a whole byte", name)
    try:
        return pybase64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise BadRequest(f"{name} is neither base64 nor a data URI of a picture", name) from None


def _ascii(text: str, name: str) -> bytes:
    try:
        return text.encode("ascii")
    except UnicodeEncodeError:
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
