"""What SAM is asked in training: pictures changed each time they are shown, targets in them, clicks and boxes.

All of it runs on the device of its arguments, for a whole batch at once, and never waits for a result or sends one
there (as torch.where does with a number). What is random comes from torch's own generator. B is the number of pictures,
P of prompts for each, N = B * P.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.scenes import MIN_AREA

MOST_TARGETS = 8  # in a made scene: seven objects and a ground
DEEPEST = 0.4  # of the clicks hit the very pixel that is farthest from the rim, as the evaluation's do
UNMOVED = 0.4  # of the pictures are neither turned nor enlarged: both blur


class Targets(NamedTuple):
    """soft: float32 (N, size/2, size/2), the share of each pixel, 0-1; weight: float32 (N,), 0 where there is none."""

    soft: Tensor
    weight: Tensor

    @property
    def solid(self) -> Tensor:
        """bool (N, size/2, size/2); of things too thin to fill half a pixel, every pixel that they touch."""
        solid = self.soft > 0.5
        return torch.where(solid.any(2).any(1)[:, None, None], solid, self.soft > 0)


def changed(scenes: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
    """Scenes from the pool, uint8 (B, 4, size, size), as they were never seen: cut, turned, mirrored, miscoloured.

    Half of the pictures become oblong, the rest `blank` (3, 1, 1), which is what Sam.preprocess pads with. Returns the
    pictures, float32 (B, 3, size, size), 0-255, and which target each pixel shows, uint8 (B, size, size).
    """
    image, owner = _moved(scenes)
    image = _miscoloured(image)
    count, size, device = len(scenes), scenes.shape[-1], scenes.device
    edge = size * _uniform(count, 0.55, 1, device)
    kind = torch.rand(count, device=device)
    bottom, right = edge.masked_fill(kind > 0.33, size), edge.masked_fill(kind < 0.83, size)
    along = torch.arange(size, device=device)
    outside = (along[:, None] >= bottom[:, None, None]) | (along >= right[:, None, None])
    return torch.where(outside[:, None], blank, image), owner.masked_fill(outside, 0)


def choose_targets(owner: Tensor, prompts: int) -> Targets:
    """P targets of each picture, (B, size, size), each as often as the others give or take one."""
    numbers = torch.arange(1, MOST_TARGETS + 1, device=owner.device)
    areas = (owner[:, None] == numbers[:, None, None]).sum((2, 3))
    large = areas >= MIN_AREA * owner[0].numel()
    order = (torch.rand(large.shape, device=owner.device) + 2 * ~large).argsort(1)
    place = torch.arange(prompts, device=owner.device) % large.sum(1, keepdim=True).clamp(min=1)
    chosen = order.gather(1, place)
    masks = owner[:, None] == (chosen + 1)[..., None, None]
    return Targets(F.avg_pool2d(masks.float(), 2).flatten(0, 1), large.gather(1, chosen).flatten().float())


def click_inside(mask: Tensor) -> Tensor:
    """A pixel of each mask, bool (N, h, w), more often well inside it than at its rim.

    Returns x, y, float32 (N, 2), in pixels of a picture of twice the size.
    """
    inside = depth(mask).flatten(1)
    level = torch.rand(len(mask), 1, device=mask.device)
    level = level.masked_fill(torch.rand_like(level) < DEEPEST, 1) * inside.amax(1, keepdim=True)
    lots = torch.rand(inside.shape, device=mask.device).masked_fill((inside < level) | (inside == 0), -1)
    chosen, width = lots.argmax(1), mask.shape[-1]
    place = torch.stack([chosen % width, chosen.div(width, rounding_mode="floor")], 1)
    return place * 2 + torch.rand(place.shape, device=mask.device)


def rough_box(soft: Tensor) -> Tensor:
    """left, top, right, bottom, float32 (N, 4), roughly, in pixels of a picture twice as large as `soft`."""
    ends = []
    for has in ((soft > 0).any(1), (soft > 0).any(2)):
        first, last = has.float().argmax(1), has.shape[1] - has.flip(1).float().argmax(1)
        ends.append(torch.stack([first, last], 1) * 2.0)
    box = torch.stack(ends, 2).flatten(1)
    extent = (box[:, 2:] - box[:, :2]).repeat(1, 2)
    return (box + 0.06 * extent * torch.randn_like(box)).clamp(0, 2 * soft.shape[-1])


def correction(found: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A click on the larger error of each mask, bool (N, h, w); where all is right, one that confirms.

    Returns x, y as `click_inside` does, and float32 (N,): 1 where the target was missed, 0 where too much was taken.
    """
    missed, excess = target & ~found, found & ~target
    label = missed.sum((1, 2)) >= excess.sum((1, 2))
    wrong = torch.where(label[:, None, None], missed, excess)
    wrong = torch.where(wrong.any(2).any(1)[:, None, None], wrong, target)
    return click_inside(wrong), label.float()


def depth(mask: Tensor) -> Tensor:
    """How far each pixel is from the nearest outside the mask, bool (N, h, w); all around the picture is outside.

    Exact: the nearest in each row first, then the nearest of those over the rows.
    """
    # Half precision is exact up to 2048; no pixel of 64 x 64 is farther inside than 32.
    dtype = torch.float16 if mask.is_cuda else torch.float32
    far = F.pad(mask, (1, 1, 1, 1)).to(dtype) * 8192
    along = torch.arange(far.shape[-1], device=mask.device)
    apart = (along[:, None] - along).square().to(dtype)
    within_row = (far[..., None] + apart).amin(2)
    squared = (within_row[:, :, None] + apart[..., None]).amin(1)
    return squared[:, 1:-1, 1:-1].float().sqrt()


def _moved(scenes: Tensor) -> tuple[Tensor, Tensor]:
    """Pieces of 70 to 100 % of the side, turned a little, half mirrored: float32 (B, 3, ...), uint8 (B, ...)."""
    count, device = len(scenes), scenes.device
    unmoved = torch.rand(count, device=device) < UNMOVED
    scale = _uniform(count, 0.7, 1, device).masked_fill(unmoved, 1)
    angle = 0.15 * torch.randn(count, device=device).masked_fill(unmoved, 0)
    mirror = 1 - 2.0 * (torch.rand(count, device=device) < 0.5)
    across, down = scale * angle.cos(), scale * angle.sin()
    shift = (1 - scale)[:, None] * _uniform((count, 2), -1, 1, device)
    turn = torch.stack([across * mirror, -down, shift[:, 0], down * mirror, across, shift[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(turn, [count, 1, *scenes.shape[2:]], align_corners=False)
    options = {"padding_mode": "reflection", "align_corners": False}
    image = F.grid_sample(scenes[:, :3].float(), grid, mode="bilinear", **options)
    owner = F.grid_sample(scenes[:, 3:].float(), grid, mode="nearest", **options)
    return image, owner[:, 0].to(torch.uint8)


def _miscoloured(image: Tensor) -> Tensor:
    """Another contrast, brightness and tint, and noise in some of the pictures."""
    each, device = (len(image), 1, 1, 1), image.device
    contrast = (0.15 * torch.randn(each, device=device) + 0.06 * torch.randn(len(image), 3, 1, 1, device=device)).exp()
    brightness = 12 * torch.randn(each, device=device)
    noise = 12 * (torch.rand(each, device=device) - 0.6).clamp(min=0)
    return ((image - 128) * contrast + 128 + brightness + noise * torch.randn_like(image)).clamp(0, 255)


def _uniform(shape: int | tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(shape, device=device)
