"""How much of the picture around a hole the network should see: quality and time by the context's width.

    python -m bench.context [--photographs 11] [--full-size]

Held-out photographs of 1.5 megapixels with wide holes (training/README.md says where they are from), filled by the demo
LaMa as the product does it. Per width: PSNR in the hole, detail (the Laplacian's strength in the hole, 1 being the
truth's), seam (the steps across the hole's rim, 1 being the truth's), the share of the picture that is seen, and CPU
seconds. --full-size: also the CPU seconds of big-lama with random weights on the dog's picture.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from handlers.editing import geometry
from handlers.lama import handler as lama
from handlers.lama import network
from handlers.pictures.picture import Picture
from training.eval_lama import DEMO, Case, detail, dog, held_out, load, psnr

WIDTHS = (16, 32, 64, 96, 128, 192, 256, 2048)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=11)
    parser.add_argument("--full-size", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    demo, cases = load(DEMO), held_out()[: 2 * arguments.photographs]
    print("| context | PSNR (dB) | detail | seam | seen | CPU (s) |\n|---|---|---|---|---|---|")
    for width in WIDTHS:
        figures = np.mean([_measured(demo, case, width) for case in cases], axis=0)
        print(f"| {_name(width)} | {{:.2f}} | {{:.2f}} | {{:.2f}} | {{:.0%}} | {{:.2f}} |".format(*figures), flush=True)
    if arguments.full_size:
        _full_size()


def _measured(handler: lama.LamaHandler, case: Case, width: int) -> tuple[float, ...]:
    began = time.process_time()
    filled = _erased(handler, case, width)
    seconds = time.process_time() - began
    hole, truth = case.hole, case.picture
    return (
        psnr(filled, truth, hole),
        detail(filled, truth, hole),
        _seam(filled, truth, hole),
        _seen(case, width),
        seconds,
    )


def _erased(handler: lama.LamaHandler, case: Case, width: int) -> np.ndarray:
    lama.CONTEXT = width
    handler.config = {"native_side": max(2048, 8 * width)}
    with torch.inference_mode():
        return handler.erase(Picture(case.picture), case.hole).samples


def _seam(filled: np.ndarray, truth: np.ndarray, hole: np.ndarray) -> float:
    """The mean step between neighbours of which one is in the hole."""
    return _across(filled, hole) / _across(truth, hole)


def _across(picture: np.ndarray, hole: np.ndarray) -> float:
    steps = []
    for axis in (0, 1):
        rim = np.diff(hole.astype(np.int8), axis=axis) != 0
        steps.append(np.abs(np.diff(picture.astype(np.int16), axis=axis))[rim])
    return float(np.concatenate(steps).mean())


def _seen(case: Case, width: int) -> float:
    pieces = geometry.pieces(case.hole, max(2048, 8 * width), width)
    return sum(piece.box.width * piece.box.height for piece in pieces) / case.hole.size


def _full_size() -> None:
    config = Path(network.__file__).with_name("big_lama.yaml")
    big = load(DEMO)
    big.network = network.build(network.load_config(config)).requires_grad_(False)
    case = dog()
    print("\n| context | seen | CPU (s), big-lama |\n|---|---|---|")
    for width in WIDTHS:
        seconds = []
        for _ in range(ROUNDS):
            began = time.process_time()
            _erased(big, case, width)
            seconds.append(time.process_time() - began)
        print(f"| {_name(width)} | {_seen(case, width):.0%} | {np.median(seconds):.1f} |", flush=True)


def _name(width: int) -> str:
    return "all" if width == WIDTHS[-1] else f"{width} px"


if __name__ == "__main__":
    main()
