"""What the editing API takes: typed, bounded, described. Unknown fields and wrong types are refused by name."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    StrictBool,
    StringConstraints,
    WithJsonSchema,
)

from contract.bodies import Slice
from contract.description import MAX_TEXT, Choice, Flag, Integer
from contract.description import Number as Fraction
from handlers.lama import description as lama
from handlers.requests.fields import FEATHER, FULL, OUTPUT_FORMAT, RESULT
from handlers.sam import description as sam
from handlers.sd import description as sd

_PICTURE: dict[str, Any] = {"type": "string", "format": "binary"}


def _whole(value: Any) -> Any:
    """7.0 is a whole number, as JSON Schema has it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, Field(strict=True), BeforeValidator(_whole)]
Steps = Annotated[int, Field(strict=True, ge=sd.STEPS.low, le=sd.STEPS.high), BeforeValidator(_whole)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Point = Annotated[list[Number], Field(min_length=2, max_length=3)]
Model = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=200)]
Pointer = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
Token = Annotated[str, StringConstraints(strict=True, max_length=1_000_000)]
Text = Annotated[str, StringConstraints(strict=True, max_length=MAX_TEXT)]
# A stretch of the body: a file, or a long text; or text: base64, a data URI, or the id of an upload.
Picture = Annotated[InstanceOf[Slice] | str, Field(union_mode="left_to_right"), WithJsonSchema(_PICTURE)]

# The handlers' own words; a type checker can't know them.
if TYPE_CHECKING:
    Format: TypeAlias = str
    Scheduler: TypeAlias = str
    Quality: TypeAlias = str
    Masks: TypeAlias = str
    EraseQuality: TypeAlias = str
    Result: TypeAlias = str
else:
    Format, Scheduler, Quality, Masks, Result = (
        Literal[each.choices] for each in (OUTPUT_FORMAT, sd.SCHEDULER, sd.QUALITY, sam.MASKS, RESULT)
    )
    EraseQuality = Literal[lama.QUALITY.choices]

_KEEP = (
    "Keeps {what} like an upload, exactly, and tells its id as `id` in JSON, else in the header X-Palimpsest-Id; of"
    " several as `ids`, in their order. {more}"
)

PICTURES = ("image", "mask")


def like(argument: Integer | Fraction | Flag | Choice, example: Any) -> Any:
    """A field with the default, the range and the help of the handler's argument."""
    low, high = (argument.low, argument.high) if isinstance(argument, (Integer, Fraction)) else (None, None)
    return Field(argument.default, ge=low, le=high, description=argument.help, examples=[example])


class Fields(BaseModel):
    """The fields of any request about a picture. lists: those that several parts of one name make up."""

    lists: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(extra="forbid", strict=True)

    image: Picture = Field(
        description="The picture: a multipart file, base64, a data URI, or the id that POST /v1/images gave.",
        examples=["img_3f786850e387550fdab836ed7e6dc881de23001b"],
    )


class Selection(Fields):
    """What to select in the picture, and how to shape the mask. All lengths are pixels of the upright picture."""

    lists: ClassVar[tuple[str, ...]] = ("points", "box")

    points: list[Point] | None = Field(
        None,
        min_length=1,
        max_length=sam.MAX_POINTS,
        description="[x, y] on the object, or [x, y, 0] on what does not belong to it; [x, y, 1] is [x, y].",
        examples=[[[750, 500], [400, 620, 0]]],
    )
    box: list[Number] | None = Field(
        None,
        min_length=4,
        max_length=4,
        description="[left, top, right, bottom] around the object.",
        examples=[[548, 208, 958, 885]],
    )
    dilate: Whole = like(sam.DILATE, 8)
    erode: Whole = like(sam.ERODE, 2)
    fill_holes: StrictBool = like(sam.FILL_HOLES, True)
    invert: StrictBool = like(sam.INVERT, False)
    smooth: Whole = like(sam.SMOOTH, 4)

    @property
    def selects(self) -> bool:
        return self.points is not None or self.box is not None

    def segmentation(self) -> dict[str, Any]:
        """The handler's gen_args."""
        points = self.points or []
        prompt: dict[str, Any] = {"point_coords": [p[:2] for p in points], "point_labels": [_label(p) for p in points]}
        if not points:
            prompt = {}
        if self.box is not None:
            prompt["box"] = self.box
        shape = self.model_dump(include={"dilate", "erode", "fill_holes", "invert", "smooth"})
        return prompt | shape


