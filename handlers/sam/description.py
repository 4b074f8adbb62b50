"""Segment Anything, described without being loaded."""

from contract.description import Choice, Description, Flag, Integer, Structure
from handlers.requests.fields import IMAGE

MAX_POINTS = 128
MAX_GROWTH = 255  # pixels

_POINT = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
_LABEL = {"enum": [0, 1]}

POINTS = Structure(
    "point_coords",
    {"anyOf": [_POINT, {"type": "array", "items": _POINT, "minItems": 1, "maxItems": MAX_POINTS}]},
    "[x, y] or a list of them, in pixels of the upright picture.",
)
LABELS = Structure(
    "point_labels",
    {"anyOf": [_LABEL, {"type": "array", "items": _LABEL, "minItems": 1, "maxItems": MAX_POINTS}]},
    "One for each point: 1, the default, marks the object; 0 what is not.",
)
BOX = Structure(
    "box",
    {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
    "[left, top, right, bottom] around the object.",
)
MASK_INPUT = Structure("mask_input", {"type": "string"}, "The logits of an earlier reply: refines that mask.")
MULTIMASK = Flag(
    "multimask_output", None, "Three candidates or one; by default three for a lone click and one for anything clearer."
)
MASKS = Choice("masks", "best", ("best", "all"), "The best-scored mask, or all candidates.")
RETURN_LOGITS = Flag("return_logits", False, "Whether the reply carries the logits.")
SMOOTH = Integer("smooth", 0, 0, 64, "Rounds the mask's edge over so many pixels.")
FILL_HOLES = Flag("fill_holes", False, "Adds what the mask encloses.")
ERODE = Integer("erode", 0, 0, MAX_GROWTH, "Shrinks the mask by so many pixels, first.")
DILATE = Integer("dilate", 0, 0, MAX_GROWTH, "Grows the mask by so many pixels.")
DILATE_KERNEL_SIZE = Integer("dilate_kernel_size", 0, 0, MAX_GROWTH, "Grows it by a square of so many pixels.")
INVERT = Flag("invert", False, "Selects everything else instead.")

DESCRIPTION = Description(
    title="Segment Anything",
    summary="picture and clicks → mask",
    fields=(IMAGE,),
    arguments=(
        POINTS, LABELS, BOX, MASK_INPUT, MULTIMASK, MASKS, RETURN_LOGITS,
        SMOOTH, FILL_HOLES, ERODE, DILATE, DILATE_KERNEL_SIZE, INVERT,
    ),
    imports=("segment_anything",),
    converters={"sam": "handlers.sam.convert:convert"},
    random_weights="handlers.sam.random_weights:write",
    demo="demo",
)  # fmt: skip
