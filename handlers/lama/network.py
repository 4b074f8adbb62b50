"""LaMa's inpainting network: a residual generator made of fast Fourier convolutions (FFC).

Sources: R. Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions" (WACV 2022);
L. Chi, B. Jiang, Y. Mu, "Fast Fourier Convolution" (NeurIPS 2020).

An FFC splits its channels into a local part, convolved as usual, and a global part, convolved in the
frequency domain, where one pixel sees the whole image. Here both are one tensor, the local channels first.

This is the published network with fewer layers: normalisations are part of the convolutions before them, and what
is added up after two convolutions is one (`handlers.lama.folding` makes these weights of the published ones).
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from handlers.editing.prefill import prefill
from handlers.lama.detail import detail

# The published models' settings that this network does not vary.
REQUIRED = {
    "training_model.concat_mask": True,
    "generator.kind": "ffc_resnet",
    "generator.input_nc": 4,
    "generator.output_nc": 3,
    "generator.add_out_act": "sigmoid",
    "generator.init_conv_kwargs.ratio_gin": 0,
    "generator.init_conv_kwargs.ratio_gout": 0,
    "generator.init_conv_kwargs.enable_lfu": False,
    "generator.downsample_conv_kwargs.ratio_gin": 0,
    "generator.downsample_conv_kwargs.ratio_gout": 0,
    "generator.downsample_conv_kwargs.enable_lfu": False,
    "generator.resnet_conv_kwargs.enable_lfu": False,
}
FREE = {
    "generator.ngf",
    "generator.n_downsampling",
    "generator.n_blocks",
    "generator.resnet_conv_kwargs.ratio_gin",
    "generator.resnet_conv_kwargs.ratio_gout",
}
# Ours: the longer side of pictures in which a network too small for wide holes adds to a hole that is filled smoothly.
# It sees every picture at this size, that of its training; fine detail is copied from elsewhere in the picture.
PREFILLED_SIDE = "generator.prefilled_side"
DETAIL = 0.9  # of the copied detail: more looks crisper and is further from the truth
MAX_FEATURES = 1024
PAD_MULTIPLE = 8
# Three halvings must leave two pixels: the blocks' reflection padding of one needs a neighbour to reflect.
MIN_PADDED = 16


def load_config(path: Path) -> DictConfig:
    """The checkpoint's config.yaml. Raises ValueError if it is not a mapping."""
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} must hold a mapping with the section `generator`")
    return config


def build(config: DictConfig) -> "LaMa":
    """The network of a checkpoint's config.yaml, in evaluation mode, with untrained weights.

    Its state dict has the keys that `handlers.lama.folding` gives, so it may be built on the meta device and filled by
    `load_state_dict(weights, assign=True)`.

    Raises ValueError naming the key if a setting is missing or is one that this network does not implement.
    """
    _check(config)
    return LaMa(config.generator).eval()


