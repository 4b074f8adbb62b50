"""What a network made of something, kept for whoever asks for the same again."""

from collections import OrderedDict

from torch import Tensor


class Kept:
    """Tensors by key, one or several that belong together; so many bytes of all, the least recently used go first.

    In host memory: copying one to a GPU takes a fraction of a millisecond, a parked model needs none of the device for
    them, and they end with the worker.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._tensors: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: bytes) -> tuple[Tensor, ...] | None:
        if key in self._tensors:
            self._tensors.move_to_end(key)
        return self._tensors.get(key)

    def __contains__(self, key: bytes) -> bool:
        """Whether get has it; that is no use of it."""
        return key in self._tensors

    def put(self, key: bytes, *tensors: Tensor) -> None:
        """key: a new one. tensors: complete and finite; they are copied."""
        self._tensors[key] = tuple(tensor.to("cpu", copy=True) for tensor in tensors)
        self._bytes += _size(tensors)
        while self._bytes > self._max_bytes:
            self._bytes -= _size(self._tensors.popitem(last=False)[1])


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
