"""What leaves in a reply: pictures and fields -> a body, in the form that the Accept header asks for."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from contract.accept import JSON, OWN, PICTURES, preferred
from contract.commands import PREFIX
from handlers.pictures import encoding
from handlers.pictures.picture import Box, Mask, Picture
from handlers.requests.base64_text import to_base64

OUTPUT_FORMATS = {"input": OWN} | {kind.removeprefix("image/"): kind for kind in PICTURES}
"""gen_args.output_format -> content type."""

_MAX_HEADER = 2000  # characters of a value
_MAX_WARNING = 400  # of one warning among them


@dataclass(eq=False, repr=False)  # each method made costs a cold start half a millisecond
class Reply:
    """A handler's answer.

    picture: the edited picture, or a mask. variants: further ones of it; masks: the candidates that a mask is the best
        of, itself among them (both JSON only).
    box: of pictures and variants the reply shows only what lies in it, and says so in a field of that name.
    fields: further JSON fields; those with a short value also leave as X-Palimpsest-* headers of a binary reply. Bytes,
        and lists of bytes, leave as base64 and in JSON only.
    warnings: a field of their own.
    output_format: the content type of the pictures inside JSON; OWN for that of the request.
    """

    picture: Picture | Mask
    fields: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    variants: list[Picture] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    box: Box | None = None
    output_format: str = "image/png"

    def encoded(self, accept: str, keep: bool = False) -> "Encoded":
        """Encodes it in the form that the Accept header asks for.

        JSON by default, with the picture in `generated_image` (and the variants, it first, in `variants`); the picture
        itself for a picture type, in the request's own format for image/*. keep: whether `kept` is wanted.
        """
        wanted = preferred(accept, (JSON, OWN, *PICTURES), default=JSON)
        kind = self._writable(self.output_format if wanted == JSON else wanted)
        files = _Files(kind, self.box)
        picture = files.shown(self.picture)
        kept: dict[str, bytes | list[bytes]] = {"id": files.whole(self.picture)} if keep else {}
        fields = self.fields if self.box is None else self.fields | {"box": list(self.box)}
        if wanted != JSON:
            if self.variants:
                self.warnings.append("this reply holds the first variant only: accept application/json for all")
            return Encoded(kind, _headers(fields, self.warnings), picture, kept=kept)
        large: dict[str, Any] = {"generated_image": picture, "content_type": kind}
        if several := [self.picture, *self.variants] if self.variants else self.masks:
            large["variants" if self.variants else "masks"] = [files.shown(each) for each in several]
            kept |= {"ids": [files.whole(each) for each in several]} if keep else {}
        return Encoded(JSON, {}, picture, large | fields | {"warnings": self.warnings}, kept)

    def _writable(self, wanted: str) -> str:
        """The format to use, with warnings of what it can't hold."""
        if not isinstance(self.picture, Picture):
            return "image/png"  # a JPEG's edge would come back as 93 grey levels
        shown = self.picture if self.box is None else self.picture.cropped(self.box)
        kind = shown.metadata.content_type if wanted == OWN else wanted
        if not encoding.can_write(shown, kind):
            self.warnings.append(f"{kind} cannot hold this picture: it was sent as image/png")
            kind = "image/png"
        self.warnings += encoding.losses(shown, kind)
        return kind


class _Files:
    """Pictures and masks as files, each written once. kind: of those that are shown. box: all that they show."""

    def __init__(self, kind: str, box: Box | None) -> None:
        self._kind, self._box = kind, box
        self._shown: dict[int, bytes] = {}
        self._whole: dict[int, bytes] = {}

    def shown(self, picture: Picture | Mask) -> bytes:
        """Encodes it as the reply has it."""
        if id(picture) not in self._shown:
            self._shown[id(picture)] = self._encoded(picture)
        return self._shown[id(picture)]

    def whole(self, picture: Picture | Mask) -> bytes:
        """All of it, exactly: what is shown, where that is it already."""
        if not isinstance(picture, Picture) or (self._box is None and encoding.is_exact(picture, self._kind)):
            return self.shown(picture)
        if id(picture) not in self._whole:
            self._whole[id(picture)] = encoding.encode_exactly(picture)
        return self._whole[id(picture)]

    def _encoded(self, picture: Picture | Mask) -> bytes:
        if not isinstance(picture, Picture):
            return encoding.encode_mask(picture)
        return encoding.encode_picture(picture if self._box is None else picture.cropped(self._box), self._kind)


class Encoded(NamedTuple):
    """A reply as it leaves: the picture, or fields, in which bytes and lists of bytes stand for their base64.

    kept: what the gateway is to keep, as contract.ticket.Written has it.
    """

    content_type: str
    headers: dict[str, str]
    picture: bytes
    fields: dict[str, Any] | None = None
    kept: Mapping[str, bytes | list[bytes]] = MappingProxyType({})

    def body(self) -> bytes:
        """All in one piece, for whoever has no better way (see handlers/worker/tickets.py)."""
        if self.fields is None:
            return self.picture
        return json.dumps({name: _plain(value) for name, value in self.fields.items()}).encode()


def is_large(value: Any) -> bool:
    """Whether a field of Encoded leaves as base64."""
    return isinstance(value, bytes) or (isinstance(value, list) and bool(value) and isinstance(value[0], bytes))


def _plain(value: Any) -> Any:
    if not is_large(value):
        return value
    return to_base64(value) if isinstance(value, bytes) else [to_base64(each) for each in value]


def _headers(fields: Mapping[str, Any], warnings: list[str]) -> dict[str, str]:
    """Short values as headers; JSON-quoted ASCII, so that no value can break out of its header."""
    fields = dict(fields) | {"warnings": _shortened(warnings)}
    return {
        PREFIX.title() + name.replace("_", "-").title(): text
        for name, value in fields.items()
        if isinstance(value, (bool, int, float, list, dict))
        and not is_large(value)
        and len(text := json.dumps(value)) < _MAX_HEADER
    }


def _shortened(warnings: list[str]) -> list[str]:
    """The warnings as far as they fit a header; the last one says how many do not."""
    kept: list[str] = []
    for index, warning in enumerate(warnings):
        short = warning
        while len(json.dumps(short)) > _MAX_WARNING:  # a character may take twelve
            short = short[: len(short) * 3 // 4].removesuffix("...") + "..."
        if len(json.dumps([*kept, short])) > _MAX_HEADER - 50:
            return [*kept, f"and {len(warnings) - index} more"]
        kept.append(short)
    return kept
