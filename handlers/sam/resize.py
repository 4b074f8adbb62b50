"""SAM's own resizing, for pictures of any ratio of sides."""

from segment_anything.utils.transforms import ResizeLongestSide


class Resize(ResizeLongestSide):
    """segment_anything's rounds the shorter side of a very long picture to 0."""

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        height, width = ResizeLongestSide.get_preprocess_shape(oldh, oldw, long_side_length)
        return max(height, 1), max(width, 1)
