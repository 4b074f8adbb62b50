"""LaMa, described without being loaded."""

from contract.description import Choice, Description
from handlers.requests.fields import FEATHER, IMAGE, MASK, OUTPUT_FORMAT, RESULT

QUALITY = Choice(
    "quality",
    "standard",
    ("standard", "best"),
    "best: wide holes are refined from coarse to fine; takes some 70 times as long.",
)

DESCRIPTION = Description(
    title="LaMa",
    summary="picture and mask → object erased",
    fields=(IMAGE, MASK),
    arguments=(QUALITY, FEATHER, OUTPUT_FORMAT, RESULT),
    imports=("omegaconf._impl",),
    converters={"lama": "handlers.lama.convert:convert"},
    random_weights="handlers.lama.random_weights:write",
    demo="demo",
)
