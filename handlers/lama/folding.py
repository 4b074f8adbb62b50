"""The published generator's tensors as those of `handlers.lama.network`, which computes the same with fewer layers.

A normalisation after a convolution, whose statistics no longer change, scales and shifts each of its channels: that is
another convolution. And the sum of two convolutions is one of both inputs beside each other.
"""

from collections.abc import Mapping

import numpy as np

from handlers.building.checkpoint import Array, CheckpointError

PREFIX = "generator.model."
EPSILON = 1e-5  # of the published normalisations, added to the variance


def folded(published: Mapping[str, Array], halvings: int, blocks: int) -> dict[str, Array]:
    """The network's tensors by their keys, as float32; `published` has the published keys (`generator.model.1...`).

    halvings, blocks: n_downsampling and n_blocks of its config. Raises CheckpointError where a tensor is missing or
    there is one that such a network does not have.
    """
    tensors = _Published(published)
    new: dict[str, Array] = {}

    def put(name: str, weight: Array, bias: Array | None = None) -> None:
        new[f"generator.{name}.weight"] = weight.astype(np.float32)
        if bias is not None:
            new[f"generator.{name}.bias"] = bias.astype(np.float32)

    for level in range(halvings + 1):
        name = "first" if level == 0 else f"down.{level - 1}"
        paths = ("l", "g") if level == halvings else ("l",)
        parts = [tensors.normalised(f"{1 + level}.ffc.convl2{path}", f"{1 + level}.bn_{path}") for path in paths]
        put(name, np.concatenate([weight for weight, _ in parts]), np.concatenate([bias for _, bias in parts]))
    for block in range(blocks):
        for conv in ("conv1", "conv2"):
            for name, part in tensors.ffc(f"{2 + halvings + block}.{conv}").items():
                put(f"blocks.{block}.{conv}.{name}", *part)
    last = 3 + halvings + blocks
    for level in range(halvings):
        put(f"up.{level}", *tensors.normalised(f"{last}", f"{last + 1}", outputs=1))
        last += 3
    put("last", tensors.take(f"{last + 1}.weight"), tensors.take(f"{last + 1}.bias"))
    tensors.finish()
    return new


class _Published:
    def __init__(self, tensors: Mapping[str, Array]) -> None:
        self._left = {name: array for name, array in tensors.items() if not name.endswith(".num_batches_tracked")}

    def take(self, name: str) -> Array:
        if (array := self._left.pop(PREFIX + name, None)) is None:
            raise CheckpointError(f"{PREFIX}{name} is missing: give a LaMa checkpoint and its own config")
        return array.astype(np.float64)

    def finish(self) -> None:
        if self._left:
            raise CheckpointError(f"{min(self._left)} has no place: give a LaMa checkpoint and its own config")

    def normalised(self, convolution: str, norm: str, outputs: int = 0) -> tuple[Array, Array]:
        """Weight and bias of a convolution and the normalisation after it. outputs: the axis of the outputs."""
        scale, shift = self._scale_and_shift(norm)
        weight = _scaled(self.take(f"{convolution}.weight"), scale, outputs)
        if PREFIX + f"{convolution}.bias" in self._left:
            shift = shift + scale * self.take(f"{convolution}.bias")
        return weight, shift

    def ffc(self, name: str) -> dict[str, tuple[Array, ...]]:
        """Folds an FFC between local and global channels, the parts of `network.FFC`."""
        local, global_ = self._scale_and_shift(f"{name}.bn_l"), self._scale_and_shift(f"{name}.bn_g")
        inputs = [self.take(f"{name}.ffc.conv{path}2l.weight") for path in "lg"]
        spectral = f"{name}.ffc.convg2g"
        return {
            "to_local": (_scaled(np.concatenate(inputs, axis=1), local[0]), local[1]),
            "to_global": (_scaled(self.take(f"{name}.ffc.convl2g.weight"), global_[0]), global_[1]),
            "squeeze": self.normalised(f"{spectral}.conv1.0", f"{spectral}.conv1.1"),
            "spectral": self.normalised(f"{spectral}.fu.conv_layer", f"{spectral}.fu.bn"),
            "expand": (_scaled(self.take(f"{spectral}.conv2.weight"), global_[0]),),
        }

    def _scale_and_shift(self, norm: str) -> tuple[Array, Array]:
        weight, bias, mean, variance = (
            self.take(f"{norm}.{name}") for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + EPSILON)
        return scale, bias - mean * scale


def _scaled(weight: Array, scale: Array, outputs: int = 0) -> Array:
    return weight * np.expand_dims(scale, [axis for axis in range(weight.ndim) if axis != outputs])
