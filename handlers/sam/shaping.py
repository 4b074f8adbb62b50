"""What is done to a mask after SAM has found it."""

from typing import NamedTuple

from handlers.editing import imaging
from handlers.pictures.picture import Mask
from handlers.requests.payload import Arguments
from handlers.sam.description import DILATE, DILATE_KERNEL_SIZE, ERODE, FILL_HOLES, INVERT, SMOOTH


class Shaping(NamedTuple):
    """What is done to a mask at the picture's full resolution, in the order of the fields.

    smooth: px; rounds steps and corners up to about this size (imaging.smooth). fill_holes: what the mask encloses
    joins it. erode, dilate: px by which its edge moves inwards, outwards, equally far in every direction (a disc).
    dilate_kernel_size: the original example's way: grows by a square of this many pixels. invert: the rest instead.
    """

    smooth: int
    fill_holes: bool
    erode: int
    dilate: int
    dilate_kernel_size: int
    invert: bool

    @classmethod
    def parse(cls, arguments: Arguments) -> "Shaping":
        return cls(
            smooth=arguments.integer(SMOOTH),
            fill_holes=arguments.flag(FILL_HOLES),
            erode=arguments.integer(ERODE),
            dilate=arguments.integer(DILATE),
            dilate_kernel_size=arguments.integer(DILATE_KERNEL_SIZE),
            invert=arguments.flag(INVERT),
        )

    def applied(self, mask: Mask) -> Mask:
        mask = imaging.smooth(mask, self.smooth)
        if self.fill_holes:
            mask = imaging.fill_holes(mask)
        mask = imaging.grow(imaging.shrink(mask, self.erode), self.dilate)
        mask = imaging.dilate(mask, self.dilate_kernel_size)
        return ~mask if self.invert else mask
