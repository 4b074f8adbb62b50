"""What a click needs of a picture, kept for the next one: what the image encoder made of it, and a small copy."""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from handlers.weights.kept import Kept

MAX_BYTES = 128 << 20
"""Of all that is kept: 32 pictures at the published networks' 4 MiB each."""

MAX_FILES = 1000
"""Files whose picture is remembered."""


class Sight(NamedTuple):
    """A picture as far as a click on it needs it.

    size: (width, height). shown: (height, width) of what the encoder sees. key: of what is kept. notes: a Picture's.
    """

    size: tuple[int, int]
    shown: tuple[int, int]
    key: bytes
    notes: tuple[str, ...]


class Embeddings(Kept):
    """Of one network, and which files they are of; the least recently used go first.

    Each with the copy in which masks are snapped, uint8 HxWx3, where the network has that.
    """

    def __init__(self, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
        super().__init__(max_bytes)
        self._max_files = max_files
        self._files: OrderedDict[str, Sight] = OrderedDict()

    def sight(self, content: str) -> Sight | None:
        """What the file of that name (contract.pictures) shows, where its embedding is kept."""
        if content not in self._files:
            return None
        self._files.move_to_end(content)
        sight = self._files[content]
        return sight if sight.key in self else None

    def remember(self, content: str, sight: Sight) -> None:
        """Notes what the file holds, so that it need not be decoded again."""
        self._files[content] = sight
        self._files.move_to_end(content)
        if len(self._files) > self._max_files:
            self._files.popitem(last=False)


def key_of(*copies: NDArray[np.uint8]) -> bytes:
    """Hashes all that is seen of a picture, each HxWx3: equal for pictures of which that is the same, and no others."""
    digest = hashlib.sha256()
    for copy in copies:
        digest.update(repr(copy.shape).encode())
        digest.update(np.ascontiguousarray(copy).data)
    return digest.digest()
