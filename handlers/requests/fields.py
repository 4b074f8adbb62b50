"""What requests to more than one model hold."""

from contract.accept import PICTURES
from contract.description import Choice, Field, Integer

FULL, PATCH = "full", "patch"

IMAGE = Field("image", "picture", "The picture.")
MASK = Field("mask_image", "picture", "As large as the picture; 128 or more of 255 marks what to change.")
FEATHER = Integer("feather", 0, 0, 255, "Fades the paint in over so many pixels, inside the mask.")
OUTPUT_FORMAT = Choice(
    "output_format",
    "png",
    (*(kind.removeprefix("image/") for kind in PICTURES), "input"),
    "Of the picture inside JSON; input: the picture's own.",
)
RESULT = Choice(
    "result",
    FULL,
    (FULL, PATCH),
    "The picture as a whole; or only the rectangle around the mask, with its place in `box`: nothing changes outside.",
)
