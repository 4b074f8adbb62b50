"""LaMa as it is published and trained, with its normalisations; `handlers.lama.network` is the same with fewer layers.

Attribute names and positions are those of the published checkpoints, since they are the keys of the state dict.
`handlers.lama.folding` makes the product's weights of these.

An FFC splits its channels into a local part, convolved as usual, and a global part, convolved in the
frequency domain, where one pixel sees the whole image. Between layers both travel as a pair (`Features`).
"""

from functools import partial

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from handlers.lama.folding import folded
from handlers.lama.network import MAX_FEATURES, LaMa

Features = tuple[Tensor, Tensor | None]


class PublishedLaMa(LaMa):
    """Its state dict has the published keys (`generator.model....`)."""

    def __init__(self, config: DictConfig) -> None:
        """config: as handlers.lama.network.load_config reads it."""
        super().__init__(config.generator)
        self.generator = Generator(config.generator)  # type: ignore[assignment]


def product_weights(state: dict[str, Tensor], config: DictConfig) -> dict[str, Tensor]:
    """The state of a PublishedLaMa as that of the product's network."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    new = folded(arrays, config.generator.n_downsampling, config.generator.n_blocks)
    return {name: torch.from_numpy(array) for name, array in new.items()}


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
