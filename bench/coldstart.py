"""From a request for a model that is not loaded to its answer: stock TorchServe against Palimpsest, in one run.

    python -m bench.coldstart [--rounds 10] [--models sam,lama,sd] [--full-size FOLDER] [--cuda | --fleet 40]

Stock is a plain `torchserve` with a plain interpreter and a pickled checkpoint (bench/stock.py); ours is the server.
Both get the same weights, pictures and handlers, in turn, one model at a time. Reported are medians: the first answer,
a later one (the answer's own time), the phases of the load, and the memory that the worker adds.

--full-size FOLDER: SAM vit_b, big-lama and SD-2 with random weights, built in FOLDER (25 GB, once) instead of the demo
models; beside them the time of `dd` for the weights from a warm page cache.
--cuda: cold -> answer and parked -> answer for ours alone, what a parked worker keeps of the device, and the bytes per
second of loading and of waking against a pinned copy. Cold starts with a standby worker and without one; where the
driver can, parked workers are suspended and resumed, too. Without a GPU it runs dry: the same steps, on the CPU.
--fleet N: N copies of the last of the models, asked for at random; how long each took to be ready, by the place in
which it was. For 40 of SD-2 on 24 GB, with 170 GB of main memory:
    PALIMPSEST_SUSPEND=true PALIMPSEST_MEMORY_BUDGET=22000 PALIMPSEST_HOST_BUDGET=150000 \\
        python -m bench.coldstart --full-size FOLDER --models sd --fleet 40
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from bench.servers import Ours, Stock, System
from bench.stores import build_demo, build_full_size, build_stock, weights_of
from handlers.weights.mapped_file import MappedFile
from handlers.weights.tensors import CopiedWeights
from handlers.worker.base import dtype_of
from serve.residency.memory import Device, find_device

DATA = Path(__file__).parent.parent / "tests" / "data"
SIZE = (375, 260)  # a quarter of the sample photograph: the load is to be measured, not the picture
COPY_BYTES = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", default="sam,lama,sd", type=lambda names: names.split(","))
    parser.add_argument("--full-size", type=Path, metavar="FOLDER")
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--fleet", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), **vars(arguments)), indent=2))


def run(
    folder: Path, rounds: int, models: list[str], full_size: Path | None, cuda: bool, fleet: int = 0
) -> dict[str, Any]:
    """Starts the servers in `folder`. Takes seconds per model and round; with full_size minutes."""
    root = full_size or folder
    served = dtype_of("auto", models_device())
    store = build_full_size(root / "ours", models, served) if full_size else build_demo(root / "ours")
    if fleet:
        names = copies_of(store / models[-1], folder / "fleet", fleet)
        with Ours(folder, folder / "fleet") as ours:
            return wakes(ours, names, rounds)
    if cuda:
        with Ours(folder, store) as ours:
            report = {name: moves(ours, name, rounds) for name in models}
        measured = copies(weights_of(store, models[-1]))
        for model in report.values():
            model["pinned copy s"] = round(model["device MB"] / 1e3 / measured["pinned copy GB/s"], 4)
        return report | {"copies": measured}
    build_stock(store, root / "stock", models)
    with ExitStack() as stack:
        systems: list[System] = [
            stack.enter_context(Stock(folder, root / "stock")),
            stack.enter_context(Ours(folder, store)),
        ]
        return {name: compare(systems, name, rounds, weights_of(store, name)) for name in models}


def compare(systems: Iterable[System], name: str, rounds: int, files: list[Path]) -> dict[str, Any]:
    """The systems in turn, `rounds` times."""
    samples: dict[str, list[dict[str, float]]] = {system.name: [] for system in systems}
    for number in range(rounds):
        for system in systems:
            samples[system.name].append(cold(system, name))
            print(f"{name} {number + 1}/{rounds} {system.name}: {samples[system.name][-1]}", file=sys.stderr)
    result: dict[str, Any] = {system: medians(measured) for system, measured in samples.items()}
    stock, ours = result["stock"], result["ours"]
    read = dd(files)
    result["times faster"] = round(stock["first answer s"] / ours["first answer s"], 1)
    loads = [system["first answer s"] - system["answer s"] for system in (stock, ours)]
    result["times faster without the answer itself"] = round(loads[0] / loads[1], 1)
    result["dd s"] = round(read, 3)
    result["ours / (dd + answer)"] = round(ours["first answer s"] / (read + ours["answer s"]), 2)
    return result


def cold(system: System, name: str) -> dict[str, float]:
    """Loads the model by asking it, asks it again, looks at its worker, unloads it."""
    before, asked = system.processes(), question(name)
    first = seconds(lambda: system.first_answer(name, asked))
    again = seconds(lambda: system.answer(name, asked))
    phases = system.command(name, "status")["phases"]
    memory = system.memory(before)
    system.unload(name)
    return {"first answer s": first, "answer s": again} | {f"{p} s": s for p, s in phases.items()} | memory


def moves(ours: Ours, name: str, rounds: int) -> dict[str, Any]:
    """Cold and parked to the answer. Waking is a command to the worker, so it includes the way there."""
    samples, asked, device = [], question(name), find_device()
    for number in range(rounds):
        sample = {}
        if device.gpu is not None:
            ours.end_standby()
            sample["cold without standby -> answer s"] = seconds(lambda: ours.first_answer(name, asked))
            ours.unload(name)
            ours.await_standby()
        before = ours.processes()
        sample["cold -> answer s"] = seconds(lambda: ours.first_answer(name, asked))
        sample["answer s"] = seconds(lambda: ours.answer(name, asked))
        sample["status s"] = seconds(lambda: ours.command(name, "status"))
        started = ours.processes() - before
        sample["ready MB"] = taken(device, started)
        sample["first parking s"] = seconds(lambda: ours.command(name, "park"))
        sample["parked MB"] = taken(device, started)
        began = time.perf_counter()
        sample["parked -> ready s"] = seconds(lambda: ours.command(name, "wake"))
        ours.answer(name, asked)
        sample["parked -> answer s"] = time.perf_counter() - began
        sample["parking s"] = seconds(lambda: ours.command(name, "park"))
        sample["waking again s"] = seconds(lambda: ours.command(name, "wake"))
        if device.suspends:
            ours.command(name, "park")
            sample["suspending s"] = seconds(lambda: ours.command(name, "suspend"))
            sample["suspended MB"] = taken(device, started)
            sample["suspended -> parked s"] = seconds(lambda: ours.command(name, "resume"))
            ours.command(name, "wake")
        status = ours.command(name, "status")
        sample["disk -> ready s"] = sum(status["phases"].values())
        sample["device MB"] = status["device_bytes"] / 1e6
        sample |= {f"{phase} s": duration for phase, duration in status["phases"].items()}
        ours.unload(name)
        samples.append(sample)
        print(f"{name} {number + 1}/{rounds}: {sample}", file=sys.stderr)
    return medians(samples)


def copies_of(archive: Path, store: Path, count: int) -> list[str]:
    """So many archives in the store whose files are the one's; their names."""
    names = [f"{archive.name}{number}" for number in range(count)]
    for name in names:
        shutil.copytree(archive, store / name, copy_function=os.link)
    return names


