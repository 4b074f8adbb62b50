"""Every limit on the pictures of a request, in one place. What is past them is refused before it is decoded."""

from typing import NamedTuple


class PictureLimits(NamedTuple):
    """max_pixels: width times height of a picture or mask (413).
    max_side: of a picture or mask, pixels (413).
    small_picture, max_pixels_per_byte: a picture of more than small_picture pixels must not decode to more than
        max_pixels_per_byte pixels per byte of its file (413). PNG can't reach it: its best is 8,240 at one bit.
    max_jpeg_scans: passes over a progressive JPEG, each of which may touch every pixel (413).
    max_exif_bytes, max_icc_bytes, max_xmp_bytes, max_png_text_bytes: larger metadata (all of a PNG's text chunks,
        unpacked, together) are left out of the reply, with a warning.
    """

    max_pixels: int = 64_000_000
    max_side: int = 32_767
    small_picture: int = 16_000_000
    max_pixels_per_byte: int = 10_000
    max_jpeg_scans: int = 100
    max_exif_bytes: int = 60_000
    max_icc_bytes: int = 4_000_000
    max_xmp_bytes: int = 1_000_000
    max_png_text_bytes: int = 4_000_000


LIMITS = PictureLimits()
