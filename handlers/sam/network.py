"""SAM from a YAML of dimensions: segment_anything's own modules, any size.

`vit_h.yaml`, `vit_l.yaml` and `vit_b.yaml` beside this file give the published networks (state-dict keys and
shapes as in `segment_anything.sam_model_registry`); `demo/network.yaml` gives the small one that ships with
weights.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor, nn

from handlers.sam.attention import fuse
from handlers.weights.tensors import DtypeOf, empty_network, fill, open_weights

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def load_config(path: Path) -> dict[str, Any]:
    """The dimensions in a YAML file, as `build` takes them."""
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


class Network(Sam):
    """snapped_side: pixels, the longer side of the copy of a picture in which its masks are laid on the picture's edges
    (snapping.py), as those of a coarse network are; None where they stay as they come.
    """

    snapped_side: int | None = None


def build(config: Mapping[str, Any]) -> Network:
    """A SAM in evaluation mode with fresh parameters on the current default device.

    Within `empty_network` this allocates nothing; give it its pixel statistics with `set_pixel_statistics` and its
    weights with `fill`. Raises KeyError or TypeError naming a missing or unknown key.
    """
    image_size, patch_size, dim = config["image_size"], config["patch_size"], config["embedding_dim"]
    grid = (image_size // patch_size, image_size // patch_size)
    decoder = config["mask_decoder"]
    sam = Network(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            patch_size=patch_size,
            out_chans=dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            **config["image_encoder"],
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=dim,
            image_embedding_size=grid,
            input_image_size=(image_size, image_size),
            **config["prompt_encoder"],
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(embedding_dim=dim, **decoder["transformer"]),
            iou_head_depth=decoder["iou_head_depth"],
            iou_head_hidden_dim=decoder["iou_head_hidden_dim"],
        ),
    )
    set_pixel_statistics(sam, torch.get_default_device())
    sam.snapped_side = config.get("snapped_side")
    return sam.eval()


def load(config_path: Path, weights_path: Path, encoder_dtype: torch.dtype = torch.float32) -> Network:
    """A SAM with the weights of a safetensors file, on the CPU; see `assemble`."""
    device = torch.device("cpu")
    weights = open_weights(weights_path, device, served_dtype(encoder_dtype))
    return assemble(config_path, weights.tensors, device, encoder_dtype)


def assemble(
    config_path: Path, tensors: Mapping[str, Tensor], device: torch.device, encoder_dtype: torch.dtype
) -> Network:
    """A SAM of which the tensors, on `device` and in `served_dtype`, are the parameters, without a copy.

    The image encoder computes in `encoder_dtype`; prompt encoder and mask decoder stay in float32, and so does the
    embedding between them: in half precision the decoder's masks drift. Raises RuntimeError when names or shapes are
    not the network's.
    """
    with empty_network():
        sam = build(load_config(config_path))
    fuse(sam.image_encoder)
    set_pixel_statistics(sam, device)
    fill(sam, tensors)
    _cast_around(sam.image_encoder, encoder_dtype)
    return sam


def served_dtype(encoder_dtype: torch.dtype) -> DtypeOf:
    """The dtype of each parameter, by its name."""
    return lambda name: encoder_dtype if name.startswith("image_encoder.") else torch.float32


def set_pixel_statistics(sam: Sam, device: torch.device | str) -> None:
    """Give `sam` its normalisation constants: they are in no checkpoint, and the meta device has no values."""
    sam.pixel_mean = torch.tensor(PIXEL_MEAN, device=device).view(-1, 1, 1)
    sam.pixel_std = torch.tensor(PIXEL_STD, device=device).view(-1, 1, 1)


def _cast_around(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Let an encoder with parameters in `dtype` take and return float32: its callers need not know."""
    if dtype == torch.float32:
        return
    encoder.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
    encoder.register_forward_hook(lambda _, __, output: output.float())
