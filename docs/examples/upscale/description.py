"""An upscaler, described without being loaded."""

from contract.description import Description, Number
from handlers.requests.fields import IMAGE, OUTPUT_FORMAT

DETAIL = Number("detail", 1.0, 0, 1, "How much of the network's detail is added; 0: bicubic interpolation alone.")

DESCRIPTION = Description(
    title="ESPCN",
    summary="picture → twice as large",
    fields=(IMAGE,),
    arguments=(DETAIL, OUTPUT_FORMAT),
    imports=(),  # torch and OpenCV are imported for all
    converters={"espcn": "handlers.upscale.convert:convert"},
    random_weights="handlers.upscale.random_weights:write",
    demo="demo",
)
