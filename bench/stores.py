"""Stores of archives for bench/coldstart.py: demo, full-size with random weights, and their stock counterparts."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from handlers.building import random_weights
from serve.archives import build

ROOT = Path(__file__).parent.parent
HANDLERS = ROOT / "handlers"
CONFIGS = {"sam": HANDLERS / "sam" / "vit_b.yaml", "lama": HANDLERS / "lama" / "big_lama.yaml"}
CONFIG_NAMES = {"sam": "network.yaml", "lama": "config.yaml"}
STOCK_HANDLER = """
from handlers.{name}.handler import {kind}
from stock import load_{name}


class Stock({kind}):
    load = load_{name}

    def warm_up(self):
        pass
"""


def build_demo(store: Path) -> Path:
    """The folder with the three demo archives."""
    build.ensure_demo(store, _say_nothing)
    return store / "demo"


def build_full_size(store: Path, models: list[str], dtype: torch.dtype = torch.float32) -> Path:
    """SAM vit_b, big-lama and SD-2; those that are there already are kept."""
    demo = build_demo(store.parent / "code")
    for name in models:
        # The code is copied last, and each time: only the weights take long.
        if not (store / name / "handler.py").exists():
            random_weights.write(
                name, _configuration(name, store.parent / "configuration"), store / name, seed=0, dtype=dtype
            )
        copy_code(demo / name, store / name)
    return store


def build_stock(ours: Path, store: Path, models: list[str]) -> None:
    """The same archives with pickled float32 checkpoints and the plain load; checkpoints that are there are kept."""
    for name in models:
        target = store / name
        for path in sorted((ours / name).rglob("*")):
            copy = target / path.relative_to(ours / name)
            if path.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
            elif path.suffix == ".safetensors":
                _pickle(path, copy)
            else:
                shutil.copy(path, copy)
        kind = f"{name.capitalize()}Handler"
        (target / "handler.py").write_text(STOCK_HANDLER.format(name=name, kind=kind))
        shutil.copy(ROOT / "bench" / "stock.py", target)


def weights_of(store: Path, name: str) -> list[Path]:
    return sorted((store / name).rglob("*.safetensors"))


def _configuration(name: str, folder: Path) -> Path:
    """A folder as random_weights takes it."""
    folder = folder / name
    if name == "sd":
        shutil.copytree(ROOT / "tests" / "data" / "sd2", folder, dirs_exist_ok=True)
        # The demo's tokenizer: its ids are all below the real vocabulary's.
        tokenizer = HANDLERS / "sd" / "demo" / "pipeline" / "tokenizer"
        shutil.copytree(tokenizer, folder / "pipeline" / "tokenizer", dirs_exist_ok=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(CONFIGS[name], folder / CONFIG_NAMES[name])
    return folder


def copy_code(archive: Path, target: Path) -> None:
    """Makes the handlers of a folder of weights those of the archive."""
    for name in ("handler.py", "model-config.yaml"):
        shutil.copy(archive / name, target / name)
    for name in ("contract", "handlers", "MAR-INF"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(archive / name, target / name)


def _pickle(source: Path, target: Path) -> None:
    """weights.safetensors -> weights.pth, diffusers' and transformers' files -> .bin."""
    stem = "pytorch_model" if source.stem == "model" else source.stem
    path = target.with_name("weights.pth" if source.stem == "weights" else f"{stem}.bin")
    if not path.exists():
        tensors = load_file(source)
        torch.save({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, path)


def _say_nothing(message: str) -> None:
    pass
