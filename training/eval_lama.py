"""What the demo LaMa can do: `python -m training.eval_lama [--weights FOLDER] [--picture FILE]`.

Held-out photographs of about 1.5 megapixels with wide held-out holes, filled as the product does it, beside the
same without copied detail, the smooth guess alone and OpenCV's two classical fillers: A. Telea 2004, and M. Bertalmio
et al. 2001 (Navier-Stokes).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from handlers.editing.prefill import prefill
from handlers.lama import network
from handlers.lama.handler import LamaHandler
from handlers.pictures.picture import Picture
from training.eval_sd import seam
from training.lama_holes import Holes
from training.photographs import photographs, read_photograph

DEMO = Path(network.__file__).parent / "demo"
DOG = Path(__file__).parents[1] / "tests" / "data" / "dog-on-bench.png"
SEED = 11
LONGEST = 1536  # pixels
KINDS = ("strokes", "object")
AROUND = 8  # pixels from the hole's edge, where the picture's own steps are measured
RADIUS = 5  # pixels around a hole that OpenCV's fillers look at
DILATION = 15  # pixels: the dog's mask stops short of its fur
SHOWN = 5  # held-out pictures beside the dog
TILE = 220  # pixels, the height of a picture in the grid

Fill = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Case(NamedTuple):
    """picture: uint8 RGB (H, W, 3); hole: bool (H, W); kind: of the hole."""

    picture: np.ndarray
    hole: np.ndarray
    kind: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=DEMO, help="folder with weights.safetensors")
    parser.add_argument("--picture", type=Path, help="write a grid of before, hole and after here (PNG)")
    arguments = parser.parse_args()
    cases, handler = held_out(), load(arguments.weights)
    lama = _product(handler)
    fills = {"LaMa-demo": lama, "without detail": _plain(handler.network.smooth), "guess alone": _plain(prefill)}
    fills |= {"Telea": _opencv(cv2.INPAINT_TELEA), "Navier-Stokes": _opencv(cv2.INPAINT_NS)}
    report(cases, fills)
    if arguments.picture:
        _write_grid([dog(), *cases[1 :: -(-len(cases) // SHOWN)]], lama, arguments.picture)


def load(folder: Path) -> LamaHandler:
    """The demo's handler with the weights in `folder`."""
    handler = LamaHandler()
    handler.device, handler.dtype = torch.device("cpu"), torch.float32
    handler.config = {}
    handler.network = network.build(network.load_config(DEMO / "config.yaml"))
    handler.network.load_state_dict(load_file(folder / "weights.safetensors"))
    return handler


def held_out() -> list[Case]:
    """Every held-out photograph with a hole of each kind; the same ones each time."""
    holes, cases = Holes("held-out"), []
    for i, path in enumerate(photographs("held-out")):
        picture = read_photograph(path, LONGEST)
        for j, kind in enumerate(KINDS):
            rng = np.random.default_rng([SEED, i, j])
            cases.append(Case(picture, holes.draw(rng, *picture.shape[:2], kind), kind))
    return cases


def dog() -> Case:
    """The picture that no demo model has seen; there is no truth behind the dog."""
    picture = cv2.cvtColor(cv2.imread(str(DOG)), cv2.COLOR_BGR2RGB)
    mask = cv2.imread(str(DOG.with_name("dog-on-bench-mask.jpg")), cv2.IMREAD_GRAYSCALE) >= 128
    width = 2 * DILATION + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    return Case(picture, cv2.dilate(mask.astype(np.uint8), kernel).astype(bool), "object")


def report(cases: list[Case], fills: dict[str, Fill]) -> None:
    """Print per kind of hole each filler's mean PSNR in the hole (dB), its detail and its edge, 1 being the truth's."""
    print(f"{'hole':<10}{'filler':<16}{'PSNR (dB)':>10}{'detail':>8}{'edge':>8}")
    figures: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for case in cases:
        for name, fill in fills.items():
            filled = fill(case.picture, case.hole)
            figure = tuple(measure(filled, case.picture, case.hole) for measure in (psnr, detail, edge))
            for kind in (case.kind, "all"):
                figures.setdefault((kind, name), []).append(figure)
    for (kind, name), values in sorted(figures.items()):
        decibels, fine, step = np.mean(values, axis=0)
        print(f"{kind:<10}{name:<16}{decibels:>10.2f}{fine:>8.2f}{step:>8.2f}")


def psnr(filled: np.ndarray, picture: np.ndarray, hole: np.ndarray) -> float:
    """Decibels, over the hole's pixels alone."""
    difference = filled[hole].astype(np.float64) - picture[hole]
    return float(10 * np.log10(255**2 / max(np.mean(difference**2), 1e-9)))


def detail(filled: np.ndarray, picture: np.ndarray, hole: np.ndarray) -> float:
    """The hole's mean absolute Laplacian as a share of the true one: far below 1 is smear, above 1 is noise."""
    found, true = (np.abs(cv2.Laplacian(x.astype(np.float32), cv2.CV_32F))[hole].mean() for x in (filled, picture))
    return float(found / max(true, 1e-9))


def edge(filled: np.ndarray, picture: np.ndarray, hole: np.ndarray) -> float:
    """The mean step across the hole's edge over that across a line around it: above 1 the hole's outline shows."""
    around = cv2.dilate(hole.astype(np.uint8), None, iterations=AROUND).astype(bool)
    return seam(filled, hole) / max(seam(picture, around), 1e-9)


def _product(handler: LamaHandler) -> Fill:
    def fill(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return handler.erase(Picture(picture), hole).samples

    return fill


def _plain(filled: Callable[[Tensor, Tensor], Tensor]) -> Fill:
    """filled: (1, 3, H, W) in 0..1 and the hole, (1, 1, H, W) of 0 and 1, to the filled picture."""

    @torch.inference_mode()
    def fill(picture: np.ndarray, hole: np.ndarray) -> np.ndarray:
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
        painted = filled(image, torch.from_numpy(hole)[None, None].float())[0].permute(1, 2, 0)
        return np.where(hole[..., None], painted.mul(255).round().clamp(0, 255).to(torch.uint8).numpy(), picture)

    return fill


def _opencv(method: int) -> Fill:
    return lambda picture, hole: cv2.inpaint(picture, hole.astype(np.uint8), RADIUS, method)


def _write_grid(cases: list[Case], fill: Fill, path: Path) -> None:
    """A row a case: before, the hole in magenta, after."""
    rows = []
    for case in cases:
        marked = np.where(case.hole[..., None], np.array([255, 0, 255], np.uint8), case.picture)
        row = np.hstack([case.picture, marked, fill(case.picture, case.hole)])
        width = round(row.shape[1] * TILE / row.shape[0])
        rows.append(cv2.resize(row, (width, TILE), interpolation=cv2.INTER_AREA))
    wide = max(row.shape[1] for row in rows)
    grid = np.vstack([np.pad(row, ((0, 4), (0, wide - row.shape[1]), (0, 0)), constant_values=255) for row in rows])
    cv2.imwrite(str(path), cv2.cvtColor(grid, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()
