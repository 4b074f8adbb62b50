"""Lays a coarse mask on the picture's edges: away from its rim it holds, beside it the picture has a say, too.

Three opinions are added up, in nats: the network's logits; how much likelier a pixel's colour is inside than outside,
by histograms of both; and GrabCut's (Rother, Kolmogorov and Blake 2004; OpenCV's), which follows edges over long ways.
In made scenes the histograms are worth the most; GrabCut keeps photographs' rims from leaking where colours are alike.
Then neighbours of like colour agree, by a guided filter (He, Sun and Tang 2010, section 3.5). Clicks hold whatever
comes.
"""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional as F

from handlers.pictures.picture import RGB, Mask
from handlers.sam.decoder import mask_of, spread
from handlers.sam.embeddings import Sight
from handlers.sam.prompt import Prompt
from handlers.sam.resize import Resize

Map = NDArray[np.float32]
"""HxW."""

BAND = 0.3
"""How far beside the rim the colours have a say: this times the root of the mask's area, in pixels."""

NARROWEST, WIDEST = 3, 16
"""Pixels of that band."""

SEED = 2
"""Pixels around a click that are as it says."""

LEAST = 16
"""Pixels inside, and outside, without which there is no telling the colours apart."""

BINS = 24
"""Of a channel in the histograms of colours."""

LIKELIEST = 4.0
"""A colour counts as at most so much likelier, in nats; one in which the other side has none would count infinitely."""

RAREST = 1e-5
"""A colour's share of a side where there is none of it."""

TRUST = 0.35
"""The weight of the network's logits, which are nats, too, and too sure of themselves."""

CUT = 2.0
"""Nats: what GrabCut's word is worth."""

CUT_PIXELS = 25_000
"""Pixels that GrabCut sees, at most: its time grows faster than they do, and in what is that large nothing is small."""

SAMPLED_PIXELS = 6_000
"""Pixels that it learns the colours from, at most."""

SURE = 10.0
"""Nats: the most that a logit counts, and what is certain."""

RADIUS = 8
"""Pixels: of the guided filter's windows."""

FLAT = 3e-4
"""A variance of colours, 0-1, below which the guided filter sees no edge."""


def small_copy(picture: RGB, side: int) -> RGB:
    """The picture with its longer side of that many pixels."""
    height, width = Resize.get_preprocess_shape(picture.shape[0], picture.shape[1], side)
    # Of a large picture every so many pixels are enough to average.
    step = max(1, max(picture.shape[:2]) // (2 * side))
    picture = np.ascontiguousarray(picture[::step, ::step])
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))


def snapped_mask(sam: Sam, sight: Sight, logits: Tensor, prompt: Prompt, copy: RGB) -> Mask:
    """logits: hxw -> the mask at the resolution of sight.size; copy: of the picture, HxWx3, in which it is snapped."""
    size = copy.shape[1], copy.shape[0]
    coarse = spread(sam, sight._replace(size=size), logits).cpu().numpy() - sam.mask_threshold
    clicks = (prompt.points * np.divide(size, sight.size)).astype(int).clip(0, np.subtract(size, 1))
    shares = snapped(copy, coarse, clicks, prompt.labels)
    if shares is None:
        return mask_of(sam, sight, logits)
    return np.asarray(cv2.resize(shares, sight.size, interpolation=cv2.INTER_LINEAR) > 0.5)


def snapped(picture: RGB, logits: Map, clicks: NDArray[np.int64], labels: NDArray[np.int64]) -> Map | None:
    """How much of each pixel is the object's, about 0-1; None where there is next to nothing inside, or outside.

    logits: HxW, of the coarse mask. clicks: Nx2 [x, y] in the picture, labels: N, 1 inside and 0 outside.
    """
    certain = _certain(logits > 0, clicks, labels)
    window = _window(certain > -SURE)
    near, coarse, certain = np.ascontiguousarray(picture[window]), logits[window], certain[window]
    inside = coarse > 0
    if _is_one_sided(inside):
        return None
    nats = TRUST * coarse.clip(-SURE, SURE) + _likelihood(near, inside) + CUT * _cut(near, inside, certain)
    nats[certain != 0] = certain[certain != 0]
    colours = np.ascontiguousarray(np.moveaxis(near, 2, 0)).astype(np.float32) / np.float32(255)
    found = guided(colours, _sigmoid(nats))
    found[certain > 0], found[certain < 0] = 1, 0
    shares = np.zeros_like(logits)
    shares[window] = found
    return shares


def _is_one_sided(inside: Mask) -> bool:
    """Whether there is next to nothing inside, or outside."""
    count = np.count_nonzero(inside)
    return bool(min(count, inside.size - count) < LEAST)


def _sigmoid(nats: Map) -> Map:
    return np.asarray(1 / (1 + np.exp(-nats)), np.float32)


