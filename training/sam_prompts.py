"""What SAM is asked in training: made scenes with targets, first clicks, boxes, and clicks on what it got wrong."""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from handlers.sam.network import PIXEL_MEAN
from training.scenes import MIN_AREA, Scene, SceneMaker


class Prompted(NamedTuple):
    """One picture and `P` things to find in it, or a batch of those with a leading dimension `B`.

    image: uint8 (3, size, size); target: float32 (P, size/2, size/2), 0-1; click: float32 (P, 2), x and y in pixels;
    box: float32 (P, 4), left, top, right, bottom in pixels, roughly.
    """

    image: Tensor
    target: Tensor
    click: Tensor
    box: Tensor


class PromptedScenes(Dataset[Prompted]):
    """Scenes with `prompts` targets each, from number `first` on; they grow harder up to number `hard_from`.

    Making a scene costs as much as learning from it: every second batch shows the scenes of the one before mirrored,
    with other prompts.
    """

    def __init__(self, first: int, count: int, batch: int, size: int, prompts: int, hard_from: int) -> None:
        self._first, self._count, self._batch = first, count, batch
        self._size, self._prompts, self._hard_from = size, prompts, hard_from
        self._maker: SceneMaker | None = None
        self._scenes: dict[int, Scene] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Prompted:
        number = self._first + index
        rng = np.random.default_rng([3, number])
        pair, place = divmod(number, 2 * self._batch)
        scene = self._scene(pair * self._batch + place % self._batch)
        mirror = np.s_[:, ::-1] if place >= self._batch else np.s_[:, :]
        image, masks = _letterboxed(rng, scene.image[mirror], scene.masks[:, *mirror].copy())
        chosen = masks[_spread(rng, len(masks), self._prompts)]
        return Prompted(
            torch.from_numpy(image.transpose(2, 0, 1).copy()),
            torch.from_numpy(np.stack([_halved(mask) for mask in chosen])),
            torch.from_numpy(np.stack([point_inside(rng, mask) for mask in chosen])),
            torch.from_numpy(np.stack([_rough_box(rng, mask) for mask in chosen])),
        )

    def _scene(self, seed: int) -> Scene:
        if self._maker is None:  # made in the data process, not copied to it
            cv2.setNumThreads(1)
            self._maker = SceneMaker("train")
        if seed not in self._scenes:
            self._scenes.pop(seed - self._batch, None)
            difficulty = min(1.0, 0.1 + 2 * seed / self._hard_from)
            self._scenes[seed] = self._maker.make(seed, self._size, difficulty)
        return self._scenes[seed]


def point_inside(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """x, y (float32) of a random pixel of the mask, more often well inside it than at its rim."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.nonzero(depth >= max(1e-6, rng.random() * depth.max()))
    chosen = rng.integers(len(x))
    return np.array([x[chosen], y[chosen]], np.float32)


def correction(rng: np.random.Generator, found: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, int]:
    """A click on the larger error: x, y and 1 where the target was missed, 0 where too much was taken."""
    missed, excess = target & ~found, found & ~target
    label = int(missed.sum() >= excess.sum())
    wrong = missed if label else excess
    if not wrong.any():  # nothing to correct: confirm
        return point_inside(rng, target), 1
    return point_inside(rng, wrong), label


def _letterboxed(rng: np.random.Generator, image: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half of the pictures are not square: what Sam.preprocess would pad is blank. Keeps at least one target."""
    size = image.shape[0]
    cut_image, cut_masks = image.copy(), masks.copy()
    if rng.random() < 0.5:
        edge = int(size * rng.uniform(0.55, 1))
        blank = np.s_[edge:] if rng.random() < 0.65 else np.s_[:, edge:]
        cut_image[blank] = np.round(PIXEL_MEAN)
        cut_masks[(slice(None), *np.index_exp[blank])] = False
    kept = cut_masks.sum((1, 2)) >= MIN_AREA * size**2
    return (cut_image, cut_masks[kept]) if kept.any() else (image, masks)


def _spread(rng: np.random.Generator, count: int, wanted: int) -> np.ndarray:
    """`wanted` indices below `count`, each as often as the others give or take one."""
    return np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]


def _halved(mask: np.ndarray) -> np.ndarray:
    half = (mask.shape[1] // 2, mask.shape[0] // 2)
    return cv2.resize(mask.astype(np.float32), half, interpolation=cv2.INTER_AREA)


def _rough_box(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(mask)
    box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32)
    width, height = box[2] - box[0], box[3] - box[1]
    noise = rng.normal(0, 0.06, 4) * [width, height, width, height]
    return (box + noise).clip(0, mask.shape[0]).astype(np.float32)