def inpaint(network: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """The network's raw prediction for every pixel, Bx3xHxW in 0..1, not blended into the image.

    `image` is Bx3xHxW RGB in 0..1 and `mask` Bx1xHxW of 0 and 1, where 1 is to be filled; what lies under the
    mask is never seen. Both have the network's dtype and device. Any size of at least 1x1 works.
    """
    height, width = image.shape[-2:]
    prediction: Tensor = network(padded(image, mask))
    return prediction[..., :height, :width]


def padded(image: Tensor, mask: Tensor) -> Tensor:
    """What a network is given: the masked image and the mask, Bx4xHxW, reflected below and right to a size it takes."""
    height, width = image.shape[-2:]
    inputs = torch.cat((image * (1 - mask), mask), dim=1)
    rows = _reflected_indices(height, inputs.device)
    columns = _reflected_indices(width, inputs.device)
    return inputs[..., rows, :][..., columns]


Run = Callable[[nn.Module, Tensor], Tensor]


def _plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


class LaMa(nn.Module):
    """The generator, and around it what a prefilled network has besides."""

    def __init__(self, settings: DictConfig) -> None:
        super().__init__()
        self.generator = Generator(settings)
        self.prefilled_side: int | None = settings.get("prefilled_side")

    def forward(self, inputs: Tensor) -> Tensor:
        """Bx4xHxW (masked RGB in 0..1, mask) to Bx3xHxW in 0..1. H and W: multiples of 8, at least 16."""
        if self.prefilled_side is None:
            return self.generator(inputs)
        # In single precision: what is added up here would lose the picture in half of it.
        image, mask = inputs[:, :3].float(), inputs[:, 3:].float()
        smooth = self.smooth(image, mask)
        detailed = [filled + DETAIL * detail(filled, hole) for filled, hole in zip(smooth, mask, strict=True)]
        return torch.stack(detailed).clamp(0, 1).to(inputs.dtype)

    def smooth(self, image: Tensor, mask: Tensor) -> Tensor:
        """The hole filled without detail, Bx3xHxW, of a prefilled network: a guess and what it adds at its own size."""
        assert self.prefilled_side is not None
        guess, size = prefill(image, mask), image.shape[2:]
        scale = self.prefilled_side / max(size)
        own_size = [max(MIN_PADDED, PAD_MULTIPLE * round(side * scale / PAD_MULTIPLE)) for side in size]
        seen = F.interpolate(torch.cat((guess, mask), dim=1), size=own_size, mode="bilinear", antialias=True)
        # Nothing is added outside the hole, so that what is added fades towards its rim.
        answer = self.generator(seen.to(next(self.generator.parameters()).dtype)).float()
        added = (2 * answer - 1) * seen[:, 3:]
        return guess + F.interpolate(added, size=size, mode="bilinear")


class Generator(nn.Module):
    """Convolutions down, residual blocks, convolutions up. Each is followed by a rectifier but the last."""

    def __init__(self, settings: DictConfig) -> None:
        super().__init__()
        halvings = settings.n_downsampling
        features = [min(MAX_FEATURES, settings.ngf * 2**level) for level in range(halvings + 1)]
        global_channels = int(features[-1] * settings.resnet_conv_kwargs.ratio_gin)
        steps = list(pairwise(features))
        self.first = nn.Conv2d(settings.input_nc, features[0], 7)
        self.down = nn.ModuleList(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1, padding_mode="reflect") for fine, coarse in steps
        )
        self.blocks = nn.ModuleList(ResidualBlock(features[-1], global_channels) for _ in range(settings.n_blocks))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 3, stride=2, padding=1, output_padding=1) for fine, coarse in steps[::-1]
        )
        self.last = nn.Conv2d(features[0], settings.output_nc, 7)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rear(self.front(inputs))

    def front(self, inputs: Tensor) -> Tensor:
        """The features that the blocks begin with, of which the last ones are global."""
        # oneDNN's convolutions of these shapes are up to three times as fast where channels lie beside each other.
        layout = torch.channels_last if inputs.device.type == "cpu" else torch.contiguous_format
        x = torch.relu_(self.first(_reflected(inputs.contiguous(memory_format=layout), 3)))
        for convolution in self.down:
            x = torch.relu_(convolution(x))
        return x

    def rear(self, features: Tensor, run: Run = _plainly) -> Tensor:
        """The picture, 0..1, that the features become. run: runs each block."""
        x = features
        for block in self.blocks:
            x = run(block, x)
        for convolution in self.up:
            x = torch.relu_(convolution(x))
        return self.last(_reflected(x, 3)).sigmoid_()


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, global_channels: int) -> None:
        super().__init__()
        self.conv1 = FFC(channels, global_channels)
        self.conv2 = FFC(channels, global_channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class FFC(nn.Module):
    """Fast Fourier convolution and rectifier. Local channels see all; global ones see local and, spectrally, global."""

    def __init__(self, channels: int, global_channels: int) -> None:
        super().__init__()
        self.local_channels = channels - global_channels
        hidden = global_channels // 2
        self.to_local = nn.Conv2d(channels, self.local_channels, 3)
        self.to_global = nn.Conv2d(self.local_channels, global_channels, 3)
        self.squeeze = nn.Conv2d(global_channels, hidden, 1)
        # Of the spectrum, whose real and imaginary parts are neighbouring channels.
        self.spectral = nn.Conv2d(2 * hidden, 2 * hidden, 1)
        self.expand = nn.Conv2d(hidden, global_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = _reflected(x, 1)
        squeezed = torch.relu_(self.squeeze(x[:, self.local_channels :]))
        global_ = self.expand(squeezed + self._transformed(squeezed))
        global_ += self.to_global(padded[:, : self.local_channels])
        return torch.relu_(torch.cat((self.to_local(padded), global_), dim=1))

    def _transformed(self, x: Tensor) -> Tensor:
        # The transforms stay in float32: in half precision cuFFT takes powers of two only, and the CPU none.
        spectrum = torch.view_as_real(torch.fft.rfft2(x.float(), norm="ortho"))
        stacked = spectrum.permute(0, 1, 4, 2, 3).flatten(1, 2).to(x.dtype)
        stacked = torch.relu_(self.spectral(stacked))
        real, imaginary = stacked.float().unflatten(1, (-1, 2)).unbind(2)
        restored = torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[-2:], norm="ortho")
        return restored.to(x.dtype)


def _reflected(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (by, by, by, by), mode="reflect")


def _check(config: DictConfig) -> None:
    for key, required in REQUIRED.items():
        value = OmegaConf.select(config, key)
        if value != required:
            raise ValueError(f"{key} is {value!r}; this network supports {required!r} only")
    for key in FREE:
        if OmegaConf.select(config, key) is None:
            raise ValueError(f"{key} is missing")
    # A setting that is not known here could change the network without a sign.
    for key in _keys(config.generator, "generator"):
        if key not in REQUIRED and key not in FREE and key != PREFILLED_SIDE:
            raise ValueError(f"{key} is not supported by this network")
    side = OmegaConf.select(config, PREFILLED_SIDE)
    if side is not None and not (isinstance(side, int) and side >= MIN_PADDED):
        raise ValueError(f"{PREFILLED_SIDE} must be {MIN_PADDED} or more; it is {side!r}")
    blocks = config.generator.resnet_conv_kwargs
    if blocks.ratio_gin != blocks.ratio_gout or not 0 < blocks.ratio_gin < 1:
        raise ValueError("generator.resnet_conv_kwargs.ratio_gin and ratio_gout must be equal, between 0 and 1")
    if not 1 <= config.generator.n_downsampling <= 3:
        raise ValueError("generator.n_downsampling must be 1, 2 or 3")


def _keys(section: DictConfig, prefix: str) -> list[str]:
    keys = []
    for name, value in section.items():
        nested = isinstance(value, DictConfig)
        keys += _keys(value, f"{prefix}.{name}") if nested else [f"{prefix}.{name}"]
    return keys


def _reflected_indices(size: int, device: torch.device) -> Tensor:
    """Indices that pad `size` at its end by reflection, as often as needed: 0 1 2 1 0 1 2 … for size 3."""
    padded = max(-(-size // PAD_MULTIPLE) * PAD_MULTIPLE, MIN_PADDED)
    period = max(2 * (size - 1), 1)
    index = torch.arange(padded, device=device) % period
    return torch.minimum(index, period - index)
