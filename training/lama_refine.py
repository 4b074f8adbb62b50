"""How a small network fills holes well: from a smooth first guess, to which it adds what the guess lacks.

The guess is pull-push interpolation: S. Gortler, R. Grzeszczuk, R. Szeliski, M. Cohen, "The Lumigraph" (SIGGRAPH
1996), section 3.4.3. A network too small to carry colours across a wide hole has them at hand then.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD_MULTIPLE = 8
MIN_PADDED = 16


def inpaint(network: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """The image with its hole filled, Bx3xHxW in 0..1; outside the hole it is the image.

    `image` is Bx3xHxW RGB in 0..1 and `mask` Bx1xHxW of 0 and 1, where 1 is to be filled; what lies under the
    mask is never seen. Both have the network's dtype and device. Any size of at least 1x1 works.
    """
    guess = prefill(image, mask)
    return (guess + mask * addition(network, guess, mask)).clamp(0, 1)


def addition(network: nn.Module, guess: Tensor, mask: Tensor) -> Tensor:
    """What the network adds to `guess` (Bx3xHxW in 0..1, the hole filled), Bx3xHxW in -1..1."""
    height, width = guess.shape[-2:]
    across, down = _padding(width), _padding(height)
    inputs = F.pad(torch.cat((guess, mask), dim=1), (0, across, 0, down), mode="replicate")
    output: Tensor = network(inputs)
    return 2 * output[..., :height, :width] - 1


def prefill(image: Tensor, mask: Tensor) -> Tensor:
    """`image` with the hole filled from the colours around it, near ones first. All hole and no rest gives zeros."""
    return _filled(image * (1 - mask), 1 - mask)


def _filled(colour: Tensor, known: Tensor) -> Tensor:
    """`colour` to the degree that it is `known` (0..1), coarser colours for the rest."""
    height, width = colour.shape[-2:]
    if height == width == 1:
        return colour
    share = _halved(known)
    coarse = _halved(colour * known) / share.clamp(min=1e-4)
    # A cell is as good as known once a quarter of it is.
    guess = F.interpolate(_filled(coarse, (4 * share).clamp(max=1)), size=(height, width), mode="bilinear")
    return known * colour + (1 - known) * guess


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def _padding(size: int) -> int:
    return max(-(-size // PAD_MULTIPLE) * PAD_MULTIPLE, MIN_PADDED) - size
