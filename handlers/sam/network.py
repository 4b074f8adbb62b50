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
from safetensors import safe_open
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def load_config(path: Path) -> dict[str, Any]:
    """The dimensions in a YAML file, as `build` takes them."""
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    return config


def build(config: Mapping[str, Any]) -> Sam:
    """A SAM in evaluation mode with fresh parameters on the current default device.

    Under `torch.device("meta")` this allocates nothing; give it tensors with `load_state_dict(..., assign=True)`
    and its pixel statistics with `set_pixel_statistics`. Raises KeyError or TypeError naming a missing or unknown
    key.
    """
    image_size, patch_size, dim = config["image_size"], config["patch_size"], config["embedding_dim"]
    grid = (image_size // patch_size, image_size // patch_size)
    decoder = config["mask_decoder"]
    sam = Sam(
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
    return sam.eval()


def load(
    config_path: Path,
    weights_path: Path,
    device: torch.device | str = "cpu",
    encoder_dtype: torch.dtype = torch.float32,
) -> Sam:
    """A SAM with the weights of a safetensors file, ready to predict on `device`.

    Each tensor goes from the file straight to its place: no random initialisation, no second copy. The image
    encoder computes in `encoder_dtype`; prompt encoder and mask decoder stay in float32, and so does the embedding
    between them: in half precision the decoder's masks drift. Raises RuntimeError when the file's keys or shapes
    are not the network's.
    """
    with torch.device("meta"):
        sam = build(load_config(config_path))
    sam.load_state_dict(_read_weights(weights_path, device, encoder_dtype), assign=True)
    set_pixel_statistics(sam, device)
    _cast_around(sam.image_encoder, encoder_dtype)
    return sam.requires_grad_(False)


def set_pixel_statistics(sam: Sam, device: torch.device | str) -> None:
    """Give `sam` its normalisation constants: they are in no checkpoint, and the meta device has no values."""
    sam.pixel_mean = torch.tensor(PIXEL_MEAN, device=device).view(-1, 1, 1)
    sam.pixel_std = torch.tensor(PIXEL_STD, device=device).view(-1, 1, 1)


def _read_weights(path: Path, device: torch.device | str, encoder_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt", device=str(device)) as weights:
        return {
            key: weights.get_tensor(key).to(encoder_dtype if key.startswith("image_encoder.") else torch.float32)
            for key in weights.keys()  # noqa: SIM118 - not a dict
        }


def _cast_around(encoder: nn.Module, dtype: torch.dtype) -> None:
    """Let an encoder with parameters in `dtype` take and return float32: its callers need not know."""
    if dtype == torch.float32:
        return
    encoder.register_forward_pre_hook(lambda _, inputs: tuple(x.to(dtype) for x in inputs))
    encoder.register_forward_hook(lambda _, __, output: output.float())
