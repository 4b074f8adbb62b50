"""What arrives in a request: bytes -> arrays, field checks.

The original example's payloads are taken as they are: a JSON object with base64 pictures and `gen_args` as a JSON
string, or the same fields as multipart parts. Whatever is wrong with them raises BadRequest, which names the field.
"""

import hashlib
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from contract.bodies import BodyError, Buffer, Slice, read_body, read_value, text_of
from contract.buffers import whole
from contract.description import MAX_TEXT, Choice, Flag, Integer, Number, Structure
from contract.pictures import is_picture, name_of
from handlers.pictures import decoding
from handlers.pictures.masks import WHAT_A_MASK_IS, WHAT_TRANSPARENCY_MARKS
from handlers.pictures.picture import Mask, Picture
from handlers.requests.base64_text import from_base64
from handlers.requests.errors import BadRequest
from handlers.requests.jobs import SharedProgress
from handlers.requests.reply import Reply
from handlers.requests.timings import Timings

__all__ = ["Arguments", "BadRequest", "Reply", "Request", "Upload", "is_number"]


class Upload(NamedTuple):
    """A file in a field that is read on demand. content: the name that contract.pictures gives its bytes."""

    content: str
    read: Callable[[], bytes]


_Decoded = TypeVar("_Decoded")
_Value = TypeVar("_Value")
_MAX_ARGUMENTS = 2**22  # characters of gen_args, which may hold a mask's logits


class Request:
    """The fields of one request, decoded on demand.

    fields: as contract.bodies reads them, or as TorchServe does. body: what their slices are of. job: where to tell the
    progress. warnings: what the client should know although the request is served; handlers put them into their reply.
    timings: what its stages took so far.
    """

    def __init__(self, fields: Mapping[str, Any], job: SharedProgress | None = None, body: Buffer = b"") -> None:
        self.fields = fields
        self.job = job or SharedProgress()
        self.warnings: list[str] = []
        self.timings = Timings()
        self._body = body
        self._files: dict[str, bytes] = {}  # read for their names, and not decoded yet

    @classmethod
    def read(
        cls, content_type: str, content_encoding: str, body: Buffer, job: SharedProgress | None = None
    ) -> "Request":
        """A request whose body comes as it was sent. Raises BadRequest."""
        with _as_bad_request():
            return cls(read_body(content_type, content_encoding, body), job, body)

    @classmethod
    def parse(cls, data: Mapping[str, Any], job: SharedProgress | None = None) -> "Request":
        """data: TorchServe's view of a request: the raw or already decoded JSON under "body", or multipart parts."""
        body = data.get("body", data.get("data"))
        if body is None:
            return cls(data, job)
        if isinstance(body, str):
            body = body.encode("utf-8", "surrogatepass")
        if isinstance(body, (bytes, bytearray)):
            return cls.read("", "", body, job)
        if not isinstance(body, Mapping):
            raise BadRequest("the body must be a JSON object or multipart/form-data")
        return cls(body, job)

    def picture(self, name: str) -> Picture:
        """The upright picture in field `name`; 413 where it is past a limit."""
        with self.timings.stage("decode"):
            picture = _decoded(decoding.decode_picture, self._bytes(name), name)
        self.note(name, picture.notes)
        return picture

    def note(self, name: str, notes: Iterable[str]) -> None:
        """Warns of what a Picture says of itself, which field `name` holds."""
        self.warnings += [f"{name} {note}" for note in notes]

    def content(self, name: str) -> str:
        """The name that contract.pictures gives the file in field `name`; an upload is not read for it."""
        value = self.fields.get(name)
        if isinstance(value, Upload):
            return value.content
        with self.timings.stage("decode"):
            self._files[name] = self._bytes(name)
            return name_of(hashlib.sha256(self._files[name]).digest())

    def mask(self, name: str, picture: Picture, by_transparency: bool = False) -> Mask:
        """The mask in field `name`, which must be as large as the picture and mark at least one pixel of it.

        by_transparency: whether it marks what is fully transparent in it, and nothing else counts.
        """
        with self.timings.stage("decode"):
            mask = _decoded(lambda data: decoding.decode_mask(data, picture, by_transparency), self._bytes(name), name)
        if not mask.any():
            what = WHAT_TRANSPARENCY_MARKS if by_transparency else WHAT_A_MASK_IS
            raise BadRequest(f"{name}: the mask is empty: {what}", name)
        if mask.all():
            self.warnings.append(f"{name} covers the whole picture, so nothing of it can serve as context")
        return mask

    def text(self, name: str, default: str | None = None) -> str:
        """The text in field `name`; without a default it is required."""
        value = self.fields.get(name)
        value = default if value is None else self._as_text(name, value, MAX_TEXT)
        if value is None:
            raise BadRequest(f"{name} is missing: send a text", name)
        if not isinstance(value, str):
            raise BadRequest(f"{name} must be a text, not {_show(value)}", name)
        if len(value) > MAX_TEXT:
            raise BadRequest(f"{name} has {len(value)} characters; the limit is {MAX_TEXT}", name)
        with _as_bad_request():
            return whole(value, name)

    def arguments(self) -> "Arguments":
        """`gen_args`: a JSON object, or the text of one; absent, empty or null means none."""
        value = self._as_text("gen_args", self.fields.get("gen_args"), _MAX_ARGUMENTS)
        if isinstance(value, str):
            value = _json(value, "gen_args") if value else {}
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise BadRequest("gen_args must be a JSON object", "gen_args")
        values = {name: self._as_text(f"gen_args.{name}", item, _MAX_ARGUMENTS) for name, item in value.items()}
        return Arguments(values, self.warnings)

    def _as_text(self, name: str, value: Any, max_characters: int) -> Any:
        """Slices and bytes as text; all else as it is."""
        with _as_bad_request():
            if isinstance(value, (bytes, bytearray)):
                return text_of(value, Slice(0, len(value), text=False), name, max_characters)
            return text_of(self._body, value, name, max_characters) if isinstance(value, Slice) else value

    def _bytes(self, name: str) -> bytes:
        if name in self._files:
            return self._files.pop(name)
        value = self.fields.get(name)
        if isinstance(value, Upload):
            return value.read()
        if isinstance(value, Slice):
            if value.text:
                return from_base64(self._as_text(name, value, len(memoryview(self._body))), name)
            value = bytes(memoryview(self._body)[value.start : value.stop])
        if value is None or value in ("", b""):
            raise BadRequest(f"{name} is missing: send a picture as base64 or as a multipart file", name)
        if isinstance(value, str):
            return from_base64(value, name)
        if isinstance(value, (bytes, bytearray)):
            # A multipart field may carry the base64 text as well as the file.
            return bytes(value) if is_picture(value) else _maybe_base64(bytes(value), name)
        raise BadRequest(f"{name} must be base64 text or a file, not {_show(value)}", name)


