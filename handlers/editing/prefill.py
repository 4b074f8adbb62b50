"""A smooth first guess in the hole: a membrane stretched between the colours around it.

Sources: pull-push interpolation, S. Gortler, R. Grzeszczuk, R. Szeliski, M. Cohen, "The Lumigraph" (SIGGRAPH 1996),
section 3.4.3; at every size it is relaxed towards the membrane, which is closer to photographs by a decibel.
"""

from torch import Tensor
from torch.nn import functional as F

# A picture of N pixels' longer side is relaxed SWEPT / N times: small ones carry colours far, and cost little.
SWEPT = 2048
MOST_SWEEPS = 16


def prefill(image: Tensor, mask: Tensor) -> Tensor:
    """The image, Bx3xHxW, with the hole filled from the colours around it, near ones first.

    mask is Bx1xHxW of 0 and 1, where 1 is the hole; what lies under it is never seen. Without a pixel that is known
    the result is zero.
    """
    return _filled(image * (1 - mask), 1 - mask)


def _filled(colour: Tensor, known: Tensor) -> Tensor:
    """`colour` to the degree that it is `known` (0..1), coarser colours for the rest."""
    height, width = colour.shape[-2:]
    if height == width == 1:
        return colour
    share = halved(known)
    coarse = halved(colour * known) / share.clamp(min=1e-4)
    # A cell is as good as known once a quarter of it is.
    guess = F.interpolate(_filled(coarse, (4 * share).clamp(max=1)), size=(height, width), mode="bilinear")
    filled = known * colour + (1 - known) * guess
    for _ in range(min(MOST_SWEEPS, 1 + SWEPT // max(height, width))):
        around = F.avg_pool2d(filled, 3, stride=1, padding=1, count_include_pad=False)
        filled = known * colour + (1 - known) * around
    return filled


def halved(x: Tensor) -> Tensor:
    """BxCxHxW or CxHxW averaged over cells of 2 x 2, those at the end perhaps over fewer."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
