"""Detail for holes that are filled smoothly: copied from where the picture looks like the hole's surroundings.

Source: K. He, J. Sun, "Statistics of Patch Offsets for Image Completion" (ECCV 2012): what is missing mostly repeats
what is elsewhere in the picture, moved by one offset.
"""

from itertools import product

import cv2
import torch
from torch import Tensor
from torch.nn import functional as F

from handlers.editing.prefill import halved, prefill

SEARCH_SIDE = 128  # pixels, the longest side of the picture in which all offsets are tried
RING = 6  # pixels around a hole, that look alike at a good offset
OFFSETS = 3  # in turn for each hole, where those before have led into a hole
LARGEST = 4  # holes in a picture that get detail; smaller ones are narrow, and smooth is right there
FADE = 2  # pixels from a hole's edge, over which detail begins: what is copied meets what is there in no line
BLUR = 8  # pixels; what is wider is no edge
NEAR = 3  # pixels, over which the strength of detail is averaged
SAMPLES = 2000  # pixels of a ring that are compared where an offset becomes finer
UNCOVERED, FAR = 4.0, 0.15  # what an offset costs that leaves the hole without detail, or is as long as the picture


def detail(filled: Tensor, mask: Tensor) -> Tensor:
    """The fine structure that the filled holes lack, 3xHxW around 0, and 0 outside them.

    filled is 3xHxW in 0..1; mask is 1xHxW of 0 and 1, 1 in the holes. Both are float32.
    """
    levels = [(filled, mask)]
    while max(mask.shape[1:]) > SEARCH_SIDE:
        filled, mask = halved(filled), F.max_pool2d(mask, 2, ceil_mode=True)
        levels.append((filled, mask))
    whole = levels[0][0]
    fine = whole - F.interpolate(halved(filled)[None], size=whole.shape[1:], mode="bilinear")[0]
    strength = _strength(fine, mask)
    expected = prefill(strength[None], mask[None])[0]
    lacking, known = torch.zeros_like(whole), 1 - levels[0][1]
    for hole in _largest(mask):
        covered = torch.zeros_like(known)
        for _ in range(OFFSETS):
            offset = _coarse_offset(filled, mask, hole)
            # No stronger than what is around suggests: bricks have no place in the sky.
            fits = (expected / _moved(strength, offset).clamp(min=1e-4)).clamp(max=1)
            part, hole = hole, hole * (1 - _moved(1 - mask, offset))
            for image, holes in reversed(levels[:-1]):
                part = _enlarged(part, holes)
                offset = _finer_offset(image, holes, part, (2 * offset[0], 2 * offset[1]))
            new = part * _moved(known, offset) * (1 - covered)
            lacking += new * _moved(fine, offset) * F.interpolate(fits[None], size=whole.shape[1:], mode="bilinear")[0]
            covered += new
            if not hole.any():
                break
    return lacking * _inner(levels[0][1])


def _inner(mask: Tensor) -> Tensor:
    """1xHxW, how deep in a hole each pixel is: from 0 at its edge to 1 at FADE pixels."""
    share = F.avg_pool2d(mask, 2 * FADE + 1, stride=1, padding=FADE, count_include_pad=False)
    return (2 * share - 1).clamp(min=0)


def _strength(fine: Tensor, mask: Tensor) -> Tensor:
    """1xHxW, of the fine structure around each pixel of the smaller `mask`, where that is known."""
    known = 1 - mask
    strength = F.interpolate(fine.abs().mean(dim=0)[None, None], size=mask.shape[1:], mode="area")[0]
    total, count = F.avg_pool2d(torch.cat((known * strength, known)), 2 * NEAR + 1, stride=1, padding=NEAR)
    return (total / count.clamp(min=1e-4))[None]


def _largest(mask: Tensor) -> list[Tensor]:
    """The largest connected holes, each 1xHxW."""
    count, labels, figures, _ = cv2.connectedComponentsWithStats((mask[0] > 0).byte().cpu().numpy())
    order = sorted(range(1, count), key=lambda label: -figures[label, cv2.CC_STAT_AREA])
    return [torch.from_numpy(labels == label)[None].to(mask) for label in order[:LARGEST]]


