"""diffusers' inpainting pipeline, without what it would compute twice or wait for."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from diffusers import StableDiffusionInpaintPipeline
from torch import Tensor, nn

from handlers.weights.kept import Kept

MAX_EMBEDDED_BYTES = 16 << 20
"""Of all texts' embeddings: about 100 of Stable Diffusion 2's in float16."""


class Inpainting(StableDiffusionInpaintPipeline):
    """Keeps what the text encoder made of texts, and, for several variants of one picture, what the autoencoder saw."""

    _seen: list[tuple[Tensor, Any]] | None = None

    @cached_property
    def _embeddings(self) -> Kept:
        return Kept(MAX_EMBEDDED_BYTES)

    def embedded(self, text: str) -> Tensor:
        """What the text encoder makes of it, 1 x tokens x width, on the device.

        Each text by itself: in a batch its rounding could depend on its neighbour.
        """
        key = hashlib.sha256(text.encode()).digest()
        if known := self._embeddings.get(key):
            return known[0].to(self.device)
        embedding: Tensor = self.encode_prompt([text], self.device, 1, False)[0]
        if bool(torch.isfinite(embedding).all()):
            self._embeddings.put(key, embedding)
        return embedding

    @contextmanager
    def seeing_once(self) -> Iterator[None]:
        """Within it no picture is shown to the autoencoder twice; each run still draws latents of its own from it."""
        self._seen = []
        try:
            yield
        finally:
            self._seen = None

    def _encode_vae_image(self, image: Tensor, generator: torch.Generator) -> Tensor:
        latents: Tensor = self._distribution(image).sample(generator)
        return self.vae.config.scaling_factor * latents

    def _distribution(self, image: Tensor) -> Any:
        for known, distribution in self._seen or ():
            if torch.equal(known, image):
                return distribution
        distribution = self.vae.encode(image).latent_dist
        if self._seen is not None:
            self._seen.append((image, distribution))
        return distribution


def keep_times_on_host(scheduler: Any) -> None:
    """The scheduler asks at every step which time it is; where times are on a GPU, each answer waits for the GPU.

    Two of them wait all the same: `unipc` solves a small system there, `euler_a` copies its noise to it.
    """
    set_timesteps = scheduler.set_timesteps

    def on_host(*arguments: Any, device: Any = None, **options: Any) -> None:
        set_timesteps(*arguments, device="cpu", **options)

    scheduler.set_timesteps = on_host


def send_time_ahead(unet: nn.Module) -> None:
    """Has the time's copy to the device not waited for, as the network itself would."""

    def sent(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        latents, time = inputs
        return latents, time.to(latents.device, non_blocking=True)

    unet.register_forward_pre_hook(sent)
