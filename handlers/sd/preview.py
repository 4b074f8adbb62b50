"""Drafts of a picture while it is being painted: what the network takes the finished latents for, as colours.

A latent's colour is nearly a linear function of its channels, so that a draft costs a product of small matrices and not
the autoencoder's decoder.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handlers.editing.geometry import Box, Fit
from handlers.pictures.picture import Mask
from handlers.pictures.png import write_png
from handlers.requests.jobs import Show

INTERVAL = 0.1
"""Seconds from one draft to the next, at least; the gateway looks as often."""

# Of the autoencoder of Stable Diffusion 1 and 2: red, green and blue, -1 to 1, of each channel of the latents as the
# UNet has them. Fitted by keturn: https://discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204
STABLE_DIFFUSION = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))

Colours = Sequence[Sequence[float]]
"""Red, green and blue of each of the latents' CHANNELS; a further row is added to all."""
CHANNELS = 4


class Place(NamedTuple):
    """The place in the picture at which the network works. hole: on the network's canvas, True where it is to paint."""

    box: Box
    fit: Fit
    hole: Mask


class Drafts:
    """The drafts of one picture. cell: pixels of the canvas that one latent stands for, in each direction."""

    def __init__(self, colours: Colours, cell: int, place: Place, show: Show) -> None:
        self._show, factors = show, np.array(colours, np.float32)
        self._factors, self._offset = factors[:CHANNELS], factors[CHANNELS:].sum(axis=0)
        (width, height), (wide, high) = place.fit.inner, place.fit.crop
        columns, rows = -(-width // cell), -(-height // cell)
        self._inner = Box(0, 0, columns, rows)  # of the canvas, in cells: what is right of it and below only pads it
        right, bottom = columns * cell * wide / width, rows * cell * high / height
        self._box = (place.box.left, place.box.top, place.box.left + round(right), place.box.top + round(bottom))
        self._alpha = self._inner.of(_shares(place.hole, cell))
        self._next = 0.0
        self._coming: Sent | None = None

    def watch(self, scheduler: Any) -> None:
        """Shows from now on drafts of what the scheduler is told at its steps; its answers stay what they are."""
        step = scheduler.step
        # Now: adding noise to a picture takes the table to the device, and reading it there would wait for that.
        signal = scheduler.alphas_cumprod.tolist()

        @functools.wraps(step)  # the pipeline looks at its parameters
        def watched(prediction: Tensor, at: Tensor, latents: Tensor, **options: Any) -> Any:
            self._show_what_has_come()
            if self._coming is None and time.monotonic() >= self._next:
                self._next = time.monotonic() + INTERVAL
                noisy = scheduler.scale_model_input(latents, at)
                finished = _finished(scheduler.config.prediction_type, signal[int(at)], noisy, prediction)
                self._coming = Sent(finished[0])
                self._show_what_has_come()
            return step(prediction, at, latents, **options)

        scheduler.step = watched

    def _show_what_has_come(self) -> None:
        if self._coming is None or not self._coming.has_arrived():
            return
        latents, self._coming = self._inner.of(self._coming.tensor.permute(1, 2, 0).numpy()), None
        rgb = latents @ self._factors + self._offset
        if np.isfinite(rgb).all():
            rgba = np.dstack([(rgb / 2 + 0.5).clip(0, 1) * 255, self._alpha]).round().astype(np.uint8)
            rgba[rgba[..., 3] == 0] = 0  # nothing of what it makes of the surroundings, which stay as they are
            self._show(self._box, write_png(rgba))


class Sent:
    """A tensor on its way from the device, which nobody waits for. tensor: float32, valid once it has arrived."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.float().to("cpu", non_blocking=True)
        self._arrival = None
        if tensor.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def has_arrived(self) -> bool:
        return self._arrival is None or bool(self._arrival.query())


def _finished(kind: str, signal: float, noisy: Tensor, prediction: Tensor) -> Tensor:
    """The latents without their noise, as the network sees them now. signal: its share of the noisy ones, squared."""
    alpha, sigma = signal**0.5, (1 - signal) ** 0.5
    if kind == "v_prediction":
        return alpha * noisy - sigma * prediction
    return prediction if kind == "sample" else (noisy - sigma * prediction) / alpha


def _shares(hole: Mask, cell: int) -> NDArray[np.float32]:
    """0 to 255 by cell: how much of it is to be painted."""
    height, width = hole.shape
    shares = cv2.resize(hole.astype(np.float32), (width // cell, height // cell), interpolation=cv2.INTER_AREA)
    return np.asarray(shares * 255)
