"""What arrives in a request and what leaves in a reply: bytes <-> arrays, field checks, limits.

The original example's payloads are taken as they are: a JSON object with base64 pictures and `gen_args` as a JSON
string, or the same fields as multipart parts. Whatever is wrong with them raises BadRequest, which names the field.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np

from handlers import imaging
from handlers.imaging import Mask, Picture

_DATA_URI = re.compile(r"^data:[\w.+/-]*(;[\w=.+-]+)*;base64,", re.ASCII)
_PICTURE_TYPES = ("image/png", "image/jpeg", "image/webp")


class BadRequest(Exception):
    """The client's fault: becomes a 4xx reply that names the field and says what is allowed."""

    def __init__(self, message: str, field: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message, self.field, self.status = message, field, status


@dataclass
class Reply:
    """A handler's answer.

    picture: the edited picture, or a mask; leaves as `generated_image` (base64) in JSON or as the body itself.
    fields: further JSON fields; those with a plain value also leave as X-Palimpsest-* headers of a binary reply.
    """

    picture: Picture | Mask
    fields: dict[str, Any] = field(default_factory=dict)

    def encode(self, accept: str) -> tuple[bytes, str, dict[str, str]]:
        """Returns (body, content type, headers) in the form that the Accept header asks for; JSON by default."""
        wanted = preferred_picture_type(accept)
        if wanted is None:
            body = {"generated_image": to_base64(imaging.encode(self.picture, "image/png")), **self.fields}
            return json.dumps(body).encode(), "application/json", {}
        # A mask is never JPEG: its edge would come back as 93 grey levels.
        content_type = wanted if isinstance(self.picture, Picture) else "image/png"
        return imaging.encode(self.picture, content_type), content_type, _headers(self.fields)


class Request:
    """The fields of one request, decoded on demand.

    warnings: what the client should know although the request is served; handlers put them into their reply.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.warnings: list[str] = []

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> "Request":
        """data: TorchServe's view of a request: the raw or already decoded JSON under "body", or multipart parts."""
        body = data.get("body", data.get("data"))
        if body is None:
            return cls(data)
        if isinstance(body, (bytes, bytearray, str)):
            body = _json(body, "the body")
        if not isinstance(body, Mapping):
            raise BadRequest("the body must be a JSON object or multipart/form-data")
        return cls(body)

    def picture(self, name: str) -> Picture:
        """The upright picture in field `name`; 413 where it has too many pixels."""
        picture, frames = _decoded(imaging.decode_picture, self._bytes(name), name)
        if frames > 1:
            self.warnings.append(f"{name} has {frames} frames; only the first was used")
        return picture

    def mask(self, name: str, size: tuple[int, int]) -> Mask:
        """The mask in field `name`, which must be of `size` (width, height) and mark at least one pixel."""
        mask = _decoded(imaging.decode_mask, self._bytes(name), name)
        height, width = mask.shape
        if (width, height) != size:
            raise BadRequest(
                f"{name} is {width}x{height} but the picture is {size[0]}x{size[1]}: send a mask of the same size", name
            )
        if not mask.any():
            raise BadRequest(f"{name}: the mask is empty; white (128 or more of 255) marks what to change", name)
        if mask.all():
            self.warnings.append(f"{name} covers the whole picture, so nothing of it can serve as context")
        return mask

    def text(self, name: str, default: str | None = None) -> str:
        """The text in field `name`; without a default it is required."""
        value = self.fields.get(name, default)
        if isinstance(value, (bytes, bytearray)):
            value = _utf8(value, name)
        if value is None:
            raise BadRequest(f"{name} is missing: send a text", name)
        if not isinstance(value, str):
            raise BadRequest(f"{name} must be a text, not {_show(value)}", name)
        return value

    def arguments(self) -> "Arguments":
        """`gen_args`: a JSON object, or the text of one; absent means none."""
        value = self.fields.get("gen_args", {})
        if isinstance(value, (bytes, bytearray, str)):
            value = _json(value, "gen_args") if value else {}
        if not isinstance(value, Mapping):
            raise BadRequest("gen_args must be a JSON object", "gen_args")
        return Arguments(value, self.warnings)

    def _bytes(self, name: str) -> bytes:
        value = self.fields.get(name)
        if value is None or value in ("", b""):
            raise BadRequest(f"{name} is missing: send a picture as base64 or as a multipart file", name)
        if isinstance(value, str):
            return from_base64(value, name)
        if isinstance(value, (bytes, bytearray)):
            # A multipart field may carry the base64 text as well as the file.
            return bytes(value) if imaging.is_picture(value) else _maybe_base64(bytes(value), name)
        raise BadRequest(f"{name} must be base64 text or a file, not {_show(value)}", name)


class Arguments:
    """Typed access to `gen_args`. Names that no handler asked for end in a warning, never in silence."""

    def __init__(self, values: Mapping[str, Any], warnings: list[str]) -> None:
        self._values, self._warnings, self._known = values, warnings, set[str]()

    def get(self, name: str) -> Any:
        """The raw value, or None where it is absent or null."""
        self._known.add(name)
        return self._values.get(name)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self._refuse(name, f"a whole number from {low} to {high}", value)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A finite number in [low, high]."""
        value = self.get(name)
        if value is None:
            return default
        if not is_number(value) or not low <= value <= high:
            raise self._refuse(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._refuse(name, "true or false", value)
        return value

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of `allowed`."""
        value = self.get(name)
        if value is None:
            return default
        if value not in allowed:
            raise self._refuse(name, "one of " + ", ".join(allowed), value)
        return str(value)

    def finish(self) -> None:
        """Warns of every name that was sent but that the handler does not know."""
        for name in sorted(set(self._values) - self._known):
            self._warnings.append(f"gen_args.{_show(name)} is unknown and was ignored")

    def _refuse(self, name: str, allowed: str, value: Any) -> BadRequest:
        return BadRequest(f"gen_args.{name} must be {allowed}, not {_show(value)}", f"gen_args.{name}")


def is_number(value: Any) -> bool:
    """Whether value is a finite int or float; true and false are not numbers here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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


def preferred_picture_type(accept: str) -> str | None:
    """The picture type that an Accept header prefers over JSON, or None for JSON."""
    ranked: list[tuple[float, int, str]] = []
    for position, item in enumerate(accept.lower().split(",")):
        media, *parameters = (part.strip() for part in item.split(";"))
        quality = next((_quality(p) for p in parameters if p.startswith("q=")), 1.0)
        media = "image/png" if media == "image/*" else media
        if quality > 0 and media in (*_PICTURE_TYPES, "application/json", "*/*"):
            ranked.append((-quality, position, media))
    best = min(ranked)[2] if ranked else "application/json"
    return best if best in _PICTURE_TYPES else None


def _quality(parameter: str) -> float:
    try:
        return float(parameter[2:])
    except ValueError:
        return 0.0


def _headers(fields: Mapping[str, Any]) -> dict[str, str]:
    """Plain values as headers; text is JSON-quoted ASCII, so that no value can break out of its header."""
    return {
        "X-Palimpsest-" + name.replace("_", "-").title(): json.dumps(value)
        for name, value in fields.items()
        if isinstance(value, (bool, int, float))
        or (isinstance(value, list) and all(isinstance(v, str) for v in value) and len(json.dumps(value)) < 2000)
    }


def _decoded(decode: Any, data: bytes, name: str) -> Any:
    try:
        return decode(data)
    except imaging.TooManyPixels as error:
        raise BadRequest(f"{name} {error}", name, status=413) from None
    except imaging.NotAPicture as error:
        raise BadRequest(f"{name} {error}", name) from None


def _maybe_base64(data: bytes, name: str) -> bytes:
    try:
        decoded = from_base64(data.decode("ascii"), name)
    except (UnicodeDecodeError, BadRequest):
        return data
    return decoded if imaging.is_picture(decoded) else data


def _json(text: bytes | bytearray | str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest(f"{name} is not valid JSON", None if name == "the body" else name) from None


def _utf8(value: bytes | bytearray, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{name} must be UTF-8 text", name) from None


def _show(value: Any) -> str:
    """A value as it may appear in an error message: short, so that no picture is ever quoted back."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
