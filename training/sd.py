"""Train the Stable Diffusion demo: `python -m training.sd {vae|latents|unet|export} --work DIR [--steps N]`.

Three stages, in this order: the VAE learns to compress made pictures; pictures are compressed once and kept; UNet and
text encoder learn together to fill their holes. `export` writes the weights beside the demo's configuration. Every
stage draws its random numbers from its step's number, keeps a checkpoint in DIR and continues from it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.sd_latents import Latents, make_latents
from training.sd_run import Run
from training.sd_vae import PIPELINE, SEED, train_vae

BATCH, RATE = 8, 1e-3
CROP = 20  # latents
WHOLE = 0.15  # the last part of the UNet's run, which sees all of the surroundings
# The error of the picture itself counts at most so much more at little noise than at much; the idea is from Hang et
# al., "Efficient Diffusion Training via Min-SNR Weighting" (2023).
SNR_CAP = 4.0


def train_unet(work: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    denoiser = build_denoiser().train()
    with torch.no_grad():  # words above positions from the start
        denoiser["text_encoder"].get_input_embeddings().weight *= 5
    scheduler = DDIMScheduler.from_pretrained(PIPELINE / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    run = Run(work / "unet.pt", denoiser, RATE, steps)
    latents = Latents(work / "latents")
    for step in run:
        rng = np.random.default_rng([SEED, 3, step])
        torch.manual_seed(SEED * 1_000_000 + step)
        # Small crops teach the things cheaply.
        image, masked, mask, prompts = latents.batch(rng, BATCH, None if step > (1 - WHOLE) * steps else CROP)
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        run.learn(unet_loss(denoiser, scheduler, image, masked, mask, tokens))


def unet_loss(
    denoiser: nn.ModuleDict, scheduler: DDIMScheduler, image: Tensor, masked: Tensor, mask: Tensor, tokens: Tensor
) -> Tensor:
    """Squared error of the predicted velocity, chiefly in and around the hole: the rest is pasted back anyway."""
    noise, t = torch.randn_like(image), random_times(len(image))
    inputs = torch.cat([scheduler.add_noise(image, noise, t), mask, masked], dim=1)
    text = denoiser["text_encoder"](tokens).last_hidden_state
    velocity = denoiser["unet"](inputs, t, text).sample
    error = (velocity - scheduler.get_velocity(image, noise, t)).square().mean(dim=1, keepdim=True)
    signal = scheduler.alphas_cumprod[t]
    emphasis = (SNR_CAP * (1 - signal)).clamp(max=1).view(-1, 1, 1, 1)
    where = F.max_pool2d(mask, 3, stride=1, padding=1).clamp(min=0.05)
    return (error * emphasis * where).sum() / where.sum()


def random_times(count: int) -> Tensor:
    """Noisy times oftener, as colour, thing and place are decided there; every seventh pure noise, the first step."""
    times = (1000 * torch.rand(count).sqrt()).long()
    return torch.where(torch.rand(count) < 1 / 7, 999, times)


def build_denoiser() -> nn.ModuleDict:
    """UNet and text encoder, trained as one."""
    return nn.ModuleDict(
        {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(PIPELINE / "unet")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(PIPELINE / "text_encoder")),
        }
    )


def export(work: Path) -> None:
    """Write the averaged weights and the latents' scale beside the demo's configuration.

    As float32: a CPU serves them as they lie in the file, without a copy of its own.
    """
    average = torch.load(work / "unet.pt")["average"]
    vae = torch.load(work / "vae.pt")["average"]
    unet = {k.removeprefix("unet."): v for k, v in average.items() if k.startswith("unet.")}
    # The published prefix, which transformers 4 and 5 both read.
    text = {
        "text_model." + k.removeprefix("text_encoder.").removeprefix("text_model."): v
        for k, v in average.items()
        if k.startswith("text_encoder.")
    }
    for tensors, file in (
        (unet, "unet/diffusion_pytorch_model.safetensors"),
        (vae, "vae/diffusion_pytorch_model.safetensors"),
        (text, "text_encoder/model.safetensors"),
    ):
        save_file({k: v.contiguous() for k, v in tensors.items()}, PIPELINE / file, metadata={"format": "pt"})
    config = PIPELINE / "vae/config.json"
    settings = json.loads(config.read_text())
    settings["scaling_factor"] = Latents(work / "latents").scale
    config.write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.sd", description=__doc__)
    parser.add_argument("stage", choices=["vae", "latents", "unet", "export"])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and latents")
    parser.add_argument("--steps", type=int, help="steps of vae or unet, files of latents")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "vae":
        train_vae(arguments.work, arguments.steps or 2000)
    elif arguments.stage == "latents":
        make_latents(arguments.work, arguments.steps or 80)
    elif arguments.stage == "unet":
        train_unet(arguments.work, arguments.steps or 26_000)
    else:
        export(arguments.work)


if __name__ == "__main__":
    main()
