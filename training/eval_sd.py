"""Measure the Stable Diffusion demo: `python -m training.eval_sd [--count N] [--grid FILE]`.

Prompts are combinations that training never saw, holes are cut into held-out photographs, seeds are fixed. What is
judged is the picture as the product returns it: 20 steps, pasted back, nothing outside the hole changed.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

from handlers.pictures.picture import Picture
from handlers.requests.payload import Request
from handlers.sd.handler import SdHandler
from handlers.sd.settings import PaintSettings
from training import shapes
from training.sd_vae import PIPELINE, load_photographs

DEMO = PIPELINE.parent
SEED = 4
STEPS = 20
GUIDANCE = 3.0  # the demo's own
TIMED = 512  # pixels
PATCH = 48  # pixels, what the classifier sees of a hole
THINGS = list(shapes.THINGS)
COLOURS = list(shapes.COLOURS)


@dataclass(frozen=True)
class Case:
    photograph: np.ndarray  # uint8 RGB (SIZE, SIZE, 3)
    hole: np.ndarray  # bool (SIZE, SIZE)
    thing: shapes.Thing
    seed: int


def held_out_cases(count: int) -> list[Case]:
    rng = np.random.default_rng(SEED)
    pictures = load_photographs("held-out")
    return [
        Case(shapes.background(pictures, rng), shapes.random_hole(rng), shapes.random_thing(rng, held_out=True), seed)
        for seed in range(count)
    ]


class Painter:
    """The demo's handler, configured as it is served, with the pipeline in `folder`/pipeline."""

    def __init__(self, folder: Path) -> None:
        config = yaml.safe_load((DEMO / "model-config.yaml").read_text())
        context = SimpleNamespace(system_properties={"model_dir": str(folder)}, model_yaml_config=config)
        self._handler = SdHandler()
        self._handler.initialize(context)

    def paint(
        self,
        cases: list[Case],
        prompts: list[str],
        guidance: float = GUIDANCE,
        negative: list[str] | None = None,
        **gen_args: Any,
    ) -> list[np.ndarray]:
        """uint8 RGB pictures of the cases' size, the case's own outside its hole. gen_args: further ones."""
        negative = negative or [""] * len(cases)
        return [
            self._one(case, _settings(prompt, avoid, guidance_scale=guidance, seed=case.seed, **gen_args))
            for case, prompt, avoid in zip(cases, prompts, negative, strict=True)
        ]

    def _one(self, case: Case, settings: PaintSettings) -> np.ndarray:
        with torch.inference_mode():
            return self._handler.replace(Picture(case.photograph), case.hole, settings).samples


def _settings(prompt: str, negative: str, **gen_args: Any) -> PaintSettings:
    arguments = {"num_inference_steps": STEPS} | gen_args
    return PaintSettings.parse(Request({"prompt": prompt, "negative_prompt": negative, "gen_args": arguments}))


def dominant_colour(picture: np.ndarray, hole: np.ndarray) -> str:
    """The vocabulary's colour nearest in hue to most of the hole, each pixel counted by its saturation x value."""
    hsv = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[hole]
    named = cv2.cvtColor(np.array([list(shapes.COLOURS.values())], np.float32) / 255, cv2.COLOR_RGB2HSV)[0, :, 0]
    away = np.abs(hsv[:, :1] - named[None])
    nearest = np.minimum(away, 360 - away).argmin(axis=1)
    return COLOURS[np.bincount(nearest, weights=hsv[:, 1] * hsv[:, 2], minlength=len(COLOURS)).argmax()]


