"""How fast the models answer: this server, the plain script, an earlier tree and IOPaint, in turn, in one run.

    python -m bench.models [--rounds 5] [--only click,erase,replace] [--full-size FOLDER] [--before TREE]
                           [--iopaint PYTHON] [--steps 4 25] [--report docs/speed-cpu]

Demo models; or, with --full-size, SAM vit_b, big-lama and SD-2 with random weights, built in FOLDER (25 GB, once).
--before: a source tree of an earlier commit (`git worktree add`). --iopaint: the Python of an environment that has
IOPaint 1.6; only full-size networks.

For each task medians are shown: seconds until the answer is read, CPU seconds of all processes, the peak memory of the
process that computes; at the end each program's idle memory. Differences are to the plain script's picture: for masks
the intersection over union; for paintings the mean difference of grey levels within the hole. (With random weights they
say little: what is painted is noise.) --report writes a table, NAME.md, and a chart, NAME.svg.
"""

import argparse
import io
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bench.chart import bars
from bench.painters import IoPaint, Ours, Painter, Plain
from bench.stores import build_demo, build_full_size

DATA = Path(__file__).parent.parent / "tests" / "data"
DOG, DOGS_MASK = DATA / "dog-on-bench.png", DATA / "dog-on-bench-mask.jpg"
POINTS = [[750, 500]]
PROMPT = "a hamster on a bench"
SIZES = {"512x512": (512, 512), "1499x1041": (1499, 1041), "3000x2000": (3000, 2000), "6000x4000": (6000, 4000)}
BYTES_PER_PIXEL = 1100  # that full-size LaMa takes; the demo network a fifth


class Task(NamedTuple):
    """verb: of Painter. run: does it once, in the round of that number. prepare: comes before it and is not counted.

    pixels: of the picture that a network may be shown whole.
    """

    name: str
    verb: str
    run: Callable[[Painter, int], bytes]
    prepare: Callable[[Painter, int], object] = lambda painter, number: None
    pixels: int = 0

    def can_be_done_by(self, painter: Painter) -> bool:
        return self.verb in painter.can and self.pixels <= painter.most_pixels


class Sample(NamedTuple):
    seconds: float
    cpu: float
    peak_mb: float
    picture: bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="click,erase,replace", type=lambda text: text.split(","))
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 25], help="of replace")
    parser.add_argument("--full-size", type=Path, metavar="FOLDER")
    parser.add_argument("--before", type=Path, metavar="TREE")
    parser.add_argument("--iopaint", type=Path, metavar="PYTHON")
    parser.add_argument("--report", type=Path, metavar="NAME")
    arguments = parser.parse_args()
    if arguments.iopaint and not arguments.full_size:
        parser.error("IOPaint knows full-size networks only: --full-size FOLDER")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        painters = [stack.enter_context(painter) for painter in start(Path(folder), arguments)]
        results = {
            task.name: measured(task, [p for p in painters if task.can_be_done_by(p)], arguments.rounds)
            for task in tasks(Path(folder), arguments.steps)
            if task.verb.partition("_")[0] in arguments.only
        }
        idle = {painter.name: painter.idle_mb() for painter in painters}
    report = table(results, idle)
    print(report)
    if arguments.report:
        arguments.report.with_suffix(".md").write_text(report)
        seconds = {task: {name: s.seconds for name, s in samples.items()} for task, samples in results.items()}
        arguments.report.with_suffix(".svg").write_text(bars(seconds, "seconds until the answer, median"))


def start(folder: Path, arguments: argparse.Namespace) -> Iterator[Painter]:
    models = [{"click": "sam", "erase": "lama", "replace": "sd"}[verb] for verb in arguments.only]
    root = arguments.full_size or folder
    store = build_full_size(root / "ours", models) if arguments.full_size else build_demo(root / "ours")
    yield Plain(folder, store, BYTES_PER_PIXEL if arguments.full_size else 0.2 * BYTES_PER_PIXEL)
    if arguments.iopaint:
        yield IoPaint(arguments.iopaint, folder, store)
    if arguments.before:
        tree = arguments.before.resolve()
        yield Ours("before", folder, _store_of(tree, root / "before", models, bool(arguments.full_size)), tree)
    yield Ours("Palimpsest", folder, store)


