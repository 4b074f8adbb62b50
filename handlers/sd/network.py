"""The inpainting pipeline of a diffusers folder, its networks filled with tensors that need no copy.

`StableDiffusionInpaintPipeline.from_pretrained` gives the same, but takes several times as long for a small model, and
on a GPU allocates and copies every tensor by itself. What it does to a checkpoint's names is done here, too.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from handlers.sd.pipeline import Inpainting, send_time_ahead
from handlers.weights.tensors import empty_network, fill

# A safetensors file's tensors, on the device and in the dtype in which they are served.
Read = Callable[[Path], Mapping[str, Tensor]]

# The autoencoder's attention as the first releases named it, which the published files still do.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load(folder: Path, read: Read, device: torch.device) -> Inpainting:
    """Raises OSError for a missing file and RuntimeError where weights and configuration don't fit together."""
    with empty_network():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    positions = text_encoder.config.max_position_embeddings
    text_encoder.embeddings.position_ids = torch.arange(positions, device=device)[None]

    fill(unet, read(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    fill(vae, _with_new_names(read(folder / "vae" / "diffusion_pytorch_model.safetensors")))
    fill(text_encoder, _without_prefix(read(folder / "text_encoder" / "model.safetensors")))
    if device.type == "cpu":
        for coder in (vae.encoder, vae.decoder):
            coder.register_forward_pre_hook(_with_channels_last)

    send_time_ahead(unet)

    pipeline = Inpainting(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=_scheduler(folder),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def limit_threads(module: nn.Module, threads: int) -> None:
    """Lets the module compute with so many threads, whatever computes outside it with."""
    usual = torch.get_num_threads()
    module.register_forward_pre_hook(lambda *_: torch.set_num_threads(threads))
    module.register_forward_hook(lambda *_: torch.set_num_threads(usual), always_call=True)


def _with_channels_last(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Takes a third less time on a CPU; all that the module computes from it keeps the layout."""
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


def _scheduler(folder: Path) -> diffusers.SchedulerMixin:
    _, name = json.loads((folder / "model_index.json").read_text())["scheduler"]
    return getattr(diffusers, name).from_pretrained(folder / "scheduler")


def _with_new_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_new_name(name): tensor for name, tensor in tensors.items()}


def _new_name(name: str) -> str:
    head, _, parameter = name.rpartition(".")
    block, _, layer = head.rpartition(".")
    return f"{block}.{OLD_ATTENTION[layer]}.{parameter}" if ".attentions." in name and layer in OLD_ATTENTION else name


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as transformers 5 has them. Older files also hold the position ids, which are no weights."""
    named = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    named.pop("embeddings.position_ids", None)
    return named
