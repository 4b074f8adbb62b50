"""Stable Diffusion inpainting behind TorchServe: a picture, a mask and a prompt -> the object replaced."""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from handlers import imaging
from handlers.base import Handler
from handlers.imaging import RGB, Mask, SquareFit
from handlers.payload import Reply, Request
from handlers.sd.settings import Settings


class SdHandler(Handler):
    """Fields: `image`; `mask_image`, as large as the picture, white where to paint; `prompt`; `negative_prompt`;
    `gen_args` with num_inference_steps, guidance_scale, strength, seed and scheduler (see Settings).
    All but the first three are optional.

    Reply: the picture with the masked pixels repainted; all others are those of the input. `seed` is the one used.
    """

    def load(self, model_dir: Path) -> None:
        self.pipeline = StableDiffusionInpaintPipeline.from_pretrained(
            model_dir / "pipeline",
            dtype=self.dtype,
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        ).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.default_scheduler = self.pipeline.scheduler
        self.cell = self.pipeline.vae_scale_factor
        self.native = self.pipeline.unet.config.sample_size * self.cell

    def warm_up(self) -> None:
        side = self.native
        # Two steps: the second meets what the first one left in the scheduler.
        self._paint(np.zeros((side, side, 3), np.uint8), np.ones((side, side), bool), Settings("", steps=2))

    def predict(self, request: Request) -> Reply:
        picture = request.picture("image")
        mask = request.mask("mask_image", picture.size)
        settings = Settings.parse(request)
        settings.warn_of_cut(request, self.pipeline.tokenizer)

        box = imaging.context_box(mask, self.native)
        fit = SquareFit(box.width, box.height, self.native)
        canvas = self._paint(fit.put(box.of(picture.rgb)), fit.put_mask(box.of(mask)), settings)
        painted = picture.rgb.copy()
        box.of(painted)[:] = fit.take(canvas)
        return Reply(imaging.paste_back(picture, painted, mask), {"seed": settings.seed, "warnings": request.warnings})

    def _paint(self, rgb: RGB, mask: Mask, settings: Settings) -> RGB:
        """rgb native x native x 3, mask native x native -> the model's picture, uint8 of the same shape."""
        self.pipeline.scheduler = settings.make_scheduler(self.default_scheduler)
        output = self.pipeline(
            prompt=settings.prompt,
            negative_prompt=settings.negative_prompt or None,
            image=Image.fromarray(rgb),
            mask_image=Image.fromarray(imaging.grow_to_cells(mask, self.cell)),
            height=self.native,
            width=self.native,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            strength=settings.strength,
            # On the CPU, so that one seed means one picture on every device.
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            output_type="np",
        ).images[0]
        if not np.isfinite(output).all():
            raise ArithmeticError("the pipeline's output is not finite")
        return np.asarray((output * 255).round(), dtype=np.uint8)