class SegmentFields(Selection):
    masks: Masks = like(sam.MASKS, "all")
    logits: Token | None = Field(
        None, description="The token of an earlier reply: refines that mask.", examples=["k05VTVBZAQB2AHsn..."]
    )
    return_logits: StrictBool = like(sam.RETURN_LOGITS, True)
    keep: StrictBool = Field(
        False, description=_KEEP.format(what="the mask", more="A mask of other calls can be an id."), examples=[True]
    )
    hover: Pointer | None = Field(
        None,
        description="Names a pointer, in words of your own: what still waits for its turn when the same pointer's next"
        " request comes ends with 409 `superseded`.",
        examples=["9f86d081884c7d65"],
    )
    model: Model = Field("sam", description="The archive to ask.", examples=["sam"])

    def segmentation(self) -> dict[str, Any]:
        more: dict[str, Any] = {"masks": self.masks, "return_logits": self.return_logits}
        if self.logits is not None:
            more["mask_input"] = self.logits
        return super().segmentation() | more


class Painted(Selection):
    """What to paint over: a mask, or what points and box select."""

    mask: Picture | None = Field(
        None,
        description="As large as the picture; 128 or more of 255 marks what to change. Instead of points and box.",
        examples=["img_aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d"],
    )
    segment_model: Model = Field(
        "sam", description="The archive that turns points and box into a mask.", examples=["sam"]
    )
    feather: Whole = like(FEATHER, 6)
    format: Format | None = Field(
        None,
        description="Of the picture; what Accept asks for if absent, else the input's own, of a patch PNG.",
        examples=["png"],
    )
    result: Result = like(RESULT, "patch")
    keep: StrictBool = Field(
        False,
        description=_KEEP.format(
            what="the whole result",
            more="In the input's own format, whatever `format` says; instead of a JPEG as a PNG that further edits take"
            " for the JPEG, so that however many of them lose nothing.",
        ),
        examples=[True],
    )

    def wanted(self) -> dict[str, Any]:
        """Returns what the handler is to show, as gen_args; an archive of another make knows whole pictures only."""
        return {} if self.result == FULL else {"result": self.result}


class EraseFields(Painted):
    quality: EraseQuality = like(lama.QUALITY, "best")
    model: Model = Field("lama", description="The archive to ask.", examples=["lama"])

    def painting(self) -> dict[str, Any]:
        """The handler's gen_args."""
        # Archives that were built before it was there know nothing of it.
        quality = {} if self.quality == lama.QUALITY.default else {"quality": self.quality}
        return self.wanted() | {"feather": self.feather} | quality

    def texts(self) -> dict[str, str]:
        """The handler's other fields."""
        return {}


class Painting(BaseModel):
    """What to paint, and how."""

    prompt: Text = Field(description=sd.PROMPT.help, examples=["a red mushroom"])
    negative_prompt: Text = Field("", description=sd.NEGATIVE_PROMPT.help, examples=["blurry"])
    steps: Steps | None = Field(sd.STEPS.default, description=sd.STEPS.help, examples=[30])
    guidance: Number | None = like(sd.GUIDANCE, 7.5)
    strength: Number = like(sd.STRENGTH, 0.8)
    seed: Whole = like(sd.SEED, 7)
    scheduler: Scheduler | None = like(sd.SCHEDULER, "dpmpp_2m_karras")


class ReplaceFields(Painting, Painted):
    quality: Quality = like(sd.QUALITY, "draft")
    variants: Whole = like(sd.VARIANTS, 2)
    embed_parameters: StrictBool = like(sd.EMBED_PARAMETERS, True)
    previews: StrictBool = Field(
        True, description="Whether a stream of events shows drafts of what is being painted.", examples=[False]
    )
    model: Model = Field("sd", description="The archive to ask.", examples=["sd"])

    def painting(self) -> dict[str, Any]:
        """The handler's gen_args."""
        arguments: dict[str, Any] = {
            "quality": self.quality,
            "strength": self.strength,
            "seed": self.seed,
            "variants": self.variants,
            "embed_parameters": self.embed_parameters,
            "feather": self.feather,
        }
        decided_there = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "scheduler": self.scheduler,
        }
        return self.wanted() | arguments | {name: value for name, value in decided_there.items() if value is not None}

    def texts(self) -> dict[str, str]:
        """The handler's other fields."""
        return {"prompt": self.prompt, "negative_prompt": self.negative_prompt}


# Of the handlers -> of this API.
FIELDS = {
    "gen_args.point_coords": "points",
    "gen_args.point_labels": "points",
    "gen_args.box": "box",
    "gen_args.mask_input": "logits",
    "gen_args.num_inference_steps": "steps",
    "gen_args.guidance_scale": "guidance",
    "mask_image": "mask",
}


def renamed(text: str) -> str:
    """A handler's message or field in the names of this API."""
    for theirs, ours in FIELDS.items():
        text = text.replace(theirs, ours)
    return text.replace("gen_args.", "")


def as_points(value: Any) -> Any:
    """Numbers that are not in lists of their own as points, where there is one way only: 2 or 3 are one, 4 are two."""
    if not isinstance(value, list) or not all(type(item) in (int, float) for item in value):
        return value
    return {2: [value], 3: [value], 4: [value[:2], value[2:]]}.get(len(value), value)


def _label(point: list[float]) -> int | float:
    return 1 if len(point) == 2 else int(point[2]) if point[2] in (0, 1) else point[2]
