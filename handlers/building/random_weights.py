"""Checkpoints with seeded random weights.

`python -m handlers.building.random_weights MODEL CONFIG_DIR OUT_DIR --seed N [--dtype float16]`

They let every part of the product run where no trained weights are at hand, at demo size and at full size. How a
model's are drawn is in handlers/<model>/random_weights.py.
"""

import argparse
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import torch
from safetensors.torch import save_file
from torch import nn

from contract.description import Description

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def write(model: str, config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Writes the checkpoint files of `model` to `out_dir`, as its handler loads them.

    `config_dir` describes the architecture; what it holds of that is copied beside the weights. Parameters are drawn as
    the architecture initialises them, then stored in `dtype`. The same seed gives the same bytes. Raises
    ModuleNotFoundError for an unknown model and FileNotFoundError where `config_dir` lacks its configuration.
    """
    description: Description = import_module(f"handlers.{model}.description").DESCRIPTION
    out_dir.mkdir(parents=True, exist_ok=True)
    resolve_name(description.random_weights)(config_dir, out_dir, seed, dtype)


def write_one(config: Path, build: Callable[[Path], nn.Module], out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    """Draws weights.safetensors for the one network that `build` makes of a configuration, and copies that, too."""
    torch.manual_seed(seed)
    save(build(config), out_dir / "weights.safetensors", dtype)
    if config.resolve().parent != out_dir.resolve():
        shutil.copy(config, out_dir)


def save(network: nn.Module, path: Path, dtype: torch.dtype, prefix: str = "") -> None:
    """A network's state as safetensors; prefix: of every key, added where it is not there yet."""
    tensors = {
        prefix + key.removeprefix(prefix): (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in network.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m handlers.building.random_weights", description=write.__doc__)
    parser.add_argument("model", help="a folder of handlers/ with a description")
    parser.add_argument("config_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    write(arguments.model, arguments.config_dir, arguments.out_dir, arguments.seed, DTYPES[arguments.dtype])


if __name__ == "__main__":
    main()
