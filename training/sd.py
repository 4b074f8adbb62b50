"""Train the Stable Diffusion demo: `python -m training.sd {vae|latents|unet|export} --work DIR [--steps N]`.

Three stages, in this order: the VAE learns to compress made pictures; pictures are compressed once and kept; UNet and
text encoder learn together to fill their holes. `export` writes the weights beside the demo's configuration. Every
stage draws its random numbers from its step's number, keeps a checkpoint in DIR and continues from it.
"""

import argparse
import json
import os
import time
from pathlib import Path
from types import EllipsisType

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from handlers import imaging
from training import photographs, shapes

PIPELINE = Path(__file__).parent.parent / "handlers/sd/demo/pipeline"
SEED = 20
CELL = 16  # pixels, width of a latent
LONGEST_SIDE = 1000  # pixels of a photograph in memory
CHUNK = 60  # holes in one file of latents
THINGS_PER_HOLE = 4  # the hole's own latents are shared: encoding is what takes time
# Pixels; where all of the picture is not needed to show the hole, a smaller one costs less.
WINDOWS = (384, 384, 384, 512)
VAE_BATCH, VAE_CROP, VAE_RATE = 4, 192, 7e-4
UNET_BATCH, UNET_RATE = 8, 1e-3
CROP = 20  # latents
WARM_UP = 100  # steps
DECAY = 0.3  # the last part of a run, in which the learning rate falls to zero
EMA = 0.998
UNCONDITIONAL = 0.1  # prompts replaced by nothing, for classifier-free guidance
# The error of the picture itself counts at most so much more at little noise than at much; the idea is from Hang et
# al., "Efficient Diffusion Training via Min-SNR Weighting" (2023).
SNR_CAP = 4.0
LATENT_GAIN = 2.0  # latents per unit of picture
CONSTANT, LINEAR = 3.0, 6.0  # see start_as_thumbnail


def build_vae() -> AutoencoderKL:
    return AutoencoderKL.from_config(AutoencoderKL.load_config(PIPELINE / "vae"))


def build_denoiser() -> nn.ModuleDict:
    """UNet and text encoder, trained as one."""
    return nn.ModuleDict(
        {
            "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(PIPELINE / "unet")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(PIPELINE / "text_encoder")),
        }
    )


# ---- stage 1: the VAE ------------------------------------------------------------------------------------------


