"""An upscaler behind TorchServe: a picture -> the same, larger."""

from pathlib import Path

import cv2
import numpy as np
import torch
from handlers.upscale import network
from handlers.upscale.description import DETAIL

from handlers.pictures.picture import RGB, Samples, from_rgb
from handlers.requests.fields import IMAGE, OUTPUT_FORMAT
from handlers.requests.payload import Request
from handlers.requests.reply import OUTPUT_FORMATS, Reply
from handlers.weights.tensors import empty_network, fill
from handlers.worker.base import Handler


class UpscaleHandler(Handler):
    """Takes what handlers.upscale.description says. Reply: the picture, `factor` times as large."""

    def load(self, model_dir: Path) -> None:
        config = network.load_config(model_dir / "config.yaml")
        with empty_network():
            self.network = network.build(config)
        fill(self.network, self.read_weights(model_dir / "weights.safetensors", lambda name: self.dtype))
        self.factor = config["factor"]

    def warm_up(self) -> None:
        self._detail(np.zeros((512, 512, 3), np.uint8))

    def predict(self, request: Request) -> Reply:
        picture = request.picture(IMAGE.name)
        arguments = request.arguments()
        detail = arguments.number(DETAIL)
        output_format = OUTPUT_FORMATS[arguments.choice(OUTPUT_FORMAT)]
        arguments.finish()

        enlarged = self._interpolated(picture.rgb).astype(np.float32) + detail * self._detail(picture.rgb)
        samples = from_rgb(np.clip(np.rint(enlarged), 0, 255).astype(np.uint8), like=picture.samples)
        alpha = None if picture.alpha is None else self._interpolated(picture.alpha)
        reply = picture._replace(samples=samples, alpha=alpha)
        return Reply(reply, warnings=request.warnings, output_format=output_format)

    def _interpolated(self, samples: Samples) -> Samples:
        """HxW or HxWx3 -> factor times as high and wide, of the same dtype."""
        size = samples.shape[1] * self.factor, samples.shape[0] * self.factor
        return np.asarray(cv2.resize(samples, size, interpolation=cv2.INTER_CUBIC))

    def _detail(self, rgb: RGB) -> np.ndarray:
        """HxWx3 uint8 -> grey levels to add to the enlarged picture, float32."""
        pixels = torch.from_numpy(rgb).to(self.device).permute(2, 0, 1)[None].to(self.dtype) / 255
        return (self.network(pixels)[0].permute(1, 2, 0).float() * 255).cpu().numpy()
