"""A SAM of random weights."""

from pathlib import Path

import torch
from torch import nn

from handlers.building.random_weights import write_one
from handlers.sam import network


def write(config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    """Reads network.yaml of config_dir; see handlers.building.random_weights."""
    write_one(config_dir / "network.yaml", _build, out_dir, seed, dtype)


def _build(config: Path) -> nn.Module:
    return network.build(network.load_config(config))
