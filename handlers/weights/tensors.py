"""Weights of a safetensors file: mapped where a CPU can use them as they lie there, else copied in one pass.

A network is built without memory (`empty_network`) and given these tensors (`fill`). Parking takes the memory away
underneath the tensors and puts it back: they keep their identity, so what was shared stays shared, and nothing has to
be assigned again.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from handlers.weights.mapped_file import MappedFile

# The dtype in which a tensor is served, by its name. Asked for floating-point tensors only; others keep theirs.
DtypeOf = Callable[[str], torch.dtype]

CHUNK = 32 << 20  # bytes of a staging buffer; larger ones take longer to pin than they save
HOST_BLOCK = 256 << 20  # bytes; PyTorch rounds pinned memory up to a power of two, so this wastes half a block at most
# What modules make parameters and buffers with that a file holds.
_MAKERS = ("empty", "zeros", "ones", "full", "rand", "randn", "tensor")
ALIGNMENT = 256  # bytes, as memory from the allocator has; a file promises no more than a tensor's own item size


class Weights(ABC):
    """The tensors of one file, loaded.

    tensors: by their names in the file. Between `drop` and `restore` they have no contents and must not be read.
    seconds: what loading took: "read" (into host memory) and "copy" (from there to where the weights are served).
    """

    tensors: Mapping[str, Tensor]
    seconds: Mapping[str, float]

    @abstractmethod
    def save(self) -> None:
        """Prepares `drop`. Raises RuntimeError where the host has no memory for it; then nothing has changed."""

    @abstractmethod
    def drop(self) -> None:
        """Gives the tensors' memory back."""

    @abstractmethod
    def restore(self) -> None:
        """Undoes `drop`, bit for bit. Raises FileChanged or torch.OutOfMemoryError; call `drop` again then."""

    @property
    @abstractmethod
    def device_bytes(self) -> int:
        """What the tensors take on their device now."""

    @property
    @abstractmethod
    def host_bytes(self) -> int:
        """Host memory held now so that `restore` is quick."""


def open_weights(path: Path, device: torch.device, dtype_of: DtypeOf) -> Weights:
    """Loads the file onto the device. Raises OSError, or ValueError for what is no safetensors file.

    A file in another dtype than is served costs a conversion, and on a CPU private memory of its size.
    """
    file = MappedFile(path)
    served = {name: dtype_of(name) if t.is_floating_point() else t.dtype for name, t in file.tensors.items()}
    if device.type == "cpu" and all(t.dtype == served[name] for name, t in file.tensors.items()):
        return MappedWeights(file)
    return CopiedWeights(file, served, device, keep_on_host=device.type == "cuda")


@contextmanager
def empty_network() -> Iterator[None]:
    """Modules made within have their tensors on the meta device: no memory, no random numbers.

    The initialisers have no effect there, yet would take half of the time. `with torch.device("meta")` does it, too,
    but looks at every call of torch, a fifth of the rest.
    """
    made = {name: getattr(torch, name) for name in _MAKERS}
    filled = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and not name.startswith("_")}
    try:
        for name, function in made.items():
            setattr(torch, name, _on_meta(function))
        for name in filled:
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for module, originals in ((torch, made), (nn.init, filled)):
            for name, function in originals.items():
                setattr(module, name, function)


