"""The plain script that the server is compared with: the same weights, pictures and libraries, the straightforward way.

    python -m bench.baseline STORE

STORE holds archives, as bench/stores.py builds them. One process, no server, one request after the other: a line of
JSON on standard input is a request, a line on standard output its answer, when the picture that it made is written.

    {"do": "click", "image": "dog.png", "points": [[750, 500]], "out": "mask.png"}
    {"do": "erase", "image": "dog.png", "mask": "mask.png", "out": "erased.png"}
    {"do": "replace", "image": "dog.png", "mask": "mask.png", "prompt": "...", "steps": 25, "seed": 7, "out": "..."}

A model is loaded by its first request. What each library's README does is done here, no more: SamPredictor keeps the
picture that it has seen; LaMa gets the whole picture, padded to a multiple of 8, as its predict.py does; Stable
Diffusion gets the whole picture at the network's size, and its answer is scaled back. All in single precision.
"""

import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file
from segment_anything import SamPredictor
from torch.nn import functional as F

from handlers.lama import network as lama_network
from handlers.sam import network as sam_network

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Models:
    def __init__(self, store: Path) -> None:
        self._store, self._shown = store, ""

    @cached_property
    def predictor(self) -> SamPredictor:
        model = sam_network.build(sam_network.load_config(self._store / "sam" / "network.yaml"))
        model.load_state_dict(_weights(self._store / "sam"))
        return SamPredictor(model.to(DEVICE))

    @cached_property
    def lama(self) -> torch.nn.Module:
        network = lama_network.build(lama_network.load_config(self._store / "lama" / "config.yaml"))
        network.load_state_dict(_weights(self._store / "lama"))
        return network.to(DEVICE)

    @cached_property
    def pipeline(self) -> Any:
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(
            self._store / "sd" / "pipeline", safety_checker=None, requires_safety_checker=False
        ).to(DEVICE)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def click(self, image: str, points: list[list[int]]) -> Image.Image:
        if image != self._shown:
            self.predictor.set_image(_rgb(image))
            self._shown = image
        labels = np.ones(len(points), np.int64)
        masks, scores, _ = self.predictor.predict(np.array(points), labels, multimask_output=len(points) == 1)
        return Image.fromarray(masks[scores.argmax()])

    def erase(self, image: str, mask: str) -> Image.Image:
        picture, hole = _rgb(image), _hole(mask)
        height, width = hole.shape
        shown = torch.from_numpy(picture).to(DEVICE).permute(2, 0, 1)[None].float() / 255
        marked = torch.from_numpy(hole).to(DEVICE)[None, None].float()
        inputs = torch.cat((shown * (1 - marked), marked), dim=1)
        inputs = F.pad(inputs, (0, -width % 8, 0, -height % 8), mode="reflect")
        painted = self.lama(inputs)[0, :, :height, :width].permute(1, 2, 0)
        filled = (painted * 255).clamp(0, 255).byte().cpu().numpy()
        return Image.fromarray(np.where(hole[..., None], filled, picture))

    def replace(self, image: str, mask: str, prompt: str, steps: int, seed: int) -> Image.Image:
        picture, hole = Image.fromarray(_rgb(image)), Image.fromarray(_hole(mask))
        side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        painted = self.pipeline(
            prompt=prompt,
            image=picture.resize((side, side), Image.Resampling.LANCZOS),
            mask_image=hole.resize((side, side), Image.Resampling.NEAREST),
            height=side,
            width=side,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        return Image.composite(painted.resize(picture.size, Image.Resampling.LANCZOS), picture, hole)


def _weights(archive: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(archive / "weights.safetensors").items()}


def _rgb(path: str) -> Any:
    return np.asarray(Image.open(path).convert("RGB"))


def _hole(path: str) -> Any:
    return np.asarray(Image.open(path).convert("L")) >= 128


@torch.inference_mode()
def main() -> None:
    models = Models(Path(sys.argv[1]))
    print("{}", flush=True)  # the libraries are imported
    for line in sys.stdin:
        request = json.loads(line)
        work, out = getattr(models, request.pop("do")), request.pop("out")
        work(**request).save(out)
        print("{}", flush=True)


if __name__ == "__main__":
    main()
