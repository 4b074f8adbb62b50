"""An ESPCN of random weights."""

import shutil
from pathlib import Path

import torch
from handlers.upscale import network

from handlers.building.random_weights import save


def write(config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    """Reads config.yaml of config_dir; see handlers.building.random_weights."""
    config = config_dir / "config.yaml"
    torch.manual_seed(seed)
    save(network.build(network.load_config(config)), out_dir / "weights.safetensors", dtype)
    if config.resolve().parent != out_dir.resolve():
        shutil.copy(config, out_dir)
