"""What colours the latents of the Stable Diffusion demo have, for drafts of pictures: `python -m training.sd_colours`.

Prints `latent_colours` of handlers/sd/demo/model-config.yaml: the linear map of latents, as the UNet has them, that is
nearest in the least squares to what the VAE's own decoder makes of them, averaged over each latent's 8 x 8 pixels. The
latents are those of made pictures on the training's photographs.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from training import shapes
from training.sd_vae import CELL, PIPELINE, SEED, load_photographs, to_tensor

PICTURES = 40


@torch.no_grad()
def latent_colours(vae: AutoencoderKL, count: int) -> tuple[np.ndarray, float]:
    """(5, 3): red, green and blue of each channel, and of none; and how much of the colours' variance they explain."""
    rng, photographs = np.random.default_rng(SEED), load_photographs("train")
    latents, colours = [], []
    for _ in range(count):
        hole, thing = shapes.random_hole(rng), shapes.random_thing(rng)
        picture = shapes.compose(shapes.background(photographs, rng), hole, thing, rng)
        encoded = vae.encode(to_tensor(picture)).latent_dist.mode()
        latents.append(encoded * vae.config.scaling_factor)
        colours.append(F.avg_pool2d(vae.decode(encoded).sample.clamp(-1, 1), CELL))
    channels, wanted = (
        torch.cat(each).permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for each in (latents, colours)
    )
    channels = np.column_stack([channels, np.ones(len(channels))])
    found = np.linalg.lstsq(channels, wanted, rcond=None)[0]
    return found, 1 - float(np.var(channels @ found - wanted) / np.var(wanted))


def main() -> None:
    found, explained = latent_colours(AutoencoderKL.from_pretrained(PIPELINE / "vae").eval(), PICTURES)
    print(f"  latent_colours:  # explain {100 * explained:.1f} % of the variance")
    for row in found:
        print("    - [" + ", ".join(f"{value:.3f}" for value in row) + "]")


if __name__ == "__main__":
    main()
