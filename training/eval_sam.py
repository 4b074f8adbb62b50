"""Measure a SAM on held-out made scenes and on the dog: `python -m training.eval_sam [CONFIG WEIGHTS]`.

The first click is the pixel of the object farthest from its rim, and the best-scored of three masks is the answer;
later clicks are that pixel of the larger error, with the logits of the last answer given back, and a single mask is the
answer, snapped to the picture's edges where the network has that: as the product does it.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from handlers.editing.imaging import dilate
from handlers.sam import network
from handlers.sam.decoder import candidates, mask_of
from handlers.sam.embeddings import Sight
from handlers.sam.prompt import Prompt
from handlers.sam.resize import Resize
from handlers.sam.snapping import small_copy, snapped_mask
from training.scenes import SceneMaker

DEMO = Path(network.__file__).parent / "demo"
DATA = Path(__file__).parents[1] / "tests" / "data"
SCENE_SIZE = 256
CLICKS = 3
DOG_CLICK = (750, 500)
DOG_DILATED = 15  # pixels: by this square the article's request grows the mask, and its mask is what is compared with
DOG_HEAD = (750, 270)  # the second click of a person whom the first one's answer does not suffice
SHOWN = 6  # scenes in the picture, beside the dog
TILE = 100  # pixels, the height of one


class Result(NamedTuple):
    """Means over scenes; `best` is the best of three masks whatever its score."""

    iou: list[float]  # after 1, 2, 3 clicks
    best: float  # after one click
    correlation: float  # of scores and IoUs, all three masks after one click

    def __str__(self) -> str:
        clicks = ", ".join(f"{iou:.3f}" for iou in self.iou)
        return (
            f"IoU {clicks} after 1, 2, 3 clicks; best of three {self.best:.3f}; score correlates {self.correlation:.3f}"
        )


class HeldOut:
    """`count` scenes made of held-out pictures, one target each."""

    def __init__(self, count: int) -> None:
        maker = SceneMaker("held-out")
        scenes = [maker.make(seed, SCENE_SIZE) for seed in range(count)]
        rng = np.random.default_rng(0)
        self.cases = [(scene.image, scene.masks[rng.integers(len(scene.masks))]) for scene in scenes]

    def measure(self, sam: network.Network) -> Result:
        chosen, pairs = [], []
        for image, target in self.cases:
            answers = list(clicked(Looked(sam, image), target, CLICKS))
            chosen.append([ious[scores.argmax()] for ious, scores in answers])
            pairs.append(answers[0])
        ious, scores = (np.array(values) for values in zip(*pairs, strict=True))
        return Result(
            np.mean(chosen, axis=0).tolist(),
            float(ious.max(1).mean()),
            float(np.corrcoef(ious.ravel(), scores.ravel())[0, 1]),
        )


class Looked:
    """A network that has seen a picture, RGB."""

    def __init__(self, sam: network.Network, picture: np.ndarray) -> None:
        self._sam, self._resize = sam.eval(), Resize(sam.image_encoder.img_size)
        shown = self._resize.apply_image(picture)
        side = sam.snapped_side
        self._copy = small_copy(picture, side) if side else None
        self._sight = Sight((picture.shape[1], picture.shape[0]), shown.shape[:2], b"", ())
        with torch.inference_mode():
            pixels = torch.from_numpy(shown).to(sam.device).permute(2, 0, 1)[None]
            self._embedding = sam.image_encoder(sam.preprocess(pixels))

    @torch.inference_mode()
    def answer(
        self, points: list[tuple[int, int]], labels: list[int], previous: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Masks, scores and logits: of three after a lone click, of one after any other prompt."""
        prompt = Prompt(np.array(points, np.float64), np.array(labels), None, previous)
        found = candidates(self._sam, self._resize, self._sight, self._embedding, prompt, prompt.is_ambiguous)
        masks = [self._mask(logits, prompt) for logits in found.logits[0]]
        return masks, found.scores, found.logits[0].cpu().numpy()

    def _mask(self, logits: Tensor, prompt: Prompt) -> np.ndarray:
        if self._copy is None:
            return mask_of(self._sam, self._sight, logits)
        return snapped_mask(self._sam, self._sight, logits, prompt, self._copy)


def clicked(looked: Looked, target: np.ndarray, clicks: int, first: tuple[int, int] | None = None, dilated: int = 0):
    """Yields after each click the IoUs of the masks with `target` and their scores: three, later one of each."""
    points = [first or deepest(target)]
    labels, logits = [1], None
    for _ in range(clicks):
        masks, scores, low = looked.answer(points, labels, logits)
        masks = [dilate(mask, dilated) for mask in masks]
        yield np.array([intersection_over_union(mask, target) for mask in masks]), scores
        best = scores.argmax()
        logits = low[best : best + 1]
        missed, excess = target & ~masks[best], masks[best] & ~target
        labels.append(int(missed.sum() >= excess.sum()))
        points.append(deepest(missed if labels[-1] else excess))


def deepest(mask: np.ndarray) -> tuple[int, int]:
    """x, y of the pixel of `mask` farthest from its rim."""
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return int(x), int(y)


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def dog(sam: network.Network, dilated: int = 0) -> list[float]:
    """IoU of the answer with the article's mask of the dog, after a click at `DOG_CLICK` and two corrections."""
    target = cv2.imread(str(DATA / "dog-on-bench-mask.jpg"), cv2.IMREAD_GRAYSCALE) >= 128
    answers = clicked(Looked(sam, _dog_picture()), target, CLICKS, DOG_CLICK, dilated)
    return [float(ious[scores.argmax()]) for ious, scores in answers]


def before_and_after(sam: network.Network) -> np.ndarray:
    """BGR picture: above the dog with two clicks and the first held-out scenes with one each, the answers below."""
    cases = [(image, [deepest(target)]) for image, target in HeldOut(SHOWN).cases]
    columns = []
    for image, clicks in [(_dog_picture(), [DOG_CLICK, DOG_HEAD]), *cases]:
        masks, scores, _ = Looked(sam, image).answer(clicks, [1] * len(clicks))
        answer = image.copy()
        answer[masks[scores.argmax()]] = answer[masks[scores.argmax()]] // 2 + np.array([0, 90, 127], np.uint8)
        scale = TILE / image.shape[0]
        above, below = (
            cv2.resize(each, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for each in (image, answer)
        )
        for x, y in clicks:
            centre = (round(x * scale), round(y * scale))
            cv2.circle(above, centre, 5, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(above, centre, 3, (0, 140, 0), -1, cv2.LINE_AA)
        columns.append(np.vstack([above, below]))
    return cv2.cvtColor(np.hstack(columns), cv2.COLOR_RGB2BGR)


def _dog_picture() -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(DATA / "dog-on-bench.png")), cv2.COLOR_BGR2RGB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", default=DEMO / "network.yaml")
    parser.add_argument("weights", type=Path, nargs="?", default=DEMO / "weights.safetensors")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--picture", type=Path, help="write a PNG: pictures with clicks above, their masks below")
    arguments = parser.parse_args()
    sam = network.load(arguments.config, arguments.weights)
    print(f"{arguments.scenes} held-out scenes: {HeldOut(arguments.scenes).measure(sam)}")
    if arguments.picture:
        cv2.imwrite(str(arguments.picture), before_and_after(sam))
    for dilated, how in ((0, ""), (DOG_DILATED, f", grown by {DOG_DILATED} pixels as the article's was")):
        ious = ", ".join(f"{iou:.3f}" for iou in dog(sam, dilated))
        print(f"dog on bench: IoU {ious} after 1, 2, 3 clicks{how}")


if __name__ == "__main__":
    main()
