"""Finer paint for wide holes: what is painted is made to agree with what the network paints at a smaller size.

Source: P. Kulshreshtha, B. Pugh, S. Jiddi, "Feature Refinement to Improve High Resolution Image Inpainting"
(arXiv:2206.13644, 2022). A network sees across a hole where the hole is small. So the picture is painted small first.
At each larger size the features that enter the residual blocks are optimised, so that the painted picture, made smaller
again, is the smaller one, and outside the hole is the picture that was given.

Costs about 15 x 4 runs of the network per size; the blocks are computed twice, so that memory stays that of one run.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import cv2
import torch
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import resize
from kornia.morphology import erosion
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from handlers.lama.network import LaMa, padded
from handlers.requests.jobs import UNWATCHED, Report, part

ITERATIONS = 15  # per size; the last one only paints
RATE = 0.002  # of Adam
MOST_SIZES = 3
LEAST_SIDE = 256  # pixels, about, of the smallest picture's shorter side; it is what LaMa was trained on
MOST_PIXELS = 1_800_000  # larger pictures are refined at this size
RIM = 15  # pixels, the diameter of what is left out of a smaller hole's rim
TINY = 1e-8  # what is not more is nothing


class Level(NamedTuple):
    """image 1x3xHxW in 0..1, mask 1x1xHxW of 0 and 1."""

    image: Tensor
    mask: Tensor


def refine(
    network: LaMa, image: Tensor, mask: Tensor, report: Report = UNWATCHED, least_side: int | None = None
) -> Tensor | None:
    """The picture with its hole painted, as large as `image`; None where there is nothing to refine.

    That is where the picture is less than about 1.4 times `least_side` (LEAST_SIDE) wide or high, where nothing of it
    is known, where no hole, at half of its size, is wider than RIM, and with a prefilled network, which sees every
    picture small.

    image is 1x3xHxW in 0..1, mask 1x1xHxW of 0 and 1, float32 as the network, whose tensors must be none of inference
    mode. report is told of every iteration; what it raises ends the work.
    """
    if network.prefilled_side is not None or bool(mask.all()):
        return None
    size = image.shape[-2], image.shape[-1]
    with torch.inference_mode(False), torch.enable_grad():
        levels = _pyramid(Level(image.clone(), mask.clone()), least_side or LEAST_SIDE)
        targets = [_target(fine.mask) for _, fine in pairwise(levels)]
        if not any(bool(target.any()) for target in targets):
            return None
        painted = _painted(network, levels[0])
        for index, (level, target) in enumerate(zip(levels[1:], targets, strict=True)):
            of_level = part(report, index, len(targets))
            painted = _refined(network, level, painted, target, of_level) if target.any() else _painted(network, level)
        return painted if painted.shape[-2:] == size else resize(painted, size, interpolation="bilinear")


def _pyramid(level: Level, least_side: int) -> list[Level]:
    """The picture in all sizes, each half as large as the next."""
    height, width = level.image.shape[-2:]
    if height * width > MOST_PIXELS:
        scale = math.sqrt(MOST_PIXELS / (height * width))
        height, width = int(height * scale), int(width * scale)
        image, mask = (resize(x, (height, width), interpolation="bilinear") for x in level)
        level = Level(image, (mask > TINY).float())
    halvings = round(max(0.0, math.log2(min(height, width) / least_side)))
    levels = [level]
    for _ in range(min(halvings, MOST_SIZES - 1)):
        image, mask = (_halved(_blurred(x)) for x in levels[-1])
        levels.append(Level(image, (mask >= TINY).float()))
    return levels[::-1]


def _target(mask: Tensor) -> Tensor:
    """Marks where the smaller picture is what is aimed at: in the hole, away from its rim."""
    inside = (_halved(mask) >= 1 - TINY).float()
    disc = torch.from_numpy(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (RIM, RIM))).to(inside)
    return erosion(inside, disc) >= 1 - TINY


def _painted(network: LaMa, level: Level) -> Tensor:
    """The picture with what the network paints in its hole in one run."""
    with torch.no_grad():
        return _blended(level, network.generator.rear(network.generator.front(padded(level.image, level.mask))))


def _refined(network: LaMa, level: Level, smaller: Tensor, target: Tensor, report: Report) -> Tensor:
    inputs = padded(level.image, level.mask)
    with torch.no_grad():
        features = network.generator.front(inputs)
    features.requires_grad_()
    optimizer = torch.optim.Adam([features], lr=RATE)
    known = inputs[:, 3:] < TINY
    given, aim = inputs[:, :3][known.expand(-1, 3, -1, -1)], smaller[target.expand(-1, 3, -1, -1)]
    height, width = level.image.shape[-2:]
    for iteration in range(1, ITERATIONS):
        prediction = network.generator.rear(features, _computed_twice)
        halved = _halved(_blurred(prediction[..., :height, :width]))
        loss = (prediction[known.expand_as(prediction)] - given).abs().mean()
        loss = loss + (halved[target.expand_as(halved)] - aim).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(iteration, ITERATIONS)
    with torch.no_grad():
        painted = _blended(level, network.generator.rear(features))
    report(ITERATIONS, ITERATIONS)
    return painted


def _computed_twice(block: nn.Module, x: Tensor) -> Tensor:
    """What is between a block's ends is forgotten, and computed again where the gradient needs it."""
    result: Tensor = checkpoint(block, x, use_reentrant=False)
    return result


def _blended(level: Level, prediction: Tensor) -> Tensor:
    height, width = level.image.shape[-2:]
    return torch.where(level.mask > 0, prediction[..., :height, :width], level.image)


def _blurred(x: Tensor) -> Tensor:
    return gaussian_blur2d(x, (5, 5), (1.0, 1.0))


def _halved(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(x.shape[-2] // 2, x.shape[-1] // 2), mode="bilinear")
