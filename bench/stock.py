"""The load that a model gets when nobody thought about it: what the original example and the libraries' READMEs do.

Copied into the stock archives, beside a handler of one class that uses it. The rest of the handler is ours, so that
both give the same answer in the same time.
"""

from pathlib import Path
from typing import Any

import torch


def load_sam(handler: Any, model_dir: Path) -> None:
    """segment_anything.build_sam: a network with random weights, the pickled ones read and copied over them."""
    from handlers.sam import network
    from handlers.sam.embeddings import Embeddings
    from handlers.sam.resize import Resize

    sam = network.build(network.load_config(model_dir / "network.yaml"))
    sam.load_state_dict(torch.load(model_dir / "weights.pth"))
    handler.model = sam.to(handler.device)
    handler.resize, handler.embeddings = Resize(sam.image_encoder.img_size), Embeddings()


def load_lama(handler: Any, model_dir: Path) -> None:
    """As LaMa's own predict.py."""
    from handlers.lama import network

    lama = network.build(network.load_config(model_dir / "config.yaml"))
    lama.load_state_dict(torch.load(model_dir / "weights.pth"))
    handler.network = lama.to(handler.device, handler.dtype)


def load_sd(handler: Any, model_dir: Path) -> None:
    """As in diffusers' README."""
    from handlers.sd import network
    from handlers.sd.pipeline import Inpainting

    def load(folder: Path, read: Any, device: torch.device) -> Inpainting:
        pipeline = Inpainting.from_pretrained(
            folder, dtype=handler.dtype, use_safetensors=False, safety_checker=None, requires_safety_checker=False
        ).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    network.load = load
    super(type(handler), handler).load(model_dir)
