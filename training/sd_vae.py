"""The Stable Diffusion demo's VAE: how it starts, what it learns, and pictures as it takes them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from handlers.editing import imaging
from training import photographs, shapes
from training.sd_run import Run

PIPELINE = Path(__file__).parent.parent / "handlers/sd/demo/pipeline"
SEED = 20
CELL = 8  # pixels, width of a latent
LONGEST_SIDE = 1000  # pixels of a photograph in memory
BATCH, CROP, RATE = 12, 96, 4e-4
LATENT_GAIN = 2.0  # latents per unit of picture
CONSTANT, LINEAR = 3.0, 6.0  # see start_as_thumbnail


def train_vae(work: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    vae = build_vae().train()
    start_as_thumbnail(vae)
    run = Run(work / "vae.pt", vae, RATE, steps)
    pictures = load_photographs("train")
    for step in run:
        image = vae_batch(pictures, np.random.default_rng([SEED, 1, step]))
        run.learn(vae_loss(vae, image))


@torch.no_grad()
def start_as_thumbnail(vae: AutoencoderKL) -> None:
    """Give the VAE weights that shrink the picture by averaging and enlarge it by interpolation.

    Three channels carry the picture past all residual branches, which start at zero. Two more carry the constants
    +-CONSTANT, so that the normalisation over all channels divides by nearly the same number whatever the picture
    is. From here a thousand steps sharpen what else would take a hundred thousand to learn.
    """
    carried = 5
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, carried, torch.ones(1, 1))
        elif isinstance(module, Downsample2D):
            _carry(module.conv, carried, F.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1)))
        elif isinstance(module, Upsample2D):
            _carry(module.conv, 3, torch.outer(*[torch.tensor([1, 2, 1]) / 4] * 2))
            _carry(module.conv, carried, torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]), first=3)
    for coder, gain in ((vae.encoder, LATENT_GAIN), (vae.decoder, 1 / LATENT_GAIN)):
        _carry(coder.conv_in, 3, torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))
        nn.init.zeros_(coder.conv_in.weight[3:carried])
        coder.conv_in.bias[:carried] = torch.tensor([0, 0, 0, CONSTANT, -CONSTANT])
        # Far from zero, SiLU is the identity; the two constants tell the mean that was subtracted.
        nn.init.constant_(coder.conv_norm_out.bias, LINEAR)
        deviation = CONSTANT * (2 / coder.conv_norm_out.num_channels) ** 0.5
        _carry(coder.conv_out, 3, torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]) * gain * deviation)
        coder.conv_out.weight[:3, 3:carried, 1, 1] = -gain * deviation / 2
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.zeros_(convolution.bias)
        nn.init.zeros_(convolution.weight)
        convolution.weight[:4, :4, 0, 0] = torch.eye(4)
    vae.quant_conv.bias[4:] = -5  # little noise in the latents


def _carry(convolution: nn.Conv2d, last: int, kernel: Tensor, first: int = 0) -> None:
    """Let channels first..last pass through `kernel`, each by itself, and nothing mix into them."""
    nn.init.zeros_(convolution.weight[first:last])
    nn.init.zeros_(convolution.bias[first:last])
    for channel in range(first, last):
        convolution.weight[channel, channel] = kernel


def vae_loss(vae: AutoencoderKL, image: Tensor) -> Tensor:
    """Absolute error at three scales, of edges, and of three latent channels against the shrunken picture.

    Tying the latents to the picture itself makes them smooth and easy to denoise, and gives the encoder its direction
    from the first step.
    """
    posterior = vae.encode(image).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - image
    pixels = error.abs().mean() + F.avg_pool2d(error, 4).abs().mean() + F.avg_pool2d(error, 16).abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    thumbnail = LATENT_GAIN * F.avg_pool2d(image, CELL)
    return pixels + edges + 0.3 * F.mse_loss(posterior.mean[:, :3], thumbnail) + 1e-4 * posterior.kl().mean() / 1024


def vae_batch(pictures: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """Crops Bx3xHxW in -1..1 of made pictures, a third of them with the hole greyed as the pipeline does it."""
    crops = []
    for i in range(BATCH):
        hole = shapes.random_hole(rng)
        picture = shapes.compose(shapes.background(pictures, rng), hole, shapes.random_thing(rng), rng)
        image = to_tensor(picture) * (1 - to_mask(hole) * float(i % 3 == 0))
        top, left = rng.integers(0, shapes.SIZE - CROP + 1, 2)
        crops.append(image[..., top : top + CROP, left : left + CROP])
    return torch.cat(crops)


def load_vae(work: Path) -> AutoencoderKL:
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt")["average"])
    return vae.eval().to(memory_format=torch.channels_last)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL.from_config(AutoencoderKL.load_config(PIPELINE / "vae"))


def load_photographs(split: photographs.Split) -> list[np.ndarray]:
    return [photographs.read_photograph(path, LONGEST_SIDE) for path in photographs.photographs(split)]


def to_tensor(picture: np.ndarray) -> Tensor:
    """uint8 HxWx3 to float32 1x3xHxW in -1..1."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_mask(hole: np.ndarray) -> Tensor:
    """bool HxW to float32 1x1xHxW of 0 and 1, grown to whole latents as the handler does."""
    return torch.from_numpy(imaging.grow_to_cells(hole, CELL))[None, None].float()
