"""LaMa's inpainting network: a residual generator made of fast Fourier convolutions (FFC).

Sources: R. Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions" (WACV 2022);
L. Chi, B. Jiang, Y. Mu, "Fast Fourier Convolution" (NeurIPS 2020). Attribute names and positions are those of
the published checkpoints, since they are the keys of the state dict.

An FFC splits its channels into a local part, convolved as usual, and a global part, convolved in the
frequency domain, where one pixel sees the whole image. Between layers both travel as a pair (`Features`).
"""

from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from handlers.lama.detail import detail
from handlers.lama.prefill import prefill

Features = tuple[Tensor, Tensor | None]

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

    Its state dict has the published keys (`generator.model.…`). All of its buffers are in the state dict, so
    it may be built on the meta device and filled by `load_state_dict(weights, assign=True)`.

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
    inputs = torch.cat((image * (1 - mask), mask), dim=1)
    rows = _reflected_indices(height, inputs.device)
    columns = _reflected_indices(width, inputs.device)
    prediction: Tensor = network(inputs[..., rows, :][..., columns])
    return prediction[..., :height, :width]


class LaMa(nn.Module):
    """The published training module reduced to its generator: it gives the keys their prefix `generator.`."""

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
    def __init__(self, settings: DictConfig) -> None:
        super().__init__()
        halvings = settings.n_downsampling
        ratio = settings.resnet_conv_kwargs.ratio_gin
        features = [min(MAX_FEATURES, settings.ngf * 2**level) for level in range(halvings + 1)]
        layers: list[nn.Module] = [
            ReflectionPadLocal(3),
            FFCNormReLU(settings.input_nc, features[0], kernel_size=7),
        ]
        for level in range(halvings):
            layers.append(
                FFCNormReLU(
                    features[level],
                    features[level + 1],
                    kernel_size=3,
                    stride=2,
                    padding=1,
                    ratio_gout=ratio if level == halvings - 1 else 0,
                )
            )
        layers += [ResidualBlock(features[-1], ratio) for _ in range(settings.n_blocks)]
        layers.append(Concatenate())
        for level in reversed(range(halvings)):
            layers += [
                nn.ConvTranspose2d(features[level + 1], features[level], 3, stride=2, padding=1, output_padding=1),
                nn.BatchNorm2d(features[level]),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(features[0], settings.output_nc, 7), nn.Sigmoid()]
        self.model = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


class ReflectionPadLocal(nn.ReflectionPad2d):
    """Pads the image and makes it the local features; there are no global ones yet."""

    def forward(self, image: Tensor) -> Features:  # type: ignore[override]
        return super().forward(image), None


class Concatenate(nn.Module):
    def forward(self, features: Features) -> Tensor:
        return torch.cat([part for part in features if part is not None], dim=1)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        self.conv1 = FFCNormReLU(channels, channels, 3, padding=1, ratio_gin=ratio, ratio_gout=ratio)
        self.conv2 = FFCNormReLU(channels, channels, 3, padding=1, ratio_gin=ratio, ratio_gout=ratio)

    def forward(self, features: Features) -> Features:
        local, global_ = features
        local_change, global_change = self.conv2(self.conv1(features))
        return local + local_change, global_ + global_change


class FFCNormReLU(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        ratio_gin: float = 0,
        ratio_gout: float = 0,
    ) -> None:
        super().__init__()
        global_channels = int(out_channels * ratio_gout)
        self.ffc = FFC(in_channels, out_channels, kernel_size, stride, padding, ratio_gin, ratio_gout)
        self.bn_l = nn.BatchNorm2d(out_channels - global_channels)
        self.bn_g = nn.BatchNorm2d(global_channels) if global_channels else None

    def forward(self, features: Features) -> Features:
        local, global_ = self.ffc(features)
        local = torch.relu_(self.bn_l(local))
        return local, torch.relu_(self.bn_g(global_)) if self.bn_g is not None else None


class FFC(nn.Module):
    """Fast Fourier convolution: four paths between the local (l) and global (g) channels; g to g is spectral.

    `ratio_gin` and `ratio_gout` are the global shares of the channels that come in and go out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        ratio_gin: float,
        ratio_gout: float,
    ) -> None:
        super().__init__()
        global_in, global_out = int(in_channels * ratio_gin), int(out_channels * ratio_gout)
        local_in, local_out = in_channels - global_in, out_channels - global_out

        convolution = partial(
            nn.Conv2d,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            bias=False,
            padding_mode="reflect",
        )
        self.convl2l = convolution(local_in, local_out)
        self.convl2g = convolution(local_in, global_out) if global_out else None
        self.convg2l = convolution(global_in, local_out) if global_in else None
        self.convg2g = SpectralTransform(global_in, global_out) if global_in and global_out else None

    def forward(self, features: Features) -> Features:
        local, global_ = features
        local_out = self.convl2l(local)
        global_out = self.convl2g(local) if self.convl2g is not None else None
        if self.convg2l is not None:
            local_out = local_out + self.convg2l(global_)
        if self.convg2g is not None:
            global_out = global_out + self.convg2g(global_)
        return local_out, global_out


class SpectralTransform(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
        )
        self.fu = FourierUnit(hidden)
        self.conv2 = nn.Conv2d(hidden, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(x + self.fu(x))


class FourierUnit(nn.Module):
    """A 1x1 convolution of the spectrum, whose real and imaginary parts are neighbouring channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_layer = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        # The transforms stay in float32: in half precision cuFFT takes powers of two only, and the CPU none.
        spectrum = torch.fft.rfft2(x.float(), norm="ortho")
        stacked = torch.stack((spectrum.real, spectrum.imag), dim=2).flatten(1, 2).to(x.dtype)
        stacked = torch.relu_(self.bn(self.conv_layer(stacked)))
        real, imaginary = stacked.float().unflatten(1, (-1, 2)).unbind(2)
        restored = torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[-2:], norm="ortho")
        return restored.to(x.dtype)


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
