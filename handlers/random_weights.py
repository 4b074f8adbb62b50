"""Checkpoints with seeded random weights.

`python -m handlers.random_weights {sam|lama|sd} CONFIG_DIR OUT_DIR --seed N [--dtype float16]`

They let every part of the product run where no trained weights are at hand, at demo size and at full size.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def write(model: str, config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Write the checkpoint files of `model` to `out_dir`, as its handler loads them.

    `config_dir` describes the architecture: `network.yaml` for "sam", `config.yaml` for "lama", a diffusers folder
    `pipeline/` for "sd"; it is copied beside the weights. Parameters are drawn as the architecture initialises them,
    then stored in `dtype`. The same seed gives the same bytes. Raises KeyError for an unknown model and
    FileNotFoundError where `config_dir` lacks its configuration.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    WRITERS[model](config_dir, out_dir, seed, dtype)


def _write_sam(config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    from handlers.sam import network

    path = config_dir / "network.yaml"
    torch.manual_seed(seed)
    _save(network.build(network.load_config(path)), out_dir / "weights.safetensors", dtype)
    _copy(path, out_dir)


def _write_lama(config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    from handlers.lama import network

    path = config_dir / "config.yaml"
    torch.manual_seed(seed)
    _save(network.build(network.load_config(path)), out_dir / "weights.safetensors", dtype)
    _copy(path, out_dir)


def _write_sd(config_dir: Path, out_dir: Path, seed: int, dtype: torch.dtype) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

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
        _save(build(), target / file, dtype, prefix)


def _save(network: nn.Module, path: Path, dtype: torch.dtype, prefix: str = "") -> None:
    tensors = {
        prefix + key.removeprefix(prefix): (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in network.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def _copy(path: Path, out_dir: Path) -> None:
    if path.resolve().parent != out_dir.resolve():
        shutil.copy(path, out_dir)


WRITERS: dict[str, Callable[[Path, Path, int, torch.dtype], None]] = {
    "sam": _write_sam,
    "lama": _write_lama,
    "sd": _write_sd,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m handlers.random_weights", description=write.__doc__)
    parser.add_argument("model", choices=WRITERS)
    parser.add_argument("config_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    write(arguments.model, arguments.config_dir, arguments.out_dir, arguments.seed, DTYPES[arguments.dtype])


if __name__ == "__main__":
    main()