def tasks(folder: Path, steps: list[int]) -> list[Task]:
    pictures = {name: _scaled(DOG, folder / f"{name}.png", size) for name, size in SIZES.items()}
    holes = {name: _scaled(DOGS_MASK, folder / f"{name}-mask.png", size) for name, size in SIZES.items()}

    def shown(number: int) -> Path:
        """A picture that no program has seen in an earlier round of the task."""
        path = folder / f"shown{number}.png"
        if not path.exists():
            pixels = np.asarray(Image.open(pictures["1499x1041"])).copy()
            pixels[0, :8] = number
            Image.fromarray(pixels).save(path, compress_level=1)
        return path

    def erase(name: str) -> Task:
        return Task(
            f"erase, {name}",
            "erase",
            lambda painter, _: painter.erase(pictures[name], holes[name]),
            pixels=math.prod(SIZES[name]),
        )

    def replace(count: int) -> Task:
        picture, hole = pictures["1499x1041"], holes["1499x1041"]
        return Task(
            f"replace, {count} steps", "replace", lambda p, number: p.replace(picture, hole, PROMPT, count, number)
        )

    def click(painter: Painter, number: int) -> bytes:
        return painter.click(shown(number), POINTS)

    def click_by_id(painter: Painter, number: int) -> bytes:
        return painter.click_by_id(shown(number), POINTS)

    return [
        Task("first click", "click", click),
        # The plain script and IOPaint know the last picture only.
        Task("next click", "click", click, click),
        Task("next click, by id", "click_by_id", click_by_id, click_by_id),
        *map(erase, SIZES),
        *map(replace, steps),
    ]


def measured(task: Task, painters: list[Painter], rounds: int) -> dict[str, Any]:
    """The programs in turn. A round before the first lets each load its model, and is not counted."""
    samples: dict[str, list[Sample]] = {painter.name: [] for painter in painters}
    for number in range(rounds + 1):
        for painter in painters[number % len(painters) :] + painters[: number % len(painters)]:
            sample = _sample(task, painter, number)
            print(f"{task.name} {number}/{rounds} {painter.name}: {sample[:3]}", file=sys.stderr)
            if number:
                samples[painter.name].append(sample)
    return {name: _medians(several) for name, several in samples.items()}


def table(results: dict[str, dict[str, Any]], idle: dict[str, float]) -> str:
    lines = [
        "| task | program | seconds | of CPU | peak MB | against the plain script |",
        "|---|---|--:|--:|--:|---|",
    ]
    for task, samples in results.items():
        plain = samples.get("plain script")
        for name, sample in samples.items():
            against = _difference(task, sample.picture, plain.picture) if plain and name != "plain script" else ""
            lines.append(
                f"| {task} | {name} | {sample.seconds:.3f} | {sample.cpu:.2f} | {sample.peak_mb:.0f} | {against} |"
            )
    lines += ["", "| idle, all processes | MB |", "|---|--:|"]
    lines += [f"| {name} | {size:.0f} |" for name, size in idle.items()]
    return "\n".join([*lines, ""])


def _sample(task: Task, painter: Painter, number: int) -> Sample:
    task.prepare(painter, number)
    painter.forget_peaks()
    cpu, began = painter.cpu_seconds(), time.perf_counter()
    picture = task.run(painter, number)
    seconds = time.perf_counter() - began
    return Sample(seconds, painter.cpu_seconds() - cpu, painter.peak_mb(), picture)


def _medians(samples: list[Sample]) -> Sample:
    seconds, cpu, peak, pictures = zip(*samples, strict=True)
    return Sample(statistics.median(seconds), statistics.median(cpu), statistics.median(peak), pictures[-1])


def _difference(task: str, ours: bytes, plain: bytes) -> str:
    first, second = (
        np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int) for content in (ours, plain)
    )
    if "click" in task:
        a, b = first[..., 0] > 127, second[..., 0] > 127
        return f"IoU {(a & b).sum() / max((a | b).sum(), 1):.4f}"
    size = (first.shape[1], first.shape[0])
    hole = np.asarray(Image.open(DOGS_MASK).convert("L").resize(size, Image.Resampling.NEAREST)) >= 128
    return f"{np.abs(first - second)[hole].mean():.1f} grey levels"


def _scaled(source: Path, target: Path, size: tuple[int, int]) -> Path:
    picture = Image.open(source)
    picture = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    picture.save(target, compress_level=1)
    return target


def _store_of(tree: Path, store: Path, models: list[str], full_size: bool) -> Path:
    """The same archives with the code of that tree, built by it."""
    build = f"build_full_size(Path({str(store)!r}), {models})" if full_size else f"build_demo(Path({str(store)!r}))"
    subprocess.run(
        [sys.executable, "-c", f"from pathlib import Path; from bench.stores import *; {build}"],
        cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, check=True,
    )  # fmt: skip
    return store if full_size else store / "demo"


if __name__ == "__main__":
    main()
