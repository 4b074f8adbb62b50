"""Made pictures as latents on disk: compressed once, met many times by the Stable Diffusion demo's UNet."""

import os
from pathlib import Path
from types import EllipsisType

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training import shapes
from training.sd_vae import CELL, SEED, load_photographs, load_vae, to_mask, to_tensor

CHUNK = 60  # holes in one file of latents
THINGS_PER_HOLE = 4  # the hole's own latents are shared: encoding is what takes time
# Pixels; where all of the picture is not needed to show the hole, a smaller one costs less.
WINDOWS = (192, 192, 192, 256)
UNCONDITIONAL = 0.1  # prompts replaced by nothing, for classifier-free guidance


class Latents:
    """The pictures of `make_latents`, scaled as the UNet takes them."""

    def __init__(self, folder: Path) -> None:
        self.chunks = [dict(np.load(path)) for path in sorted(folder.glob("[0-9]*[0-9].npz"))]
        # What brings the latents to unit standard deviation, judged by the first two files so that more change nothing.
        sample = np.concatenate([chunk["images"].ravel() for chunk in self.chunks[:2]]).astype(np.float32)
        self.scale = round(1 / float(sample.std()), 4)
        print(f"{CHUNK * THINGS_PER_HOLE * len(self.chunks)} pictures, scaling factor {self.scale}", flush=True)

    def batch(self, rng: np.random.Generator, size: int, crop: int | None) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """`size` latents of pictures and of greyed pictures, masks of 0 and 1, prompts; all of one size.

        With `crop` only so many latents across, around the middle of the hole.
        """
        window = rng.integers(len(WINDOWS))
        chunks = [self.chunks[i] for i in range(window, len(self.chunks), len(WINDOWS))]
        images, masked, holes, prompts = [], [], [], []
        for _ in range(size):
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


def encode(vae: AutoencoderKL, image: Tensor) -> np.ndarray:
    return vae.encode(image.contiguous(memory_format=torch.channels_last)).latent_dist.mode().half().numpy()


def shrink_mask(mask: Tensor) -> Tensor:
    """The hole at the latents' size, as the pipeline samples it."""
    return F.interpolate(mask, scale_factor=1 / CELL)