def _on_meta(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def make_empty(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
        return make(*arguments, device=device or "meta", **options)

    return make_empty


def fill(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Makes the tensors the network's own, without a copy, and the network ready for inference.

    In one pass: load_state_dict, eval and requires_grad_ walk a network of hundreds of modules four times. Buffers that
    no file holds must have been set before. Raises RuntimeError where names or shapes are not the network's, or where
    something in it is left without a value.
    """
    unused = set(tensors)
    for path, module in network.named_modules(remove_duplicate=False):
        module.training = False
        for slots in (module._parameters, module._buffers):
            for name, empty in slots.items():
                full_name = f"{path}.{name}" if path else name
                if full_name in tensors:
                    slots[name] = _fitting(full_name, tensors[full_name], empty)
                    unused.discard(full_name)
                elif empty is not None and empty.is_meta:
                    raise RuntimeError(f"{full_name} has no value and is not among the weights")
    if unused:
        raise RuntimeError(f"the weights hold what the network has no place for: {', '.join(sorted(unused)[:5])}")


def _fitting(name: str, tensor: Tensor, empty: Tensor | None) -> Tensor:
    """The tensor as what it takes the place of."""
    if empty is None or tensor.shape != empty.shape:
        expected = "nothing" if empty is None else list(empty.shape)
        raise RuntimeError(f"{name} is {list(tensor.shape)} in the weights, and {expected} in the network")
    return nn.Parameter(tensor, requires_grad=False) if isinstance(empty, nn.Parameter) else tensor


class MappedWeights(Weights):
    """The tensors are the pages of the file: no copy, and shared with every other worker that maps it."""

    def __init__(self, file: MappedFile) -> None:
        self._file = file
        self._dropped = False
        self.tensors = file.tensors
        began = time.perf_counter()
        file.read()
        self.seconds = {"read": time.perf_counter() - began, "copy": 0.0}

    def save(self) -> None:
        """Nothing to do: the file has them."""

    def drop(self) -> None:
        self._file.forget()
        self._dropped = True

    def restore(self) -> None:
        self._file.check()
        self._file.read()
        self._dropped = False

    @property
    def device_bytes(self) -> int:
        return 0 if self._dropped else sum(t.nbytes for t in self.tensors.values())

    @property
    def host_bytes(self) -> int:
        return 0


class CopiedWeights(Weights):
    """The tensors are views of one buffer on the device.

    The file reaches it through two pinned staging buffers in turn: while one is copied, the other is filled, and
    converted on the way where it must be. keep_on_host: the first `save` copies the buffer into pinned host memory,
    which then stays for as long as the worker lives: weights do not change, so every later parking costs nothing and
    every waking is one copy. Before it, and for a model that is never parked, that memory (and the time to pin it,
    more than the load itself takes) is not spent. Without it `restore` reads the file once more.
    """

    def __init__(
        self, file: MappedFile, served: Mapping[str, torch.dtype], device: torch.device, keep_on_host: bool
    ) -> None:
        self._file, self._device, self._keep_on_host = file, device, keep_on_host
        self._places: list[_Place] = []
        self._size = 0
        for name, stored in file.tensors.items():
            self._places.append(_Place(stored.flatten(), served[name], self._size))
            self._size = -(-self._places[-1].end // ALIGNMENT) * ALIGNMENT
        self._buffer = torch.empty(self._size, dtype=torch.uint8, device=device)
        self._host: list[Tensor] = []
        self.tensors = {
            name: self._buffer[place.begin : place.end].view(place.dtype).view(stored.shape)
            for (name, stored), place in zip(file.tensors.items(), self._places, strict=True)
        }
        self.seconds = self._load()

    def save(self) -> None:
        if not self._keep_on_host or self._host:
            return
        blocks = [_pinned(min(HOST_BLOCK, self._size - at)) for at in range(0, self._size, HOST_BLOCK)]
        for block, part in zip(blocks, self._buffer.split(HOST_BLOCK), strict=True):
            block.copy_(part, non_blocking=True)
        _wait(self._device)
        self._host = blocks

    def drop(self) -> None:
        self._buffer.untyped_storage().resize_(0)

    def restore(self) -> None:
        if not self._host:
            self._file.check()
        self._buffer.untyped_storage().resize_(self._size)
        if not self._host:
            self._load()
            return
        for block, part in zip(self._host, self._buffer.split(HOST_BLOCK), strict=True):
            part.copy_(block, non_blocking=True)
        _wait(self._device)

    @property
    def device_bytes(self) -> int:
        return self._buffer.untyped_storage().nbytes()

    @property
    def host_bytes(self) -> int:
        return sum(block.nbytes for block in self._host)

    def _load(self) -> dict[str, float]:
        began = time.perf_counter()
        self._file.read()
        reading = time.perf_counter() - began
        staging = [_pinned(min(CHUNK, self._size)) for _ in range(2)]
        copied: list[torch.cuda.Event | None] = [None, None]
        for number, chunk in enumerate(self._buffer.split(CHUNK)):
            slot = number % 2
            if (event := copied[slot]) is not None:
                event.synchronize()
            filled = time.perf_counter()
            self._fill(staging[slot][: chunk.numel()], number * CHUNK)
            reading += time.perf_counter() - filled
            chunk.copy_(staging[slot][: chunk.numel()], non_blocking=True)
            copied[slot] = _event(self._device)
        _wait(self._device)
        del staging
        _give_back_pinned(self._device)
        self._file.forget()
        return {"read": reading, "copy": time.perf_counter() - began - reading}

    def _fill(self, target: Tensor, start: int) -> None:
        """Writes to `target` what the buffer holds from byte `start` on. CHUNK and ALIGNMENT keep items whole."""
        end = start + target.numel()
        for place in self._places:
            a, b = max(place.begin, start), min(place.end, end)
            if a < b:
                item = place.dtype.itemsize
                part = place.stored[(a - place.begin) // item : (b - place.begin) // item]
                target[a - start : b - start].view(place.dtype).copy_(part)


class _Place(NamedTuple):
    """A tensor of the file, flat, and where it goes in the buffer, in bytes."""

    stored: Tensor
    dtype: torch.dtype
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.stored.numel() * self.dtype.itemsize


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Marks this point of the device's stream; a CPU has none: its copies are done when they return."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _give_back_pinned(device: torch.device) -> None:
    """PyTorch would keep what is pinned and no longer used. torch.accelerator.empty_host_cache, for older releases."""
    if device.type == "cuda":
        torch._C._host_emptyCache()
