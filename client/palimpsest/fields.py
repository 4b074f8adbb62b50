"""The fields of the server's calls, as keyword arguments: what is left out is the server's to decide.

Defaults and ranges are the server's alone; its docs/limits.md lists them. All lengths are pixels of the upright
picture.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

EraseQuality = Literal["standard", "best"]
ReplaceQuality = Literal["draft", "standard", "best"]


class Shape(TypedDict, total=False):
    """What to select in the picture, and how to shape the mask.

    points: [x, y] on the object, or [x, y, 0] on what does not belong to it. box: left, top, right, bottom around it.
    erode, dilate: shrinks, then grows the mask by so many pixels. fill_holes: adds what the mask encloses. smooth:
    rounds its edge over so many pixels. invert: selects everything else instead.
    """

    points: Sequence[Sequence[float]]
    box: Sequence[float]
    dilate: int
    erode: int
    fill_holes: bool
    smooth: int
    invert: bool


class SegmentFields(Shape, total=False):
    """masks: the best, or all `candidates`. return_logits: whether the result carries `logits`. logits: those of an
    earlier result: refines that mask. model: the archive to ask.
    """

    masks: Literal["best", "all"]
    logits: str
    return_logits: bool
    model: str


class Painted(Shape, total=False):
    """feather: fades the paint in over so many pixels, inside the mask. segment_model: the archive that turns points
    and box into a mask. model: the archive that paints.
    """

    feather: int
    segment_model: str
    model: str


class EraseFields(Painted, total=False):
    """quality: best refines wide holes, and takes many times as long."""

    quality: EraseQuality


class ReplaceFields(Painted, total=False):
    """negative_prompt: what to avoid. quality: how many steps of which scheduler, where neither is given. steps: more
    are slower and finer. guidance: how closely to follow the prompt. strength: how much of what is there to forget.
    seed: the same gives the same picture. variants: so many pictures, with seeds that follow each other.
    embed_parameters: writes prompts and parameters into a PNG's text.
    """

    negative_prompt: str
    quality: ReplaceQuality
    steps: int
    guidance: float
    strength: float
    seed: int
    scheduler: str
    variants: int
    embed_parameters: bool


Format = Literal["input", "png", "jpeg", "webp", "tiff"]
"""Of a picture's file; input: that of the file which was sent."""


def selection(fields: dict[str, Any]) -> dict[str, Any]:
    """Those that say how to make a mask."""
    return {name: value for name, value in fields.items() if name in Shape.__annotations__ or name == "segment_model"}
