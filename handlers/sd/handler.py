"""Stable Diffusion inpainting behind TorchServe: a picture, a mask and a prompt -> the object replaced."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from handlers.editing import geometry, imaging
from handlers.editing.edit import Edit
from handlers.editing.geometry import Fit, Piece
from handlers.pictures.picture import RGB, Mask, Picture
from handlers.requests.jobs import UNWATCHED, Report, SharedProgress, Show, part
from handlers.requests.payload import Reply, Request
from handlers.sd import network
from handlers.sd.description import PROMPT, STEPS
from handlers.sd.pipeline import keep_times_on_host
from handlers.sd.preview import STABLE_DIFFUSION, Colours, Drafts, Place
from handlers.sd.seamless import cloned
from handlers.sd.settings import DEFAULT_GUIDANCE, PaintSettings
from handlers.weights.precision import first_finite, wide_copy
from handlers.worker.base import Handler


class SdHandler(Handler):
    """Takes what handlers.sd.description says.

    One crop around the whole mask is painted at the network's own size: without any scaling where the mask takes up
    to 80 % of it.

    Reply: the picture with the masked pixels repainted; all others are those of the input. `seed` and `parameters` are
    the ones used, `size` is the picture's; with variants, `variants` holds all pictures and `seeds` theirs.
    """

    def load(self, model_dir: Path) -> None:
        def read(path: Path) -> Mapping[str, Tensor]:
            return self.read_weights(path, lambda name: self.dtype)

        self.pipeline = network.load(model_dir / "pipeline", read, self.device)
        if threads := self.config.get("unet_threads"):
            network.limit_threads(self.pipeline.unet, int(threads))
        self.default_scheduler = self.pipeline.scheduler
        self.default_guidance = float(self.config.get("guidance_scale", DEFAULT_GUIDANCE))
        self.vocabulary = self.config.get("vocabulary", "").split()
        self.colours: Colours = self.config.get("latent_colours", STABLE_DIFFUSION)
        self.seamless = bool(self.config.get("seamless", False))
        self.cell = self.pipeline.vae_scale_factor
        self.native = self.pipeline.unet.config.sample_size * self.cell

    def warm_up(self) -> None:
        side = self.native
        # Two steps: the second meets what the first one left in the scheduler.
        settings = PaintSettings.parse(Request({PROMPT.name: "", "gen_args": {STEPS.name: 2}}))
        self._paint(np.zeros((side, side, 3), np.uint8), np.ones((side, side), bool), settings)

    def predict(self, request: Request) -> Reply:
        settings = PaintSettings.parse(request, self.default_guidance)
        picture = request.picture("image")
        settings.check_size(picture)
        mask = request.mask("mask_image", picture, settings.by_transparency)
        settings.warn_of_syntax(request, self.pipeline.tokenizer)
        settings.warn_of_cut(request, self.pipeline.tokenizer)
        if self.vocabulary:
            settings.warn_of_unknown(request, self.vocabulary)

        variants = [settings.of_variant(index) for index in range(settings.variants)]
        with self.pipeline.seeing_once():
            pictures = [
                self.replace(picture, mask, variant, *_part(request.job, index, len(variants)))
                for index, variant in enumerate(variants)
            ]
        fields: dict[str, Any] = {
            "seed": settings.seed,
            "parameters": settings.parameters(self.default_scheduler),
            "size": list(picture.size),
        }
        if len(variants) > 1:
            fields["seeds"] = [variant.seed for variant in variants]
        box = geometry.bounding_box(mask) if settings.patch else None
        return Reply(pictures[0], fields, request.warnings, pictures[1:], box=box, output_format=settings.output_format)

    def replace(
        self,
        picture: Picture,
        mask: Mask,
        settings: PaintSettings,
        report: Report = UNWATCHED,
        show: Show | None = None,
    ) -> Picture:
        """The picture with the masked pixels repainted as the settings say, `variants` aside; raises as _paint.

        show: where somebody wants to see drafts of it.
        """
        box = geometry.context_box(mask, self.native)
        edit = Edit(picture, mask, settings.feather)
        fit = Fit.square(box, self.native)

        def paint(rgb: RGB, hole: Mask) -> RGB:
            drafts = show and Drafts(self.colours, self.cell, Place(box, fit, hole), show)
            painted = self._paint(rgb, hole, settings, report, drafts)
            return cloned(painted, rgb, hole, self.cell) if self.seamless else painted

        edit.repaint(Piece(box, box.of(mask)), fit, paint)
        if not settings.embed_parameters:
            return edit.picture
        prompts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
        text = {"parameters": json.dumps(prompts | settings.parameters(self.default_scheduler))}
        return edit.picture._replace(metadata=picture.metadata._replace(text=text))

    def _paint(
        self,
        rgb: RGB,
        mask: Mask,
        settings: PaintSettings,
        report: Report = UNWATCHED,
        drafts: Drafts | None = None,
    ) -> RGB:
        """rgb native x native x 3, mask native x native -> the model's picture, uint8 of the same shape.

        Raises NotFinite, and what report raises.
        """
        latents = self._denoise(self.pipeline, rgb, mask, settings, report, drafts)
        attempts = [lambda: _decoded(self.pipeline.vae, latents)]
        if self.dtype != torch.float32:
            # The autoencoder is the part that overflows; a second run of all costs as much as the first.
            attempts.append(lambda: _decoded(wide_copy(self.pipeline.vae), latents))
            attempts.append(lambda: self._paint_wide(rgb, mask, settings, report, drafts))
        picture = first_finite(attempts)
        return (picture / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()

    def _paint_wide(
        self, rgb: RGB, mask: Mask, settings: PaintSettings, report: Report, drafts: Drafts | None
    ) -> Tensor:
        parts = self.pipeline.components
        wide = {name: wide_copy(each) if isinstance(each, nn.Module) else each for name, each in parts.items()}
        pipeline = type(self.pipeline)(**wide, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        return _decoded(pipeline.vae, self._denoise(pipeline, rgb, mask, settings, report, drafts))

    def _denoise(
        self, pipeline: Any, rgb: RGB, mask: Mask, settings: PaintSettings, report: Report, drafts: Drafts | None
    ) -> Tensor:
        """The finished latents, 1x4xhxw."""

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            report(step + 1, pipeline.num_timesteps)
            return tensors

        pipeline.scheduler = settings.make_scheduler(self.default_scheduler)
        keep_times_on_host(pipeline.scheduler)
        if drafts:
            drafts.watch(pipeline.scheduler)
        return pipeline(
            prompt_embeds=pipeline.embedded(settings.prompt),
            negative_prompt_embeds=pipeline.embedded(settings.negative_prompt) if settings.is_guided else None,
            image=Image.fromarray(rgb),
            mask_image=Image.fromarray(imaging.grow_to_cells(mask, self.cell)),
            height=self.native,
            width=self.native,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            strength=settings.strength,
            # On the CPU, so that one seed means one picture on every device.
            generator=torch.Generator("cpu").manual_seed(settings.seed),
            output_type="latent",
            callback_on_step_end=on_step_end,
        ).images


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents -> HxWx3 float32, of which -1 to 1 is the range of colours."""
    return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample[0].float().permute(1, 2, 0)


def _part(job: SharedProgress, index: int, count: int) -> tuple[Report, Show | None]:
    """Reports the steps of one variant, of `count`, as part of all, and shows its drafts where somebody watches."""
    return part(job.report, index, count), partial(job.show, index) if job.is_watched else None
