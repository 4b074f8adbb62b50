"""What arrives in a request: bytes -> arrays, field checks.

The original example's payloads are taken as they are: a JSON object with base64 pictures and `gen_args` as a JSON
string, or the same fields as multipart parts. Whatever is wrong with them raises BadRequest, which names the field.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from handlers import decoding
from handlers.base64_text import from_base64
from handlers.errors import BadRequest
from handlers.jobs import Job
from handlers.limits import LIMITS
from handlers.picture import Mask, Picture
from handlers.reply import Reply

__all__ = ["Arguments", "BadRequest", "Reply", "Request", "is_number"]

_Decoded = TypeVar("_Decoded")


class Request:
    """The fields of one request, decoded on demand.

    job: where to tell the progress. warnings: what the client should know although the request is served; handlers put
    them into their reply.
    """

    def __init__(self, fields: Mapping[str, Any], job: Job | None = None) -> None:
        self.fields = fields
        self.job = job or Job()
        self.warnings: list[str] = []

    @classmethod
    def parse(cls, data: Mapping[str, Any], job: Job | None = None) -> "Request":
        """data: TorchServe's view of a request: the raw or already decoded JSON under "body", or multipart parts."""
        body = data.get("body", data.get("data"))
        if body is None:
            return cls(data, job)
        if isinstance(body, (bytes, bytearray, str)):
            body = _json(body, "the body")
        if not isinstance(body, Mapping):
            raise BadRequest("the body must be a JSON object or multipart/form-data")
        return cls(body, job)

    def picture(self, name: str) -> Picture:
        """The upright picture in field `name`; 413 where it is past a limit."""
        picture = _decoded(decoding.decode_picture, self._bytes(name), name)
        self.warnings += [f"{name} {note}" for note in picture.notes]
        return picture

    def mask(self, name: str, size: tuple[int, int]) -> Mask:
        """The mask in field `name`, which must be of `size` (width, height) and mark at least one pixel."""
        mask = _decoded(decoding.decode_mask, self._bytes(name), name)
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
        if len(value) > LIMITS.max_text:
            raise BadRequest(f"{name} has {len(value)} characters; the limit is {LIMITS.max_text}", name)
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
            return bytes(value) if decoding.is_picture(value) else _maybe_base64(bytes(value), name)
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


def _decoded(decode: Callable[[bytes], _Decoded], data: bytes, name: str) -> _Decoded:
    try:
        return decode(data)
    except decoding.TooLarge as error:
        raise BadRequest(f"{name} {error}", name, status=413) from None
    except decoding.NotAPicture as error:
        raise BadRequest(f"{name} {error}", name) from None


def _maybe_base64(data: bytes, name: str) -> bytes:
    try:
        decoded = from_base64(data.decode("ascii"), name)
    except (UnicodeDecodeError, BadRequest):
        return data
    return decoded if decoding.is_picture(decoded) else data


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
