"""LaMa behind TorchServe: a picture and a mask -> the picture without what the mask marks."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from handlers import imaging
from handlers.base import Handler
from handlers.imaging import RGB, Mask
from handlers.lama import network
from handlers.payload import Reply, Request


class LamaHandler(Handler):
    """Fields: `image`; `mask_image`, as large as the picture, white where to erase. Anything else is ignored.

    Reply: the picture with the masked pixels filled in; all others are those of the input.
    """

    def load(self, model_dir: Path) -> None:
        with torch.device("meta"):
            self.network = network.build(network.load_config(model_dir / "config.yaml"))
        weights = load_file(model_dir / "weights.safetensors", device=str(self.device))
        self.network.load_state_dict(weights, assign=True)
        self.network.to(dtype=self.dtype).eval().requires_grad_(False)

    def warm_up(self) -> None:
        self._inpaint(np.zeros((512, 512, 3), np.uint8), np.ones((512, 512), bool))

    def predict(self, request: Request) -> Reply:
        picture = request.picture("image")
        mask = request.mask("mask_image", picture.size)
        painted = self._inpaint(picture.rgb, mask)
        return Reply(imaging.paste_back(picture, painted, mask), {"warnings": request.warnings})

    def _inpaint(self, rgb: RGB, mask: Mask) -> RGB:
        image = torch.from_numpy(rgb).to(self.device).permute(2, 0, 1)[None].to(self.dtype) / 255
        hole = torch.from_numpy(mask).to(self.device)[None, None].to(self.dtype)
        painted = network.inpaint(self.network, image, hole)[0].permute(1, 2, 0)
        return painted.mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
