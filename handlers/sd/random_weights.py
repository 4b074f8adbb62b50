"""A Stable Diffusion pipeline of random weights."""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from handlers.building.random_weights import save


def write(config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    """Reads pipeline/ of config_dir, a diffusers folder; see handlers.building.random_weights."""
    source, target = config_dir / "pipeline", out_dir / "pipeline"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"), dirs_exist_ok=True)

    def unet() -> nn.Module:
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source / "unet"))

    def vae() -> nn.Module:
        return AutoencoderKL.from_config(AutoencoderKL.load_config(source / "vae"))

    def text_encoder() -> nn.Module:
        return CLIPTextModel(CLIPTextConfig.from_pretrained(source / "text_encoder"))

    # One network at a time, each from the seed itself, so that one folder's bytes do not depend on the others.
    # transformers 4 and 5 name the text encoder's parameters differently; both read the published prefix.
    for build, file, prefix in (
        (unet, "unet/diffusion_pytorch_model.safetensors", ""),
        (vae, "vae/diffusion_pytorch_model.safetensors", ""),
        (text_encoder, "text_encoder/model.safetensors", "text_model."),
    ):
        torch.manual_seed(seed)
        save(build(), target / file, dtype, prefix)
