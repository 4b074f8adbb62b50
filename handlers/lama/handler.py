"""LaMa behind TorchServe: a picture and a mask -> the picture without what the mask marks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from handlers.editing import geometry
from handlers.editing.edit import Edit
from handlers.editing.geometry import Fit
from handlers.lama import network
from handlers.lama.description import QUALITY
from handlers.pictures.picture import RGB, Mask, Picture
from handlers.requests.fields import FEATHER, OUTPUT_FORMAT, PATCH, RESULT
from handlers.requests.jobs import UNWATCHED, Report, part
from handlers.requests.payload import Reply, Request
from handlers.requests.reply import OUTPUT_FORMATS
from handlers.weights.precision import first_finite, wide_copy
from handlers.weights.tensors import empty_network, fill
from handlers.worker.base import Handler

# The longest side that the network sees at once. Full-size LaMa takes 1 to 1.1 kB per pixel in float32 besides its
# weights: 0.3 GB at 512 x 512, 4.1 GB at 2048 x 2048. Larger holes would gain nothing: it was trained on 256 x 256.
NATIVE_SIDE = 2048
# Pixels around a hole that the network sees. docs/erasing.md shows what more of them would cost and bring.
CONTEXT = 128
NOT_REFINED = (
    "gen_args.quality had no effect: the picture or what is to be erased is too small to be refined, or the model is"
)

Paint = Callable[[Report, RGB, Mask], RGB]


class LamaHandler(Handler):
    """Takes what handlers.lama.description says. `handler.native_side` in model-config.yaml replaces NATIVE_SIDE.

    No feather by default: a mask often ends at the object's very rim, and fading would bring the rim back.

    Reply: the picture with the masked pixels filled in; all others are those of the input.
    """

    def load(self, model_dir: Path) -> None:
        with empty_network():
            self.network = network.build(network.load_config(model_dir / "config.yaml"))
        # Refinement needs gradients, for which tensors made in inference mode can't be used.
        with torch.inference_mode(False), torch.no_grad():
            fill(self.network, self.read_weights(model_dir / "weights.safetensors", lambda name: self.dtype))

    def warm_up(self) -> None:
        self._inpaint(np.zeros((512, 512, 3), np.uint8), np.ones((512, 512), bool))

    def predict(self, request: Request) -> Reply:
        picture = request.picture("image")
        arguments = request.arguments()
        best = arguments.choice(QUALITY) == "best"
        output_format = OUTPUT_FORMATS[arguments.choice(OUTPUT_FORMAT)]
        mask = request.mask("mask_image", picture)
        feather = arguments.integer(FEATHER)
        box = geometry.bounding_box(mask) if arguments.choice(RESULT) == PATCH else None
        arguments.finish()

        if best:
            erased, refined = self.erase_finely(picture, mask, feather, request.job.report)
            request.warnings += [] if refined else [NOT_REFINED]
        else:
            erased = self.erase(picture, mask, feather, request.job.report)
        return Reply(erased, warnings=request.warnings, box=box, output_format=output_format)

    def erase(self, picture: Picture, mask: Mask, feather: int = 0, report: Report = UNWATCHED) -> Picture:
        """The picture with the masked pixels filled in; report is told (pieces done, pieces)."""
        return self._edited(picture, mask, feather, report, self._paint)

    def erase_finely(
        self, picture: Picture, mask: Mask, feather: int = 0, report: Report = UNWATCHED
    ) -> tuple[Picture, bool]:
        """Does as erase does, with wide holes refined, and says whether any was; report is told of every step."""
        # Its libraries take half a second to import: only those wait who ask for it.
        from handlers.lama.refinement import refine

        net = self.network if self.dtype == torch.float32 else wide_copy(self.network)
        refined: list[bool] = []

        def paint(report: Report, rgb: RGB, hole: Mask) -> RGB:
            image, unknown = self._tensors(rgb, hole)
            painted = refine(net, image.float() / 255, unknown.float(), report)
            refined.append(painted is not None)
            if painted is None:
                return self._paint(report, rgb, hole)
            return _as_rgb(first_finite([lambda: painted]))

        return self._edited(picture, mask, feather, report, paint), any(refined)

    def _edited(self, picture: Picture, mask: Mask, feather: int, report: Report, paint: Paint) -> Picture:
        native = int(self.config.get("native_side", NATIVE_SIDE))
        pieces = geometry.pieces(mask, native, min(CONTEXT, native // 8))
        edit = Edit(picture, mask, feather)
        report(0, len(pieces))
        for index, piece in enumerate(pieces):
            edit.repaint(piece, Fit.within(piece.box, native), partial(paint, part(report, index, len(pieces))))
        return edit.picture

    def _paint(self, report: Report, rgb: RGB, mask: Mask) -> RGB:
        painted = self._inpaint(rgb, mask)
        report(1, 1)
        return painted

    def _inpaint(self, rgb: RGB, mask: Mask) -> RGB:
        """HxWx3 uint8 and what is unknown of it -> the network's picture, HxWx3 uint8; raises NotFinite."""
        image, hole = self._tensors(rgb, mask)

        def run(net: nn.Module, dtype: torch.dtype) -> Tensor:
            return network.inpaint(net, image.to(dtype) / 255, hole.to(dtype))

        attempts = [lambda: run(self.network, self.dtype)]
        if self.dtype != torch.float32:
            attempts.append(lambda: run(wide_copy(self.network), torch.float32))
        return _as_rgb(first_finite(attempts))

    def _tensors(self, rgb: RGB, mask: Mask) -> tuple[Tensor, Tensor]:
        """1x3xHxW uint8 and 1x1xHxW bool, on the device."""
        image = torch.from_numpy(rgb).to(self.device).permute(2, 0, 1)[None]
        return image, torch.from_numpy(mask).to(self.device)[None, None]


def _as_rgb(image: Tensor) -> RGB:
    """1x3xHxW in 0..1 -> HxWx3 uint8."""
    return image[0].permute(1, 2, 0).mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
