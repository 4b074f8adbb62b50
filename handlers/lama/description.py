"""LaMa, described without being loaded."""

from contract.description import Description
from handlers.requests.fields import FEATHER, IMAGE, MASK, OUTPUT_FORMAT, RESULT, UNCHANGED

DESCRIPTION = Description(
    title="LaMa",
    summary="picture and mask → object erased",
    fields=(IMAGE, MASK),
    arguments=(FEATHER, OUTPUT_FORMAT, RESULT, UNCHANGED),
    imports=("omegaconf._impl",),
    converters={"lama": "handlers.lama.convert:convert"},
    random_weights="handlers.lama.random_weights:write",
    demo="demo",
)