def _certain(mask: Mask, clicks: NDArray[np.int64], labels: NDArray[np.int64]) -> Map:
    """HxW: SURE where a pixel is inside, -SURE where outside, 0 where the colours have a say."""
    area = mask.astype(np.uint8)
    band = round(min(max(BAND * float(np.count_nonzero(mask)) ** 0.5, NARROWEST), WIDEST))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * band + 1, 2 * band + 1))
    certain = np.zeros(mask.shape, np.float32)
    certain[cv2.erode(area, disc) > 0] = SURE
    certain[cv2.dilate(area, disc) == 0] = -SURE
    for click, label in zip(clicks.tolist(), labels.tolist(), strict=True):
        cv2.circle(certain, click, SEED, SURE if label else -SURE, -1)
    return certain


def _window(possible: Mask) -> tuple[slice, slice]:
    """What is possible, and around it half as much again: enough to know the colours outside, and no more work."""
    left, top, width, height = cv2.boundingRect(possible.astype(np.uint8))
    around = max(WIDEST, max(width, height) // 2)
    return (
        slice(max(0, top - around), top + height + around),
        slice(max(0, left - around), left + width + around),
    )


def _cut(picture: RGB, inside: Mask, certain: Map) -> Map:
    """HxW: 1 where GrabCut finds the object, -1 elsewhere; all 0 where it has next to nothing to go by."""
    known = np.where(inside, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    known[certain > 0], known[certain < 0] = cv2.GC_FGD, cv2.GC_BGD
    seen, known_there = _reduced(picture, known, CUT_PIXELS)
    sample, known_of_it = _reduced(seen, known_there, SAMPLED_PIXELS)
    if _is_one_sided(_is_object(known_of_it)):
        return np.zeros_like(certain)
    inner, outer = np.zeros((1, 65)), np.zeros((1, 65))
    # Its first guess at the colours is drawn by lot, and takes longer than the cut.
    cv2.setRNGSeed(0)
    cv2.grabCut(sample, known_of_it, None, outer, inner, 0, cv2.GC_INIT_WITH_MASK)
    cv2.grabCut(seen, known_there, None, outer, inner, 1, cv2.GC_EVAL_FREEZE_MODEL)
    found = np.where(_is_object(known_there), np.float32(1), np.float32(-1))
    return np.asarray(cv2.resize(found, known.shape[::-1], interpolation=cv2.INTER_LINEAR))


def _reduced(picture: RGB, known: NDArray[np.uint8], pixels: int) -> tuple[RGB, NDArray[np.uint8]]:
    """Both with about so many pixels, or as they are."""
    scale = min(1.0, (pixels / known.size) ** 0.5)
    size = max(1, round(scale * known.shape[1])), max(1, round(scale * known.shape[0]))
    return (
        np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)),
        np.asarray(cv2.resize(known, size, interpolation=cv2.INTER_NEAREST)),
    )


def _is_object(known: NDArray[np.uint8]) -> Mask:
    return (known == cv2.GC_FGD) | (known == cv2.GC_PR_FGD)


def _likelihood(picture: RGB, inside: Mask) -> Map:
    """HxW: how much likelier each pixel's colour is inside than outside, in nats."""
    shares = [_share(picture, each) for each in (inside, ~inside)]
    red, green, blue = (np.moveaxis(picture, 2, 0).astype(np.uint16) * BINS) >> 8
    ratio = np.log((shares[0] + RAREST) / (shares[1] + RAREST)).clip(-LIKELIEST, LIKELIEST)
    return np.asarray(ratio[red, green, blue])


def _share(picture: RGB, among: Mask) -> NDArray[np.float32]:
    """BINS x BINS x BINS: how much of those pixels has each colour, or one beside it."""
    counts = cv2.calcHist([picture], [0, 1, 2], among.astype(np.uint8), [BINS] * 3, [0, 256] * 3)
    smooth = F.avg_pool3d(torch.from_numpy(counts)[None], 3, stride=1, padding=1)[0].numpy()
    return np.asarray(smooth / smooth.sum())


def guided(guide: NDArray[np.float32], values: Map) -> Map:
    """The guided filter with a guide of three channels, 3xHxW, 0-1: in each window values are linear in the colours."""
    windows = (2 * RADIUS + 1, 2 * RADIUS + 1)

    def means(planes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([cv2.blur(plane, windows) for plane in planes])

    colour, value = means(guide), cv2.blur(values, windows)
    with_value = means(guide * values) - colour * value
    # The rows of each window's covariance. It is symmetric: their cross products are its inverse's, but for a factor.
    rows = [means(guide * channel) - colour * mean for channel, mean in zip(guide, colour, strict=True)]
    for c, row in enumerate(rows):
        row[c] += FLAT
    adjoint = [np.cross(rows[c - 2], rows[c - 1], axis=0) for c in range(3)]
    determinant = (rows[0] * adjoint[0]).sum(0)
    slopes = np.stack([(with_value * each).sum(0) / determinant for each in adjoint])
    offset = value - (slopes * colour).sum(0)
    return np.asarray((means(slopes) * guide).sum(0) + cv2.blur(offset, windows))
