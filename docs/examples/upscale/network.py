"""ESPCN: a convolutional network whose last layer's channels become pixels (Shi et al., 2016, arXiv:1609.05158)."""

from pathlib import Path
from typing import Any

import yaml
from torch import nn


def load_config(path: Path) -> dict[str, Any]:
    """factor and width of a config.yaml."""
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def build(config: dict[str, Any]) -> nn.Sequential:
    """Nx3xHxW -> what bicubic interpolation lacks, Nx3x(factor H)x(factor W). In evaluation mode, untrained."""
    factor, width = config["factor"], config["width"]
    return nn.Sequential(
        nn.Conv2d(3, width, 5, padding=2, padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"),
        nn.Tanh(),
        nn.Conv2d(width, 3 * factor**2, 3, padding=1, padding_mode="replicate"),
        nn.PixelShuffle(factor),
    ).eval()
