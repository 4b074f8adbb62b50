"""What the image-edit call of the OpenAI API takes, and what it is in the words of the editing API."""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field, StrictBool, StringConstraints
from pydantic_core import PydanticCustomError

from handlers.requests.fields import FEATHER, FULL, PATCH
from handlers.sd import description as sd
from serve.gateway.edit.fields import Fields, Model, Number, Painting, Picture, ReplaceFields, Text, Whole, like

QUALITIES = {
    "auto": "standard",
    "standard": "standard",
    "low": "draft",
    "medium": "standard",
    **dict.fromkeys(("high", "xhigh", "max"), "best"),
}
"""quality -> that of /v1/replace."""
NO_EFFECT = ("output_compression", "input_fidelity", "user", "safety_identifier")
"""What clients send and nothing here depends on."""
MOST_PARTIALS = 3

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")


def _only_one(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise PydanticCustomError("pictures", "one picture is edited at a time, not {count}", {"count": len(value)})
    return value[0]


# A type checker can't know the words.
if TYPE_CHECKING:
    Quality: TypeAlias = str
else:
    Quality = Literal[tuple(QUALITIES)]
Size = Annotated[str, StringConstraints(strict=True, pattern=rf"^(auto|{_SIZE.pattern})$", max_length=11)]


class ImageEditFields(Painting, Fields):
    """The call's own fields, and of /v1/replace what says how to paint."""

    lists: ClassVar[tuple[str, ...]] = ("image",)

    image: Annotated[Picture, BeforeValidator(_only_one)] = Field(
        description="The picture, one: a file, or the id that POST /v1/images gave.",
        examples=["img_3f786850e387550fdab836ed7e6dc881de23001b"],
    )
    mask: Picture = Field(
        description="As large as the picture, and fully transparent (alpha 0) where to edit: nothing else of it counts,"
        " and nothing else is edited.",
        examples=["img_aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"],
    )
    model: Model = Field(
        "sd", description="An archive that takes a prompt; any other name, as gpt-image-1, means sd.", examples=["sd"]
    )
    n: Whole = like(sd.VARIANTS, 2)
    size: Size = Field("auto", description="The picture's own, as 1499x1041, or auto: nothing is resized.")
    quality: Quality = Field(
        "auto",
        description="Of /v1/replace: " + ", ".join(f"{name} is {own}" for name, own in QUALITIES.items()) + ".",
    )
    output_format: Literal["png", "jpeg", "webp"] = Field("png", description="Of the pictures in the reply.")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="url: the results are kept like uploads, and their addresses on this server told."
    )
    stream: StrictBool = Field(False, description="Server-sent events, of which the last hold the pictures.")
    partial_images: Whole = Field(
        0,
        ge=0,
        le=MOST_PARTIALS,
        description="Of a stream: so many drafts at most on the way, PNGs of the `box` that is being painted.",
    )
    background: Literal["auto", "opaque"] = Field(
        "auto", description="transparent is refused: transparency is what the picture has."
    )
    output_compression: Number | None = Field(None, ge=0, le=100, description="No effect, with a warning.")
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="No effect, with a warning: outside the mask every pixel stays."
    )
    user: Text | None = Field(None, description="No effect, with a warning.")
    safety_identifier: Text | None = Field(None, description="No effect, with a warning.")
    feather: Whole = like(FEATHER, 6)

    @property
    def as_url(self) -> bool:
        return self.response_format == "url"

    def warnings(self, model: str) -> list[str]:
        """What of the request has no effect. model: the archive that answers."""
        names = [name for name in NO_EFFECT if getattr(self, name) is not None]
        if self.partial_images and not self.stream:
            names.append("partial_images")
        other = [] if model == self.model else [f"model = {self.model!r} is no archive here: {model} answered"]
        return other + [f"{name} had no effect" for name in names]

    def replacing(self, model: str) -> ReplaceFields:
        """The same request to /v1/replace. model: the archive that it means. A kept result leaves as its patch."""
        shared = {name: getattr(self, name) for name in (*Painting.model_fields, "image", "mask", "feather")}
        own = {"quality": QUALITIES[self.quality], "variants": self.n, "model": model}
        kept = {"keep": self.as_url, "result": PATCH if self.as_url else FULL}
        return ReplaceFields.model_validate(shared | own | kept)

    def arguments(self) -> dict[str, Any]:
        """The handler's gen_args beside those of /v1/replace."""
        size = _SIZE.fullmatch(self.size)
        own = {sd.SIZE.name: [int(side) for side in size.groups()]} if size else {}
        return own | {sd.MASK_BY.name: sd.TRANSPARENCY, "output_format": self.output_format}