def middle(hole: np.ndarray) -> np.ndarray:
    """The half of the hole that is farthest from its edge: where the thing is, and no surroundings are."""
    distance = cv2.distanceTransform(np.pad(hole, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    return distance > 0.35 * distance.max()


def seam(picture: np.ndarray, hole: np.ndarray) -> float:
    """Mean step in grey levels between neighbours on either side of the hole's edge."""
    grey = picture.astype(np.float32).mean(axis=2)
    steps = [np.abs(np.diff(grey, axis=axis))[np.diff(hole.astype(np.int8), axis=axis) != 0] for axis in (0, 1)]
    return float(np.concatenate(steps).mean())


class Classifier(nn.Sequential):
    """Names the thing in a hole; trained on made pictures only, never on painted ones."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 24), (24, 48), (48, 96)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        super().__init__(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * (PATCH // 8) ** 2, len(THINGS)))

    def names(self, pictures: list[np.ndarray], holes: list[np.ndarray]) -> list[str]:
        patches = np.stack([patch(picture, hole) for picture, hole in zip(pictures, holes, strict=True)])
        with torch.no_grad():
            return [THINGS[i] for i in self(_to_input(patches)).argmax(dim=1)]


def train_classifier(count: int = 2500, epochs: int = 12) -> Classifier:
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 1)
    pictures = load_photographs("train")
    patches, labels = [], []
    for _ in range(count):
        hole, thing = shapes.random_hole(rng), shapes.random_thing(rng)
        picture = shapes.compose(shapes.background(pictures, rng), hole, thing, rng)
        blur = rng.uniform(0.1, 8)  # the VAE's pictures are soft
        patches.append(patch(cv2.GaussianBlur(picture, (0, 0), blur), hole))
        labels.append(THINGS.index(thing.thing))
    inputs, targets = _to_input(np.stack(patches)), torch.tensor(labels)
    classifier = Classifier()
    optimiser = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, epochs * len(inputs) // 50)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(50):
            optimiser.zero_grad()
            F.cross_entropy(classifier(inputs[batch]), targets[batch]).backward()
            optimiser.step()
            schedule.step()
    return classifier.eval()


def patch(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The square around the hole, uint8 RGB (PATCH, PATCH, 3)."""
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    cut = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cv2.resize(cut, (PATCH, PATCH), interpolation=cv2.INTER_AREA)


def _to_input(patches: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(patches).permute(0, 3, 1, 2).float() / 127.5 - 1


def share(hits: list[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.1f} % of {len(hits)}"


def report(count: int, folder: Path = DEMO) -> None:
    classifier, cases, painter = train_classifier(), held_out_cases(count), Painter(folder)
    holes = [case.hole for case in cases]

    def judge(title: str, pictures: list[np.ndarray]) -> None:
        whole, inner = (
            share([dominant_colour(p, part(c.hole)) == c.thing.colour for p, c in zip(pictures, cases, strict=True)])
            for part in (lambda hole: hole, middle)
        )
        names = classifier.names(pictures, holes)
        things = [name == case.thing.thing for name, case in zip(names, cases, strict=True)]
        print(f"{title}: colour named dominates hole {whole}, its middle {inner}; thing recognised {share(things)}")

    rng = np.random.default_rng(SEED + 2)
    judge("made pictures (ceiling)", [shapes.compose(c.photograph, c.hole, c.thing, rng) for c in cases])
    prompts = [shapes.prompt(case.thing) for case in cases]
    painted = painter.paint(cases, prompts)
    judge(f"painted, guidance {GUIDANCE:g}", painted)
    for guidance in (1.0, 7.5):
        judge(f"painted, guidance {guidance:g}", painter.paint(cases, prompts, guidance))

    steps = [np.mean([seam(p, h) for p, h in zip(ps, holes, strict=True)]) for ps in _seam_pictures(cases, painted)]
    print("step at the hole's edge, grey levels: photograph {:.1f}, painted {:.1f}, mean colour {:.1f}".format(*steps))

    half = cases[: count // 2]
    plain = [f"a {case.thing.thing}" for case in half]
    first = [dominant_colour(p, c.hole) for p, c in zip(painter.paint(half, plain), half, strict=True)]
    second = [dominant_colour(p, c.hole) for p, c in zip(painter.paint(half, plain, negative=first), half, strict=True)]
    changed = [a != b for a, b in zip(first, second, strict=True)]
    print(f"an unnamed colour gives way when it becomes the negative prompt: {share(changed)}")
    seconds = _seconds(painter, cases[0])
    print(f"{STEPS} steps at {TIMED} x {TIMED}, {torch.get_num_threads()} threads: {seconds:.2f} s")


def _seam_pictures(cases: list[Case], painted: list[np.ndarray]) -> list[list[np.ndarray]]:
    means = [
        np.where(c.hole[..., None], c.photograph[~c.hole].mean(axis=0).astype(np.uint8), c.photograph) for c in cases
    ]
    return [[case.photograph for case in cases], painted, means]


def _seconds(painter: Painter, case: Case) -> float:
    """The median of five, for the case enlarged to TIMED pixels' side."""
    photograph = cv2.resize(case.photograph, (TIMED, TIMED))
    hole = cv2.resize(case.hole.astype(np.uint8), (TIMED, TIMED), interpolation=cv2.INTER_NEAREST) > 0
    large = Case(photograph, hole, case.thing, case.seed)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        painter.paint([large], [shapes.prompt(case.thing)])
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def draw_grid(path: Path, folder: Path = DEMO, columns: int = 8, rows: int = 3, side: int = 128) -> None:
    """Pairs of photograph with hole (above) and painted picture (below), each under its prompt."""
    cases = held_out_cases(columns * rows)
    painted = Painter(folder).paint(cases, [shapes.prompt(case.thing) for case in cases])
    lines = []
    for i in range(0, len(cases), columns):
        row = range(i, i + columns)
        lines.append(np.hstack([_caption(shapes.prompt(cases[j].thing), side) for j in row]))
        holes = [np.where(cases[j].hole[..., None], 255, cases[j].photograph).astype(np.uint8) for j in row]
        for pictures in (holes, [painted[j] for j in row]):
            lines.append(np.hstack([cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA) for p in pictures]))
    Image.fromarray(np.vstack(lines)).quantize(256).save(path, optimize=True)


def _caption(text: str, side: int) -> np.ndarray:
    strip = np.full((20, side, 3), 255, np.uint8)
    return cv2.putText(strip, text, (3, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.28, (0, 0, 0), 1, cv2.LINE_AA)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.eval_sd", description=__doc__)
    parser.add_argument("--count", type=int, default=96, help="held-out prompts")
    parser.add_argument("--grid", type=Path, help="write a grid of pictures here instead")
    parser.add_argument("--demo", type=Path, default=DEMO, help="folder that holds pipeline/")
    arguments = parser.parse_args()
    if arguments.grid:
        draw_grid(arguments.grid, arguments.demo)
    else:
        report(arguments.count, arguments.demo)


if __name__ == "__main__":
    main()
