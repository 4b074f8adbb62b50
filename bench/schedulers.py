"""How few steps of which scheduler are enough: pictures of the Stable Diffusion demo beside those of many steps.

    python -m bench.schedulers [--count 32] [--schedulers ddim dpmpp_2m ...] [--steps 4 6 8 10 15 20 30 50]

Needs the photographs that training/fetch-data.sh unpacks. Each line of the table is a scheduler and its steps: CPU time
of one core per picture; how far the holes are from those of REFERENCE steps of the archive's own scheduler, with the
same seeds, as PSNR of their mean squared difference; and what training.eval_sd asks: whether the colour that the prompt
names dominates the hole, and whether a classifier recognises the thing. Held-out photographs and prompts.
"""

import argparse
import time
from typing import NamedTuple

import numpy as np
import torch

from handlers.sd.description import SCHEDULER, STEPS
from training import shapes
from training.eval_sd import DEMO, Case, Classifier, Painter, dominant_colour, held_out_cases, train_classifier

REFERENCE = STEPS.high


class Figures(NamedTuple):
    """Of one scheduler with so many steps. seconds: of CPU time per picture; psnr: dB to the reference; 0 to 1."""

    seconds: float
    psnr: float
    colour: float
    thing: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="pictures per line")
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULER.choices, default=SCHEDULER.choices)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8, 10, 15, 20, 30, 50])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.count)
    print("| scheduler | steps | CPU time | PSNR to the reference | colour | thing |\n|---|---|---|---|---|---|")
    print_line("its own", REFERENCE, bench.figures())
    for scheduler in arguments.schedulers:
        for steps in arguments.steps:
            print_line(scheduler, steps, bench.measured(scheduler=scheduler, num_inference_steps=steps))


class Bench:
    """The cases, and the reference's pictures of them."""

    def __init__(self, count: int) -> None:
        self._classifier: Classifier = train_classifier()
        self._cases: list[Case] = held_out_cases(count)
        self._painter = Painter(DEMO)
        self._reference, self._seconds = self._paint(num_inference_steps=REFERENCE)

    def measured(self, **gen_args: object) -> Figures:
        pictures, seconds = self._paint(**gen_args)
        return self._judged(pictures, seconds)

    def figures(self) -> Figures:
        """The reference's own."""
        return self._judged(self._reference, self._seconds)

    def _paint(self, **gen_args: object) -> tuple[list[np.ndarray], float]:
        began = time.process_time()
        pictures = self._painter.paint(self._cases, [shapes.prompt(case.thing) for case in self._cases], **gen_args)
        return pictures, (time.process_time() - began) / len(pictures)

    def _judged(self, pictures: list[np.ndarray], seconds: float) -> Figures:
        holes = [case.hole for case in self._cases]
        names = self._classifier.names(pictures, holes)
        pairs = list(zip(pictures, self._cases, strict=True))
        errors = [
            np.square(picture[hole].astype(float) - reference[hole]).mean()
            for picture, reference, hole in zip(pictures, self._reference, holes, strict=True)
        ]
        return Figures(
            seconds,
            float(10 * np.log10(255**2 / max(np.mean(errors), 1e-9))),
            float(np.mean([dominant_colour(picture, case.hole) == case.thing.colour for picture, case in pairs])),
            float(np.mean([name == case.thing.thing for name, case in zip(names, self._cases, strict=True)])),
        )


def print_line(scheduler: str, steps: int, figures: Figures) -> None:
    psnr = "—" if figures.psnr > 100 else f"{figures.psnr:.1f} dB"
    rates = " | ".join(f"{100 * rate:.0f} %" for rate in (figures.colour, figures.thing))
    print(f"| {scheduler} | {steps} | {figures.seconds:.2f} s | {psnr} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
