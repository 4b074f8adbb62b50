"""A SAM of random weights."""

import shutil
from pathlib import Path

import torch

from handlers.building.random_weights import save
from handlers.sam import network


def write(config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    """Reads network.yaml of config_dir; see handlers.building.random_weights."""
    config = config_dir / "network.yaml"
    torch.manual_seed(seed)
    save(network.build(network.load_config(config)), out_dir / "weights.safetensors", dtype)
    if config.resolve().parent != out_dir.resolve():
        shutil.copy(config, out_dir)
