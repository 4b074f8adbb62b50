"""What the image encoder made of pictures, kept for the next click on them."""

import hashlib
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_BYTES = 128 << 20
"""Of all embeddings: 32 pictures at the published networks' 4 MiB each."""


class Embeddings:
    """The least recently used go first. In host memory: copying one to a GPU takes a fraction of a millisecond, and a
    parked model keeps them without any of the device."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, embedding: Tensor) -> None:
        """embedding: complete and finite."""
        self._kept[key] = embedding.to("cpu", copy=True)
        while sum(each.nbytes for each in self._kept.values()) > self._max_bytes:
            self._kept.popitem(last=False)


def key_of(shown: NDArray[np.uint8]) -> bytes:
    """Of what the encoder is shown, HxWx3: equal for pictures that it cannot tell apart, and for no others."""
    digest = hashlib.sha256(repr(shown.shape).encode())
    digest.update(np.ascontiguousarray(shown).data)
    return digest.digest()
