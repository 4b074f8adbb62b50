"""Steps, learning rate, weight average and checkpoints: what the Stable Diffusion demo's trainings share."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

WARM_UP = 100  # steps
DECAY = 0.3  # the last part of a run, in which the learning rate falls to zero
EMA = 0.998


class Run:
    """The steps of one training that are still to be done, with optimiser, weight average and checkpoints."""

    SAVE_EVERY = 50  # steps

    def __init__(self, path: Path, network: nn.Module, rate: float, steps: int) -> None:
        self.path, self.network, self.rate, self.steps = path, network, rate, steps
        self.optimiser = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = {key: value.clone() for key, value in network.state_dict().items()}
        self.step = 0
        if path.exists():
            state = torch.load(path)
            network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.average, self.step = state["average"], state["step"]

    def __iter__(self) -> Iterator[int]:
        losses, start = [], time.monotonic()
        while self.step < self.steps:
            yield self.step
            losses.append(self.loss)
            self.step += 1
            if self.step % self.SAVE_EVERY == 0 or self.step == self.steps:
                self.save()
                pace = (time.monotonic() - start) / len(losses)
                print(f"step {self.step} loss {np.mean(losses):.4f} {pace:.3f} s/step", flush=True)
                losses, start = [], time.monotonic()

    def learn(self, loss: Tensor) -> None:
        decay = (self.steps - self.step) / (DECAY * self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * min(1, (self.step + 1) / WARM_UP, decay)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.loss = loss.item()
        keep = min(EMA, (self.step + 1) / (self.step + 10))
        for key, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - keep)

    def save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "network": self.network.state_dict(),
                "average": self.average,
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
            },
            temporary,
        )
        os.replace(temporary, self.path)