def wakes(ours: Ours, names: list[str], rounds: int) -> dict[str, Any]:
    """Each model once, then `rounds` times as many at random: seconds until one was ready, by where it was."""
    chosen = random.Random(0)
    for name in names:
        ours.load(name)
    samples: dict[str, list[float]] = {}
    for _ in range(rounds * len(names)):
        name = chosen.choice(names)
        place = ours.place(name)
        samples.setdefault(place, []).append(seconds(lambda: ours.load(name)))  # noqa: B023 - called at once
    return {place: summary(values) for place, values in sorted(samples.items())}


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"count": len(ordered), "p50 s": round(statistics.median(ordered), 4), "p95 s": round(p95, 4)}


def taken(device: Device, processes: Iterable[psutil.Process]) -> float:
    """Megabytes of the device, by the one of the processes that takes most of it: the model's worker."""
    return max(device.used_by(process.pid) or 0 for process in processes) / 1e6


def copies(files: list[Path]) -> dict[str, Any]:
    """GB/s of a load and of a wake of these files, and of the plainest pinned copy of 1 GiB."""
    device = models_device()
    loaded, woken, size = 0.0, 0.0, 0
    for path in files:
        file = MappedFile(path)
        served = {name: tensor.dtype for name, tensor in file.tensors.items()}
        began = time.perf_counter()
        weights = CopiedWeights(file, served, device, keep_on_host=True)
        loaded += time.perf_counter() - began
        weights.save()
        weights.drop()
        woken += seconds(weights.restore)
        size += weights.device_bytes
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "none: a dry run on the CPU",
        "load GB/s": round(size / loaded / 1e9, 2),
        "wake GB/s": round(size / woken / 1e9, 2),
        "pinned copy GB/s": round(COPY_BYTES / pinned_copy(device) / 1e9, 2),
    }


def models_device() -> torch.device:
    return torch.device("cpu" if find_device().gpu is None else "cuda")


def pinned_copy(device: torch.device) -> float:
    """Seconds; the best of five."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return min(seconds(copy) for _ in range(5))


def dd(files: list[Path]) -> float:
    """Seconds that `dd` takes for all of them from the page cache: the better of two."""

    def read() -> None:
        for path in files:
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M"], check=True, capture_output=True)

    return min(seconds(read) for _ in range(2))


def question(name: str) -> dict[str, Any]:
    picture = {"image": reduced("dog-on-bench.png", "RGB")}
    if name == "sam":
        return picture | {"gen_args": {"point_coords": [187, 125]}}
    mask = {"mask_image": reduced("dog-on-bench-mask.jpg", "L")}
    if name == "lama":
        return picture | mask
    return picture | mask | {"prompt": "a red ball", "gen_args": {"seed": 1, "num_inference_steps": 1}}


def reduced(file: str, mode: str, size: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.open(DATA / file).convert(mode).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def medians(samples: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(sample[key] for sample in samples), 4) for key in samples[0]}


if __name__ == "__main__":
    main()
