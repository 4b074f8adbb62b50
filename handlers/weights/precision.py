"""Outputs that overflowed in half precision: found, and computed again in float32."""

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from handlers.requests.errors import NotFinite

_Module = TypeVar("_Module", bound=nn.Module)


def first_finite(attempts: Iterable[Callable[[], Tensor]]) -> Tensor:
    """The first output without infinities and NaNs; raises NotFinite where there is none."""
    for attempt in attempts:
        output = attempt()
        if bool(torch.isfinite(output).all()):
            return output
    raise NotFinite


def wide_copy(module: _Module) -> _Module:
    """A second module with parameters in float32, without hooks, for the rare request that needs it; then dropped.

    The module itself stays as it is: parking knows its tensors.
    """
    wide = copy.deepcopy(module).float()
    wide._forward_hooks.clear()
    wide._forward_pre_hooks.clear()
    return wide
