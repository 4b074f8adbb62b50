"""What the server's processes hold, idle and at work, and what a request costs the worker: a table.

    python -m bench.memory [--rounds 3] [--full-size FOLDER] [--baseline TREE]

Reported are medians: of Java, the gateway, the zygote and the workers the resident, proportional and private memory;
of a request CPU seconds (user and system), page faults, the worker's peak and what it holds afterwards.

--full-size FOLDER: SAM vit_b and big-lama with random weights, built in FOLDER (once), beside the demo models.
--baseline TREE: a checkout of another version; its server is measured in turn with this one's, in a column of its own.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil

from bench import coldstart
from bench.servers import rollup
from bench.stores import build_full_size, copy_code
from tests.serving import Server, environment, free_port, own_path, palimpsest, serving

FULL_SIZE = ["sam", "lama"]
SIDE = 512  # pixels of what full-size LaMa is given
MEMORY = {"resident": "Rss", "proportional": "Pss", "private": "Private_Dirty"}
Rows = dict[str, float]
Table = dict[str, list[float]]  # a value of each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full-size", type=Path, metavar="FOLDER")
    parser.add_argument("--baseline", type=Path, metavar="TREE")
    arguments = parser.parse_args()
    print(as_text(run(**vars(arguments))))


def run(rounds: int, full_size: Path | None, baseline: Path | None) -> dict[str, Table]:
    """Of the baseline, where there is one, and of this tree, in turn."""
    trees = {"baseline": baseline, "here": None} if baseline else {"here": None}
    built = build_full_size(full_size / "ours", FULL_SIZE) if full_size else None
    tables: dict[str, Table] = {column: defaultdict(list) for column in trees}
    for _ in range(rounds):
        for column, tree in trees.items():
            with tempfile.TemporaryDirectory() as folder:
                for row, value in measure(Path(folder), tree, built).items():
                    tables[column][row].append(value)
    return tables


def measure(folder: Path, tree: Path | None, full_size: Path | None) -> Rows:
    """Starts a server of the tree in the folder, asks one model after another, and looks at all of its processes."""
    store = build_store(folder, tree, full_size)
    models = {"demo SAM": "sam", "demo LaMa": "lama", "demo SD": "sd"}
    if full_size:
        models |= {"SAM vit_b": "full_sam", "big-lama": "full_lama"}
    with serving(folder, store, cpu_only=True, tree=tree) as server:
        rows = processes(server, "idle")
        for label, model in models.items():
            rows |= {f"{label}: {name}": value for name, value in request(server, model).items()}
        return rows | processes(server, "after these")


def build_store(folder: Path, tree: Path | None, full_size: Path | None) -> Path:
    """Archives with the tree's own code; weights of full size are linked, so they have to be on the same disk."""
    store = folder / "store"
    environ = environment(free_port(), folder, store) | own_path(tree)
    subprocess.run([*palimpsest(tree), "archives", "build"], env=environ, cwd=tree, check=True, capture_output=True)
    if full_size:
        for name in FULL_SIZE:
            shutil.copytree(full_size / name, store / f"full_{name}", copy_function=os.link)
            copy_code(store / "demo" / name, store / f"full_{name}")
    return store


def processes(server: Server, when: str) -> Rows:
    """MB; of the gateway and what it has started itself."""
    gateway = psutil.Process(server.process.pid)
    java, zygote = sorted(gateway.children(), key=lambda process: process.name() != "java")
    found = {"gateway": gateway, "Java": java, "zygote": zygote}
    return {
        f"{name}, {when}: {field} MB": value
        for name, process in found.items()
        for field, value in memory(process).items()
    }


def request(server: Server, model: str) -> Rows:
    """The first one of a model that has just been loaded, which is unloaded then."""
    server.http.post(f"/v1/models/{model}/load").raise_for_status()
    worker = server.worker(model)
    loaded = memory(worker)["private"]
    Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # the peak counts from here
    before, began = spent(worker), time.perf_counter()
    server.ask(model, **question(model))
    wall, after = time.perf_counter() - began, spent(worker)
    peak, kept = peak_memory(worker), memory(worker)
    server.http.post(f"/v1/models/{model}/unload").raise_for_status()
    return {
        **{name: after[name] - before[name] for name in after},
        "wall s": wall,
        "peak MB": peak,
        "resident MB, then": kept["resident"],
        "private MB when loaded": loaded,
        "private MB, then": kept["private"],
    }


def question(model: str) -> dict[str, Any]:
    if model != "full_lama":
        return coldstart.question(model.removeprefix("full_"))
    size = (SIDE, SIDE)
    picture = coldstart.reduced("dog-on-bench.png", "RGB", size)
    return {"image": picture, "mask_image": coldstart.reduced("dog-on-bench-mask.jpg", "L", size)}


def memory(process: psutil.Process) -> Rows:
    """MB."""
    found = rollup(process.pid)
    return {name: found[field] for name, field in MEMORY.items()}


def peak_memory(process: psutil.Process) -> float:
    """MB resident."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def spent(process: psutil.Process) -> Rows:
    """Since the process began."""
    # Field 10 of the process's stat.
    faults = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[7])
    times = process.cpu_times()
    return {"user s": times.user, "system s": times.system, "page faults / 1000": faults / 1000}


def as_text(tables: dict[str, Table]) -> str:
    """In Markdown."""
    lines = [f"| | {' | '.join(tables)} |", "|---|" + "---|" * len(tables)]
    for row in tables["here"]:
        values = [statistics.median(table[row]) for table in tables.values()]
        lines.append(f"| {row} | {' | '.join(f'{value:.4g}' for value in values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
