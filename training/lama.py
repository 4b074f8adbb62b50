"""Train the demo LaMa: `python -m training.lama FOLDER`. Stop it at will; the same command goes on from where it was.

The network learns what a smooth guess (`handlers.editing.prefill`) lacks in wide holes of photographs at many scales.
The same seed on the same machine gives the same weights.
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

from handlers.lama import network
from training.lama_holes import KINDS, Holes
from training.lama_network import PublishedLaMa, product_weights
from training.photographs import photographs, read_photograph

CONFIG = Path(network.__file__).parent / "demo" / "config.yaml"
SEED = 3
BATCH = 16
WARM_UP = 100  # steps of each stage
DECAY_OVER = 0.8  # the last part of each stage, down to nothing
AVERAGE = 0.998  # of the weights that are kept, an exponential moving average
SAVE_EVERY = 100  # steps
LONGEST = 1536  # pixels, of a photograph
FLOOR = 1e-4  # of the mean squared error, 40 dB: neither the root nor the logarithm has a slope at zero


class Stage(NamedTuple):
    size: int  # pixels, the pictures' longer side; a multiple of 16
    seen: int  # pixels, that to which the network shrinks them
    steps: int
    rate: float  # the highest
    decibels: bool  # what the loss is in: else the root of the mean squared error


# First small pictures, and those with large errors weigh most, from which there is most to learn. Then it is as in the
# product: a guess of finer grain than what the network sees, and all weigh the same, so that plain skies stay plain.
STAGES = (Stage(64, 64, 3000, 5e-4, decibels=False), Stage(192, 96, 1500, 2e-4, decibels=True))


class Data:
    """Batches as a pure function of their number."""

    def __init__(self) -> None:
        self._pyramids = [_pyramid(read_photograph(path, LONGEST)) for path in photographs("train")]
        self._holes = Holes("train")

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """Pictures float32 (BATCH, 3, H, W) in 0..1 and holes float32 (BATCH, 1, H, W) of 0 and 1.

        The longer side is `size`, the shorter one at least half of it, a multiple of 8.
        """
        rng = np.random.default_rng([SEED, number])
        height, width = 8 * int(rng.integers(size // 16, size // 8 + 1)), size
        if rng.random() < 0.3:
            height, width = width, height
        pictures = np.stack([self._picture(rng, height, width) for _ in range(BATCH)])
        holes = np.stack([self._holes.draw(rng, height, width, rng.choice(KINDS)) for _ in range(BATCH)])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(holes)[:, None].float()

    def _picture(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        return _relit(rng, _piece(rng, self._pyramids[rng.integers(len(self._pyramids))], height, width))


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
    model = PublishedLaMa(network.load_config(CONFIG)).train()
    _keep_alive(model)
    average = copy.deepcopy(model)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, betas=(0.9, 0.99))
    start, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    data, total, losses, before = Data(), sum(stage.steps for stage in STAGES), [], time.monotonic()
    for step in range(start, total):
        stage, number = _stage(step)
        model.prefilled_side = stage.seen
        picture, hole = data.batch(step, stage.size)
        squared = _squared_error(model.smooth(picture * (1 - hole), hole), picture, hole) + FLOOR
        loss = (10 * squared.log10() if stage.decibels else squared.sqrt()).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.param_groups[0]["lr"] = stage.rate * _rate(number, stage)
        optimizer.step()
        optimizer.zero_grad()
        _follow(average, model, min(AVERAGE, (1 + step) / (10 + step)))
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == total:
            seconds = (time.monotonic() - before) / len(losses)
            print(f"step {step + 1} loss {np.mean(losses):.4f} {seconds:.2f} s/step", flush=True)
            losses, before = [], time.monotonic()
            state = {"model": model.state_dict(), "average": average.state_dict(), "step": step + 1}
            _save(state | {"optimizer": optimizer.state_dict()}, folder)


def _keep_alive(model: PublishedLaMa) -> None:
    """To add nothing is a fair answer, and the quickest way there is to shut the rectifiers for good.

    So the normalisations keep their scale and shift: about half of every channel stays open. And the first answer is
    to add nothing, so that no noise has to be unlearned.
    """
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)
    for parameter in model.generator.model[-2].parameters():
        nn.init.zeros_(parameter)


def _squared_error(painted: Tensor, picture: Tensor, hole: Tensor) -> Tensor:
    """Of each picture, the mean over its hole."""
    return ((painted - picture) * hole).square().mean(dim=(1, 2, 3)) / hole.mean(dim=(1, 2, 3))


def _piece(rng: np.random.Generator, pyramid: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """A part of a photograph, from `height` x `width` pixels to all of it, shrunk to that, maybe mirrored."""
    largest = max(1.0, min(pyramid[0].shape[0] / height, pyramid[0].shape[1] / width))
    scale = np.exp(rng.uniform(0, np.log(largest)))
    level = min(len(pyramid) - 1, int(np.log2(scale)))
    image, scale = pyramid[level], scale / 2**level
    tall, wide = min(int(height * scale), image.shape[0]), min(int(width * scale), image.shape[1])
    top, left = rng.integers(image.shape[0] - tall + 1), rng.integers(image.shape[1] - wide + 1)
    piece = cv2.resize(image[top : top + tall, left : left + wide], (width, height), interpolation=cv2.INTER_AREA)
    return piece[:, ::-1] if rng.random() < 0.5 else piece


def _relit(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Another exposure, contrast and tint, and the colours' channels in another order."""
    gain, lift = rng.uniform(0.75, 1.2) * rng.normal(1, 0.04, 3), rng.normal(0, 10)
    return ((image[..., rng.permutation(3)] - 128.0) * gain + 128 + lift).clip(0, 255).astype(np.uint8)


def _pyramid(image: np.ndarray) -> list[np.ndarray]:
    levels = [image]
    while min(levels[-1].shape[:2]) >= 2 * STAGES[0].size:
        levels.append(cv2.resize(levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return levels


def _stage(step: int) -> tuple[Stage, int]:
    """The stage of a step, and the step's number in it."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise ValueError("beyond the last step")


def _rate(number: int, stage: Stage) -> float:
    return min(1.0, (number + 1) / WARM_UP, (1 - number / stage.steps) / DECAY_OVER)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, keep: float) -> None:
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, 1 - keep)


def _save(state: dict[str, Any], folder: Path) -> None:
    torch.save(state, folder / "checkpoint.tmp")
    (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")
    save_file(product_weights(state["average"], network.load_config(CONFIG)), folder / "weights.safetensors")


if __name__ == "__main__":
    main()
