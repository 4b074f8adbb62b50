"""Made scenes without pause: processes that make them, and the pool of them that the training draws from.

A scene travels as one uint8 array (4, size, size): red, green, blue, and which target a pixel shows, 0 for none.
"""

import multiprocessing
import signal
import time

import cv2
import numpy as np
import torch
from torch import Tensor

from training.scenes import Scene, SceneMaker

CHUNK = 32  # scenes handed over at once
FINE_EVERY = 5  # one in so many is made at twice the size and shrunk, as the pictures are that the product sees
HARD_FROM = 10_000  # scenes until the curriculum shows the full difficulty


class SceneMakers:
    """`workers` processes that make scenes from number `first` on, each scene once, for a `Pool` to take.

    They are forked, so that they share the photographs: start them before anything touches CUDA or starts threads.
    """

    def __init__(self, maker: SceneMaker, workers: int, first: int, size: int) -> None:
        cv2.setNumThreads(1)
        context = multiprocessing.get_context("fork")
        shape = (2 * workers + 2, CHUNK, 4, size, size)
        shared = context.RawArray("B", int(np.prod(shape)))
        self._slots = np.frombuffer(shared, np.uint8).reshape(shape)
        self._free, self._full = context.SimpleQueue(), context.SimpleQueue()
        self._next = context.Value("q", first)
        for slot in range(len(self._slots)):
            self._free.put(slot)
        self._processes = [context.Process(target=self._work, args=[maker], daemon=True) for _ in range(workers)]
        for process in self._processes:
            process.start()

    def started(self) -> int:
        """The number of the first scene that nobody has begun to make."""
        return self._next.get_obj().value  # without the lock, which a process that was ended may hold

    def check(self) -> None:
        """Raises RuntimeError when a process has died."""
        if not all(process.is_alive() for process in self._processes):
            raise RuntimeError("a scene maker died; its message is above")

    def give(self, pool: "Pool", at_least: int = 0) -> None:
        """Put all finished scenes into the pool, and wait for more until they are `at_least` so many."""
        while at_least > 0 or not self._full.empty():
            while self._full.empty():
                self.check()
                time.sleep(0.01)
            slot = self._full.get()
            pool.add(self._slots[slot])
            self._free.put(slot)
            at_least -= CHUNK

    def _work(self, maker: SceneMaker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the trainer ends these
        size = self._slots.shape[-1]
        while True:
            with self._next.get_lock():
                first = self._next.value
                self._next.value += CHUNK
            slot = self._free.get()
            for place, seed in enumerate(range(first, first + CHUNK)):
                self._slots[slot, place] = packed(maker, seed, size)
            self._full.put(slot)


def packed(maker: SceneMaker, seed: int, size: int) -> np.ndarray:
    """The training's scene number `seed`, uint8 (4, size, size)."""
    fine = 2 if seed % FINE_EVERY == 0 else 1
    scene: Scene = maker.make(seed, fine * size, min(1.0, 0.1 + 2 * seed / HARD_FROM))
    numbers = np.arange(1, len(scene.masks) + 1, dtype=np.uint8)
    owner = (scene.masks[:, ::fine, ::fine] * numbers[:, None, None]).max(0)
    image = cv2.resize(scene.image, (size, size), interpolation=cv2.INTER_AREA) if fine > 1 else scene.image
    return np.concatenate([image.transpose(2, 0, 1), owner[None]])


class Pool:
    """The last `capacity` scenes (a multiple of CHUNK), on `device`: a new one takes the place of the oldest."""

    def __init__(self, capacity: int, size: int, device: torch.device) -> None:
        self._scenes = torch.empty((capacity // CHUNK * CHUNK, 4, size, size), dtype=torch.uint8, device=device)
        self.taken = 0  # scenes so far

    def __len__(self) -> int:
        return min(self.taken, len(self._scenes))

    def add(self, chunk: np.ndarray) -> None:
        """CHUNK scenes, uint8 (CHUNK, 4, size, size), copied."""
        start, new = self.taken % len(self._scenes), torch.from_numpy(chunk)
        if self._scenes.is_cuda:
            new = new.pin_memory()  # otherwise the copy would wait for the steps under way
        self._scenes[start : start + CHUNK].copy_(new, non_blocking=True)
        self.taken += CHUNK

    def draw(self, count: int) -> Tensor:
        """`count` scenes, each any of the pool's, uint8 (count, 4, size, size)."""
        return self._scenes[torch.randint(len(self), (count,), device=self._scenes.device)]