class Arguments:
    """Typed access to `gen_args`, argument by argument as the model describes it. What no handler asked for ends in a
    warning, never in silence.
    """

    def __init__(self, values: Mapping[str, Any], warnings: list[str]) -> None:
        self._values, self._warnings, self._known = values, warnings, set[str]()

    def structure(self, argument: Structure) -> Any:
        """The value as it came, for whoever knows its form; None where it is absent or null."""
        return self._get(argument.name)

    def integer(self, argument: Integer, default: int | None = None) -> int:
        """A whole number as the argument allows it; 7.0 is one. default: for an argument that has none of its own."""
        value = self._get(argument.name)
        if value is None:
            return _given(argument.default, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not argument.low <= value <= argument.high:
            raise self._refuse(argument.name, f"a whole number from {argument.low} to {argument.high}", value)
        return value

    def number(self, argument: Number, default: float | None = None) -> float:
        """A finite number as the argument allows it."""
        value = self._get(argument.name)
        if value is None:
            return _given(argument.default, default)
        if not is_number(value) or not argument.low <= value <= argument.high:
            raise self._refuse(argument.name, f"a number from {argument.low:g} to {argument.high:g}", value)
        return float(value)

    def flag(self, argument: Flag, default: bool | None = None) -> bool:
        """true or false."""
        value = self._get(argument.name)
        if value is None:
            return _given(argument.default, default)
        if not isinstance(value, bool):
            raise self._refuse(argument.name, "true or false", value)
        return value

    def choice(self, argument: Choice, default: str | None = None) -> str:
        """One of the argument's words."""
        value = self._get(argument.name)
        if value is None:
            return _given(argument.default, default)
        if value not in argument.choices:
            raise self._refuse(argument.name, "one of " + ", ".join(argument.choices), value)
        return str(value)

    def finish(self) -> None:
        """Warns of every name that was sent but that the handler does not know."""
        for name in sorted(set(self._values) - self._known):
            self._warnings.append(f"gen_args.{_show(name)} is unknown and was ignored")

    def _get(self, name: str) -> Any:
        self._known.add(name)
        return self._values.get(name)

    def _refuse(self, name: str, allowed: str, value: Any) -> BadRequest:
        return BadRequest(f"gen_args.{name} must be {allowed}, not {_show(value)}", f"gen_args.{name}")


def _given(own: _Value | None, default: _Value | None) -> _Value:
    value = default if own is None else own
    assert value is not None, "an argument without a default of its own is read with one"
    return value


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
        decoded = from_base64(data, name)
    except BadRequest:
        return data
    return decoded if is_picture(decoded) else data


def _json(text: str, name: str) -> Any:
    data = text.encode("utf-8", "surrogatepass")
    with _as_bad_request():
        return read_value(data, 0, len(data), name, slices=False)


@contextmanager
def _as_bad_request() -> Iterator[None]:
    try:
        yield
    except BodyError as error:
        raise BadRequest(error.message, error.field, error.status) from None


def _show(value: Any) -> str:
    """A value as it may appear in an error message: short, so that no picture is ever quoted back."""
    text = "a long text" if isinstance(value, Slice) else reprlib.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