def _coarse_offset(image: Tensor, mask: Tensor, hole: Tensor) -> tuple[int, int]:
    """(down, right) to what looks most like the ring around the hole, of all offsets.

    What counts is the squared difference of the pixels that are known at both places, for all offsets at once by the
    convolution theorem.
    """
    known, ring = 1 - mask, _ring(hole, mask)
    height, width = image.shape[1:]
    size = (2 * height, 2 * width)
    # Edges matter more than colours, for which the smooth fill cares.
    look = image - F.avg_pool2d(image, 2 * BLUR + 1, stride=1, padding=BLUR, count_include_pad=False)
    look = look + (image - image.mean(dim=(1, 2), keepdim=True)) / 4

    def correlated(a: Tensor, b: Tensor) -> Tensor:
        """Returns for each offset, which may be negative, the sum of a here times b there."""
        return torch.fft.irfft2((torch.fft.rfft2(a, s=size).conj() * torch.fft.rfft2(b, s=size)).sum(dim=0), s=size)

    energy = look.square().sum(dim=0, keepdim=True)
    apart = correlated(ring * energy, known) + correlated(ring, known * energy)
    apart = apart - 2 * correlated(ring * look, known * look)
    seen = correlated(ring, known) / ring.sum()
    cost = apart / (ring * energy).sum().clamp(min=1e-6) / seen.clamp(min=1e-3)
    cost = cost + UNCOVERED * (1 - correlated(hole, known) / hole.sum())
    down = torch.fft.fftfreq(size[0], 1 / size[0], device=image.device)[:, None]
    right = torch.fft.fftfreq(size[1], 1 / size[1], device=image.device)
    cost = cost + FAR * torch.hypot(down, right) / max(height, width)
    best = int(cost.masked_fill(~(seen > 0.5), torch.inf).argmin())
    return int(down[best // size[1], 0]), int(right[best % size[1]])


def _finer_offset(image: Tensor, mask: Tensor, hole: Tensor, near: tuple[int, int]) -> tuple[int, int]:
    """The best of the offsets up to two pixels from `near`; a difference in brightness does not count."""
    rows, columns = _ring(hole, mask)[0].nonzero(as_tuple=True)
    if len(rows) < 2:
        return near
    every = max(1, len(rows) // SAMPLES)
    rows, columns = rows[::every], columns[::every]
    here, (height, width) = image[:, rows, columns], image.shape[1:]

    def apart(offset: tuple[int, int]) -> float:
        there = image[:, (rows + offset[0]).clamp(0, height - 1), (columns + offset[1]).clamp(0, width - 1)]
        return float((here - there).var(dim=1).sum())

    around = [(near[0] + down, near[1] + right) for down, right in product(range(-2, 3), repeat=2)]
    return min(around, key=apart)


def _ring(hole: Tensor, mask: Tensor) -> Tensor:
    """The known pixels around the hole."""
    wide = F.max_pool2d(hole, (1, 2 * RING + 1), stride=1, padding=(0, RING))
    return F.max_pool2d(wide, (2 * RING + 1, 1), stride=1, padding=(RING, 0)) * (1 - mask)


def _enlarged(hole: Tensor, mask: Tensor) -> Tensor:
    """The hole where it is twice as large, of all holes in mask."""
    return F.interpolate(hole[None], scale_factor=2)[0, :, : mask.shape[1], : mask.shape[2]] * mask


def _moved(image: Tensor, offset: tuple[int, int]) -> Tensor:
    """What is `offset` (down, right) away from each pixel; 0 where that is outside."""
    sides = list(zip(image.shape[1:], offset, strict=True))
    here = [slice(max(0, -by), max(0, min(side, side - by))) for side, by in sides]
    there = [slice(max(0, by), max(0, min(side, side + by))) for side, by in sides]
    moved = torch.zeros_like(image)
    moved[:, *here] = image[:, *there]
    return moved
