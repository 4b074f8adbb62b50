"""What a network made of something, kept for whoever asks for the same again."""

from collections import OrderedDict

from torch import Tensor


class Kept:
    """Tensors by key, of so many bytes together; the least recently used go first.

    In host memory: copying one to a GPU takes a fraction of a millisecond, a parked model needs none of the device for
    them, and they end with the worker.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._tensors: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        if key in self._tensors:
            self._tensors.move_to_end(key)
        return self._tensors.get(key)

    def __contains__(self, key: bytes) -> bool:
        """Whether get has it; that is no use of it."""
        return key in self._tensors

    def put(self, key: bytes, tensor: Tensor) -> None:
        """key: a new one. tensor: complete and finite; it is copied."""
        self._tensors[key] = tensor.to("cpu", copy=True)
        self._bytes += tensor.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._tensors.popitem(last=False)[1].nbytes