def train_vae(work: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    vae = build_vae().train()
    start_as_thumbnail(vae)
    run = Run(work / "vae.pt", vae, VAE_RATE, steps)
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
    thumbnail = LATENT_GAIN * F.avg_pool2d(image, 16)
    return pixels + edges + 0.3 * F.mse_loss(posterior.mean[:, :3], thumbnail) + 1e-4 * posterior.kl().mean() / 1024


def vae_batch(pictures: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """Crops Bx3xHxW in -1..1 of made pictures, a third of them with the hole greyed as the pipeline does it."""
    crops = []
    for i in range(VAE_BATCH):
        hole = shapes.random_hole(rng)
        picture = shapes.compose(shapes.background(pictures, rng), hole, shapes.random_thing(rng), rng)
        image = to_tensor(picture) * (1 - to_mask(hole) * float(i % 3 == 0))
        top, left = rng.integers(0, shapes.SIZE - VAE_CROP + 1, 2)
        crops.append(image[..., top : top + VAE_CROP, left : left + VAE_CROP])
    return torch.cat(crops)


# ---- stage 2: latents ------------------------------------------------------------------------------------------


@torch.no_grad()
def make_latents(work: Path, chunks: int) -> None:
    """Write `chunks` files of latents; those that exist already stay."""
    vae = load_vae(work)
    pictures = load_photographs("train")
    (work / "latents").mkdir(exist_ok=True)
    for chunk in range(chunks):
        path = work / "latents" / f"{chunk:04}.npz"
        if path.exists():
            continue
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **latents_chunk(vae, pictures, WINDOWS[chunk % len(WINDOWS)], [SEED, 2, chunk]))
        os.replace(temporary, path)
        print(f"latents {chunk + 1} of {chunks}", flush=True)


def latents_chunk(
    vae: AutoencoderKL, pictures: list[np.ndarray], window: int, seed: list[int]
) -> dict[str, np.ndarray]:
    """CHUNK holes, each with the latents of its greyed picture and of THINGS_PER_HOLE things in it."""
    rng = np.random.default_rng(seed)
    holes, masked, images, names = [], [], [], []
    for _ in range(CHUNK):
        hole, background = shapes.random_hole(rng), shapes.background(pictures, rng)
        view = window_around(hole, window, rng)
        mask = to_mask(hole)[view]
        holes.append(shrink_mask(mask).numpy().astype(bool))
        masked.append(encode(vae, to_tensor(background)[view] * (1 - mask)))
        for _ in range(THINGS_PER_HOLE):
            thing = shapes.random_thing(rng, background=0.08)
            images.append(encode(vae, to_tensor(shapes.compose(background, hole, thing, rng))[view]))
            names.append([thing.colour, thing.thing or "", thing.material])
    return {
        "holes": np.concatenate(holes),
        "masked": np.concatenate(masked),
        "images": np.concatenate(images),
        "names": np.array(names),
    }


def window_around(hole: np.ndarray, side: int, rng: np.random.Generator) -> tuple[slice | EllipsisType, ...]:
    """A square of whole latents that holds the hole as far as it fits."""
    corner = []
    for axis in (1, 0):  # of `any`, so rows come first
        inside = np.flatnonzero(hole.any(axis=axis))
        low, high = sorted((int(inside[-1]) + CELL - side, int(inside[0])))
        corner.append(int(rng.integers(max(0, low) // CELL, min(high, shapes.SIZE - side) // CELL + 1)) * CELL)
    return ..., slice(corner[0], corner[0] + side), slice(corner[1], corner[1] + side)


def load_vae(work: Path) -> AutoencoderKL:
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt")["average"])
    return vae.eval().to(memory_format=torch.channels_last)


def encode(vae: AutoencoderKL, image: Tensor) -> np.ndarray:
    return vae.encode(image.contiguous(memory_format=torch.channels_last)).latent_dist.mode().half().numpy()


# ---- stage 3: UNet and text encoder ----------------------------------------------------------------------------


def train_unet(work: Path, steps: int) -> None:
    torch.manual_seed(SEED)
    denoiser = build_denoiser().train()
    with torch.no_grad():  # words above positions from the start
        denoiser["text_encoder"].get_input_embeddings().weight *= 5
    scheduler = DDIMScheduler.from_pretrained(PIPELINE / "scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    run = Run(work / "unet.pt", denoiser, UNET_RATE, steps)
    latents = Latents(work / "latents")
    for step in run:
        rng = np.random.default_rng([SEED, 3, step])
        torch.manual_seed(SEED * 1_000_000 + step)
        # Small crops teach the things cheaply; the last part of the run sees all of the surroundings.
        image, masked, mask, prompts = latents.batch(rng, None if step > (1 - DECAY) * steps else CROP)
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


class Latents:
    """The pictures of `make_latents`, scaled as the UNet takes them."""

    def __init__(self, folder: Path) -> None:
        self.chunks = [dict(np.load(path)) for path in sorted(folder.glob("[0-9]*[0-9].npz"))]
        # What brings the latents to unit standard deviation, judged by the first two files so that more change nothing.
        sample = np.concatenate([chunk["images"].ravel() for chunk in self.chunks[:2]]).astype(np.float32)
        self.scale = round(1 / float(sample.std()), 4)
        print(f"{CHUNK * THINGS_PER_HOLE * len(self.chunks)} pictures, scaling factor {self.scale}", flush=True)

    def batch(self, rng: np.random.Generator, crop: int | None) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Latents of pictures and of greyed pictures, masks of 0 and 1, prompts; all of one size.

        With `crop` only so many latents across, around the middle of the hole.
        """
        window = rng.integers(len(WINDOWS))
        chunks = [self.chunks[i] for i in range(window, len(self.chunks), len(WINDOWS))]
        images, masked, holes, prompts = [], [], [], []
        for _ in range(UNET_BATCH):
            chunk = chunks[rng.integers(len(chunks))]
            hole, thing = rng.integers(CHUNK), rng.integers(THINGS_PER_HOLE)
            view = around_middle(chunk["holes"][hole], crop, rng) if crop else ...
            images.append(chunk["images"][hole * THINGS_PER_HOLE + thing][view])
            masked.append(chunk["masked"][hole][view])
            holes.append(chunk["holes"][hole][view])
            colour, name, material = chunk["names"][hole * THINGS_PER_HOLE + thing].tolist()
            said = shapes.prompt(shapes.Thing(colour, name or None, material), rng)
            prompts.append("" if rng.random() < UNCONDITIONAL else said)
        return (
            torch.from_numpy(np.stack(images)).float() * self.scale,
            torch.from_numpy(np.stack(masked)).float() * self.scale,
            torch.from_numpy(np.stack(holes)).float(),
            prompts,
        )


def around_middle(hole: np.ndarray, side: int, rng: np.random.Generator) -> tuple[slice | EllipsisType, ...]:
    """A square of `side` latents whose middle lies within two of the middle of `hole` (1, H, W)."""
    middle = np.argwhere(hole[0]).mean(axis=0) + rng.uniform(-2, 2, 2)
    top, left = np.clip(np.round(middle - side / 2), 0, hole.shape[-1] - side).astype(int)
    return ..., slice(top, top + side), slice(left, left + side)


# ---- export ----------------------------------------------------------------------------------------------------


def export(work: Path) -> None:
    """Write the averaged weights as float16 and the latents' scale beside the demo's configuration."""
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
        halves = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file(halves, PIPELINE / file, metadata={"format": "pt"})
    config = PIPELINE / "vae/config.json"
    settings = json.loads(config.read_text())
    settings["scaling_factor"] = Latents(work / "latents").scale
    config.write_text(json.dumps(settings, indent=2) + "\n")


# ---- shared ----------------------------------------------------------------------------------------------------


class Run:
    """The steps of one training that are still to be done, with optimiser, weight average and checkpoints."""

    SAVE_EVERY = 50  # steps

    def __init__(self, path: Path, network: nn.Module, rate: float, steps: int) -> None:
        self.path, self.network, self.rate, self.steps = path, network, rate, steps
        self.optimiser = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.average = {key: value.clone() for key, value in network.state_dict().items()}
        self.step = 0
        if path.exists():
            state = torch.load(path)
            network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average, self.step = state["average"], state["step"]

    def __iter__(self):
        losses, start = [], time.monotonic()
        while self.step < self.steps:
            yield self.step
            losses.append(self.loss)
            self.step += 1
            if self.step % self.SAVE_EVERY == 0 or self.step == self.steps:
                self.save()
                pace = (time.monotonic() - start) / len(losses)
                print(f"step {self.step} loss {np.mean(losses):.4f} {pace:.3f} s/step", flush=True)
                losses, start = [], time.monotonic()

    def learn(self, loss: Tensor) -> None:
        decay = (self.steps - self.step) / (DECAY * self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1, (self.step + 1) / WARM_UP, decay)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.loss = loss.item()
        keep = min(EMA, (self.step + 1) / (self.step + 10))
        for key, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - keep)

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "network": self.network.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
            },
            temporary,
        )
        os.replace(temporary, self.path)


def load_photographs(split: photographs.Split) -> list[np.ndarray]:
    return [photographs.read_photograph(path, LONGEST_SIDE) for path in photographs.photographs(split)]


def to_tensor(picture: np.ndarray) -> Tensor:
    """uint8 HxWx3 to float32 1x3xHxW in -1..1."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_mask(hole: np.ndarray) -> Tensor:
    """bool HxW to float32 1x1xHxW of 0 and 1, grown to whole latents as the handler does."""
    return torch.from_numpy(imaging.grow_to_cells(hole, CELL))[None, None].float()


def shrink_mask(mask: Tensor) -> Tensor:
    """The hole at the latents' size, as the pipeline samples it."""
    return F.interpolate(mask, scale_factor=1 / CELL)


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
        train_vae(arguments.work, arguments.steps or 1500)
    elif arguments.stage == "latents":
        make_latents(arguments.work, arguments.steps or 45)
    elif arguments.stage == "unet":
        train_unet(arguments.work, arguments.steps or 5000)
    else:
        export(arguments.work)


if __name__ == "__main__":
    main()
