"""What the tools take and tell, as models read it. Defaults and ranges are the server's: what is absent is not sent."""

from typing import Annotated

from pydantic import BaseModel, Field

from palimpsest import fields

Image = Annotated[
    str | None, Field(description="The picture: a path to its file, or the id that an earlier call told (img_...).")
]
ImageData = Annotated[str | None, Field(description="Instead of image: the picture's file as base64 or a data URI.")]
Mask = Annotated[
    str | None,
    Field(description="Instead of points and box: a path to a file, white where to change; or an id of segment's."),
]
MaskData = Annotated[str | None, Field(description="Instead of mask: its file as base64 or a data URI.")]
Points = Annotated[
    list[list[float]] | None,
    Field(description="[x, y] in pixels on the object, or [x, y, 0] on what does not belong to it."),
]
Box = Annotated[list[float] | None, Field(description="[left, top, right, bottom] in pixels around the object.")]
Dilate = Annotated[int | None, Field(description="Grow the mask by so many pixels; 8 takes an object's rim along.")]
Erode = Annotated[int | None, Field(description="Shrink the mask by so many pixels, first.")]
FillHoles = Annotated[bool | None, Field(description="Add what the mask encloses.")]
Smooth = Annotated[int | None, Field(description="Round the mask's edge over so many pixels.")]
Invert = Annotated[bool | None, Field(description="Select everything else instead.")]
Feather = Annotated[int | None, Field(description="Fade the paint in over so many pixels, inside the mask.")]
Output = Annotated[
    str | None,
    Field(
        description="A path for the result, whose suffix says the format. Absent: beside image, where that is a path."
    ),
]
Preview = Annotated[bool, Field(description="Also show the result where it is written to a file, made smaller.")]
PreviewOfMask = Annotated[bool, Field(description="Also show the picture, dark where it is not selected.")]
Model = Annotated[str | None, Field(description="The archive to ask, as `models` lists them.")]
Prompt = Annotated[str, Field(description="What to paint there.")]
NegativePrompt = Annotated[str | None, Field(description="What to avoid.")]
Seed = Annotated[int | None, Field(description="The same seed gives the same picture.")]
Variants = Annotated[int | None, Field(description="So many pictures, with seeds that follow each other.")]
Steps = Annotated[int | None, Field(description="More are slower and finer.")]
Guidance = Annotated[float | None, Field(description="How closely to follow the prompt.")]
Strength = Annotated[float | None, Field(description="How much of what is there to forget, 0 to 1.")]
EraseQuality = Annotated[
    fields.EraseQuality | None, Field(description="best refines wide holes, and takes many times as long.")
]
Quality = Annotated[fields.ReplaceQuality | None, Field(description="How much time to take.")]


class Selected(BaseModel):
    """What was selected."""

    score: float = Field(description="The model's guess, about 0 to 1, at how well the mask fits.")
    box: list[int] | None = Field(description="[left, top, right, bottom] around the mask; null: it is empty.")
    area: int = Field(description="Pixels that are selected.")
    id: str | None = Field(description="What `mask` of other calls takes.")
    path: str | None = Field(description="The file that was written, if one was.")
    warnings: list[str]


class Result(BaseModel):
    """A picture that was made."""

    id: str | None = Field(description="What `image` of further calls takes, exactly this picture.")
    path: str | None = Field(description="The file that was written, if one was.")
    seed: int | None = Field(description="The one that was used; null of an erasure.")


class Painted(BaseModel):
    """What was made of the picture."""

    results: list[Result]
    box: list[int] | None = Field(description="[left, top, right, bottom] around what changed.")
    warnings: list[str]


class Archive(BaseModel):
    """A model that the server can load."""

    name: str
    place: str = Field(description="gpu, memory, parked, suspended or disk.")
    state: str
    queue: int = Field(description="Requests that wait for it.")
    last_error: str | None = Field(description="Of its last load, if that failed.")


class Archives(BaseModel):
    """All models."""

    models: list[Archive]
