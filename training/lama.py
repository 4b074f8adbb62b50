"""Train the demo LaMa: `python -m training.lama FOLDER`. Stop it at will; the same command goes on from where it was.

The network learns what a smooth guess (`training.lama_refine`) lacks in wide holes of photographs at many scales,
first in small pieces, then in larger ones with more context. The same seed on the same machine gives the same weights.
"""

import argparse
import copy
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from handlers.lama import network
from training import lama_refine as refine
from training.lama_holes import KINDS, Holes
from training.muon import Muon
from training.photographs import photographs, read_photograph
from training.scenes import SceneMaker
from training.textures import made

CONFIG = Path(network.__file__).parent / "demo" / "config.yaml"
SEED = 3
LEARNING_RATE = 2e-3
WARM_UP = 100  # steps
DECAY_OVER = 0.5  # the last part of all steps, down to nothing
AVERAGE = 0.997  # of the weights that are kept, an exponential moving average
SAVE_EVERY = 100  # steps
PHOTOGRAPH_LONGEST = 1536
PYRAMID_WEIGHT = 1.0
PYRAMID_LEVELS = 4


class Stage(NamedTuple):
    size: int  # pixels, width and height
    batch: int  # pictures
    steps: int


STAGES = (Stage(128, 4, 1000),)


class Data:
    """Batches as a pure function of their number."""

    def __init__(self) -> None:
        images = [read_photograph(path, PHOTOGRAPH_LONGEST) for path in photographs("train")]
        self._pyramids = [_pyramid(image) for image in images]
        self._scenes = SceneMaker("train")
        self._holes = Holes("train")

    def batch(self, number: int, size: int, count: int) -> tuple[Tensor, Tensor]:
        """Pictures float32 (count, 3, size, size) in 0..1 and holes float32 (count, 1, size, size) of 0 and 1."""
        rng = np.random.default_rng([SEED, number])
        pictures = np.stack([self._picture(rng, size) for _ in range(count)])
        holes = np.stack([self._holes.draw(rng, size, size, rng.choice(KINDS)) for _ in range(count)])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(holes)[:, None].float()

    def _picture(self, rng: np.random.Generator, size: int) -> np.ndarray:
        kind = rng.random()
        if kind < 0.08:
            return made(rng, size)
        if kind < 0.16:
            return self._scenes.make(int(rng.integers(1 << 30)), size, difficulty=0.5).image
        return _relit(rng, _piece(rng, self._pyramids[rng.integers(len(self._pyramids))], size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoint.pt and weights.safetensors go here")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(1)
    train(arguments.folder)


def train(folder: Path) -> None:
    torch.manual_seed(SEED)
    model = network.build(network.load_config(CONFIG)).train()
    _add_nothing(model)
    average = copy.deepcopy(model)
    optimizer, start, checkpoint = Optimizer(model), 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    data, total, losses, before = Data(), sum(stage.steps for stage in STAGES), [], time.monotonic()
    for step in range(start, total):
        stage = _stage(step)
        picture, hole = data.batch(step, stage.size, stage.batch)
        guess = refine.prefill(picture, hole)
        loss = _loss(guess + refine.addition(model, guess, hole), picture, hole)
        loss.backward()
        optimizer.step(LEARNING_RATE * _rate(step / total, step))
        _follow(average, model, min(AVERAGE, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            seconds = (time.monotonic() - before) / len(losses)
            print(f"step {step + 1} size {stage.size} loss {np.mean(losses):.4f} {seconds:.2f} s/step", flush=True)
            losses, before = [], time.monotonic()
            state = {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1}
            _save(state | {"optimizer": optimizer.state_dict()}, folder)


class Optimizer:
    """Muon for the convolutions between first and last, each seen as a matrix; AdamW for all else."""

    def __init__(self, model: nn.Module) -> None:
        layers = list(model.generator.model)
        inner = [p for layer in layers[2:-2] for p in layer.parameters() if p.ndim == 4]
        known = {id(p) for p in inner}
        self._convolutions = inner
        # They share the convolutions' memory, so a step on them is a step on these.
        self._matrices = [nn.Parameter(p.detach().flatten(1)) for p in inner]
        rest = [p for p in model.parameters() if id(p) not in known]
        self._muon = Muon(self._matrices, lr=LEARNING_RATE, weight_decay=0.02)
        self._adam = torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
        self._rest = rest

    def step(self, lr: float) -> None:
        """One step with the gradients at hand, which are then cleared."""
        nn.utils.clip_grad_norm_(self._rest, 1.0)
        for matrix, convolution in zip(self._matrices, self._convolutions, strict=True):
            matrix.grad = convolution.grad.flatten(1)
            convolution.grad = None
        for optimizer in (self._muon, self._adam):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])


def _add_nothing(model: nn.Module) -> None:
    """Training starts from the guess as it is."""
    last = model.generator.model[-2]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def _loss(painted: Tensor, picture: Tensor, hole: Tensor) -> Tensor:
    """L1 in the hole, and L1 of the Laplacian pyramids, so that edges and seams weigh at every scale."""
    difference, share = (painted - picture) * hole, hole.mean()
    loss = difference.abs().mean() / share
    for _ in range(PYRAMID_LEVELS):
        smaller = F.avg_pool2d(difference, 2)
        band = difference - F.interpolate(smaller, scale_factor=2, mode="bilinear")
        loss = loss + PYRAMID_WEIGHT / PYRAMID_LEVELS * band.abs().mean() / share
        difference = smaller
    return loss + PYRAMID_WEIGHT / PYRAMID_LEVELS * difference.abs().mean() / share


def _piece(rng: np.random.Generator, pyramid: list[np.ndarray], size: int) -> np.ndarray:
    """A square of a photograph, from `size` pixels' side to all of it, shrunk to `size`, maybe mirrored."""
    short = min(pyramid[0].shape[:2])
    side = min(short, size * np.exp(rng.uniform(0, max(0.0, np.log(short / size)))))
    level = min(len(pyramid) - 1, int(np.log2(max(1.0, side / size))))
    image, side = pyramid[level], int(side / 2**level)
    side = min(side, *image.shape[:2])
    top, left = rng.integers(image.shape[0] - side + 1), rng.integers(image.shape[1] - side + 1)
    piece = cv2.resize(image[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def _relit(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Another exposure, contrast and tint."""
    gain, lift = rng.uniform(0.75, 1.2) * rng.normal(1, 0.04, 3), rng.normal(0, 10)
    return ((image - 128.0) * gain + 128 + lift).clip(0, 255).astype(np.uint8)


def _pyramid(image: np.ndarray) -> list[np.ndarray]:
    levels = [image]
    while min(levels[-1].shape[:2]) >= 2 * STAGES[0].size:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return levels


def _stage(step: int) -> Stage:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError("beyond the last step")


def _rate(progress: float, step: int) -> float:
    return min(1.0, (step + 1) / WARM_UP, (1 - progress) / DECAY_OVER)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, 1 - keep)


def _save(state: dict[str, Any], folder: Path) -> None:
    torch.save(state, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
    save_file({name: tensor.contiguous() for name, tensor in state["average"].items()}, folder / "weights.safetensors")


if __name__ == "__main__":
    main()
