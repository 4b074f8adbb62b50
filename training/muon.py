"""Muon: momentum whose update matrices are orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Small transformers learn about twice as much per step as with AdamW. PyTorch's own computes in bfloat16, which most
CPUs emulate, and one matrix at a time, which leaves a GPU idle; this one stays in the matrices' dtype and takes all
matrices of one shape at once.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """For matrices only, each of which has a gradient in every step; one parameter group for each shape.

    `lr` and `weight_decay` mean what they mean in AdamW: updates are scaled to its usual size.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._step_together(group["params"], group)

    def _step_together(self, matrices: list[nn.Parameter], group: dict) -> None:
        gradient = torch.stack([matrix.grad for matrix in matrices])
        # One buffer for all of them, in the state of the first.
        buffer = self.state[matrices[0]].setdefault("momentum", torch.zeros_like(gradient))
        buffer.lerp_(gradient, 1 - group["momentum"])
        update = orthogonalised(gradient.lerp(buffer, group["momentum"]))
        update *= -group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, update.unbind())


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest matrices (n, rows, columns) with singular values near 1, by five Newton-Schulz steps."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
