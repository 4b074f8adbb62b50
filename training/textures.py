"""Made surfaces: what the objects and backgrounds of made scenes are covered with.

Every function takes a NumPy generator and a size (height = width, in pixels) and returns uint8 RGB (size, size, 3).
"""

import cv2
import numpy as np

from training.photographs import Split, photographs, read_photograph

PHOTOGRAPH_LONGEST = 1024


class Textures:
    """Draws surfaces, half of them from the photographs of `split`, the rest computed."""

    def __init__(self, split: Split) -> None:
        self._photographs = [read_photograph(path, PHOTOGRAPH_LONGEST) for path in photographs(split)]

    def photograph(self, rng: np.random.Generator, size: int, smallest: float = 0.15) -> np.ndarray:
        """A square piece of a photograph, its side between `smallest` and 1 of the picture's short side."""
        image = self._photographs[rng.integers(len(self._photographs))]
        height, width = image.shape[:2]
        side = int(min(height, width) * rng.uniform(smallest, 1))
        top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
        piece = image[top : top + side, left : left + side]
        piece = cv2.resize(piece, (size, size), interpolation=cv2.INTER_AREA)
        return cv2.flip(piece, 1) if rng.random() < 0.5 else piece

    def any(self, rng: np.random.Generator, size: int) -> np.ndarray:
        if rng.random() < 0.5:
            return self.photograph(rng, size, smallest=0.05)
        return made(rng, size)


def made(rng: np.random.Generator, size: int) -> np.ndarray:
    """A computed surface between two or three colours: plain, clouded, striped, chequered, spotted or hairy."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))](rng, size)
    first = random_colour(rng)
    second = near_colour(rng, first) if rng.random() < 0.6 else random_colour(rng)
    surface = pattern[..., None] * (second - first)
    surface += first
    if rng.random() < 0.5:
        surface += (clouds(rng, size)[..., None] - 0.5) * rng.uniform(10, 80)
    if rng.random() < 0.5:
        surface += rng.normal(0, rng.uniform(2, 20), (size, size, 1))
    return surface.clip(0, 255, out=surface).astype(np.uint8)


def random_colour(rng: np.random.Generator) -> np.ndarray:
    """float RGB (3,), 0-255; greys and faint colours are as common as strong ones."""
    colour = rng.uniform(0, 255, 3)
    return colour.mean() + (colour - colour.mean()) * rng.uniform(0, 1.2)


def near_colour(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    return (colour * rng.uniform(0.6, 1.4) + rng.normal(0, 15, 3)).clip(0, 255)


def clouds(rng: np.random.Generator, size: int) -> np.ndarray:
    """Fractal noise, float32 (size, size), 0-1."""
    roughness = rng.uniform(0.35, 0.8)
    total, amplitude, cells = np.zeros((size, size), np.float32), 1.0, int(rng.integers(2, 6))
    while cells < size and amplitude > 0.05:
        noise = rng.random((cells, cells), dtype=np.float32)
        total += amplitude * cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)
        amplitude, cells = amplitude * roughness, cells * 2
    return cv2.normalize(total, None, 0, 1, cv2.NORM_MINMAX)


def _plain(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.zeros((size, size), np.float32)


def _ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    across, down = rng.normal(size=2)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    return cv2.normalize(across * x + down * y, None, 0, 1, cv2.NORM_MINMAX)


def _waves(rng: np.random.Generator, size: int) -> np.ndarray:
    """Stripes along one direction, bent by noise, hard or soft."""
    angle, cycles = rng.uniform(0, np.pi), rng.uniform(2, 20)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    phase = (x * np.cos(angle) + y * np.sin(angle)) * cycles + clouds(rng, size) * rng.uniform(0, 2)
    return (0.5 + np.sin(phase * 2 * np.pi + rng.uniform(0, 6)) * rng.uniform(0.5, 4)).clip(0, 1)


def _checks(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.abs(_waves(rng, size) - _waves(rng, size))


def _spots(rng: np.random.Generator, size: int) -> np.ndarray:
    level, hardness = rng.uniform(0.4, 0.7), rng.uniform(3, 20)
    return ((clouds(rng, size) - level) * hardness).clip(0, 1)


def _hair(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise smeared along one direction: fur, grass, wood."""
    length = int(rng.integers(3, 16))
    kernel = np.zeros((length, length), np.float32)
    end = (length // 2 + np.array([1, -1])[:, None] * length / 2 * _direction(rng)).astype(int)
    cv2.line(kernel, end[0].tolist(), end[1].tolist(), 1.0)
    noise = rng.random((size, size), dtype=np.float32)
    return cv2.normalize(cv2.filter2D(noise, -1, kernel / max(kernel.sum(), 1)), None, 0, 1, cv2.NORM_MINMAX)


def _direction(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, np.pi)
    return np.array([np.cos(angle), np.sin(angle)])


PATTERNS = [_plain, _ramp, clouds, clouds, _waves, _checks, _spots, _hair, _hair]
