"""Made scenes: textured objects on textured backgrounds and photographs, with the truth known to the pixel.

Objects are made shapes or cut-outs; they occlude one another, throw shadows, carry parts of another texture, and the
picture as a whole is blurred, noisy, miscoloured or compressed. A scene is a pure function of its seed.
"""

from typing import NamedTuple

import cv2
import numpy as np

from training.photographs import Split, cutouts, read_cutout
from training.textures import Textures, made

CUTOUT_LONGEST = 320
MIN_AREA = 0.01  # of the picture; smaller visible areas are nobody's target
MIN_VISIBLE = 0.3  # of the object; more hidden than this and a click could not mean it
SEED_SPACE = {"train": 1, "held-out": 2}


class Scene(NamedTuple):
    """image: uint8 RGB (size, size, 3); masks: bool (objects, size, size), the visible area of each object."""

    image: np.ndarray
    masks: np.ndarray


class SceneMaker:
    """Makes scenes from the photographs and cut-outs of `split`."""

    def __init__(self, split: Split) -> None:
        self._split = split
        self._textures = Textures(split)
        self._cutouts = [read_cutout(path, CUTOUT_LONGEST) for path in cutouts(split)]

    def make(self, seed: int, size: int, difficulty: float = 1.0) -> Scene:
        """The scene of `seed`; `difficulty` 0 is one or two plain-edged objects, 1 is a crowd with every trouble."""
        rng = np.random.default_rng([SEED_SPACE[self._split], seed])
        while True:
            canvas = _Canvas(self._background(rng, size), rng, difficulty)
            self._layers(rng, canvas)
            for _ in range(rng.integers(1, 3 + round(5 * difficulty))):
                colour, alpha = self._object(rng, size)
                canvas.put(colour, alpha)
            masks = canvas.targets()
            if len(masks):
                return Scene(_photographed(rng, canvas.image, difficulty), masks)

    def _background(self, rng: np.random.Generator, size: int) -> np.ndarray:
        image = self._textures.photograph(rng, size) if rng.random() < 0.6 else made(rng, size)
        if rng.random() < 0.4:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.01, 0.03) * size)
        return image

    def _layers(self, rng: np.random.Generator, canvas: "_Canvas") -> None:
        """Sometimes a ground, a wall or a sky: a band with its own texture up to a wavy line."""
        if rng.random() < 0.3:
            alpha = _band(rng, canvas.size)
            canvas.put(self._textures.any(rng, canvas.size), alpha, shadow=False)

    def _object(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        """RGB float32 and alpha float32 (0-1) of one object somewhere in the picture."""
        extent = size * np.exp(rng.uniform(np.log(0.12), np.log(0.8)))
        if rng.random() < 0.55:
            cutout = self._cutouts[rng.integers(len(self._cutouts))]
            colour, alpha = _placed(rng, cutout, size, extent)
            if rng.random() < 0.8:
                return _relit(rng, colour, alpha), alpha
        else:
            alpha = _shape(rng, size, extent)
        colour = self._textures.any(rng, size).astype(np.float32)
        for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.35 else 0):
            part = _part(rng, alpha, extent)
            _blend(colour, self._textures.any(rng, size), part, _bounds(part))
        return _relit(rng, colour, alpha), alpha


class _Canvas:
    """A picture under construction that remembers which object each pixel shows."""

    def __init__(self, background: np.ndarray, rng: np.random.Generator, difficulty: float) -> None:
        self.image = background.astype(np.float32)
        self.size = background.shape[0]
        self._rng = rng
        self._difficulty = difficulty
        self._owner = np.zeros((self.size, self.size), np.int16)
        self._areas: list[float] = []

    def put(self, colour: np.ndarray, alpha: np.ndarray, shadow: bool = True) -> None:
        if shadow and self._rng.random() < 0.5 * self._difficulty:
            self.image *= 1 - _shadow(self._rng, alpha)[..., None]
        bounds = _bounds(alpha)
        _blend(self.image, colour, alpha, bounds)
        solid = alpha[bounds] > 0.5
        self._areas.append(float(solid.sum()))
        self._owner[bounds][solid] = len(self._areas)

    def targets(self) -> np.ndarray:
        visible = [(self._owner == i + 1, area) for i, area in enumerate(self._areas)]
        least = MIN_AREA * self.size**2
        kept = [mask for mask, area in visible if mask.sum() >= max(least, MIN_VISIBLE * area)]
        return np.array(kept, bool).reshape(-1, self.size, self.size)


def _shape(rng: np.random.Generator, size: int, extent: float) -> np.ndarray:
    """The alpha of a made outline: blob, polygon, ellipse, box, or a body with limbs; a few have a hole."""
    centre = rng.uniform(0.1, 0.9, 2) * size
    alpha = np.zeros((size, size), np.uint8)
    kind = rng.random()
    if kind < 0.4:
        _fill(alpha, centre + _blob(rng, extent / 2))
    elif kind < 0.7:
        _fill(alpha, centre + _polygon(rng, extent / 2))
    else:
        _fill(alpha, centre + _blob(rng, extent / 4))
        for _ in range(rng.integers(2, 7)):
            joint, end = centre + rng.normal(0, extent / 8, 2), centre + rng.normal(0, extent / 3, 2)
            thickness = max(1, int(extent * rng.uniform(0.04, 0.2)))
            cv2.line(alpha, joint.astype(int).tolist(), end.astype(int).tolist(), 255, thickness, cv2.LINE_AA)
    if rng.random() < 0.08:
        _fill(alpha, centre + _blob(rng, extent / 5), 0)
    return alpha.astype(np.float32) / 255


def _blob(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Points (n, 2) of a smooth closed curve around the origin."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    waves = np.arange(2, 7)
    heights = rng.normal(0, rng.choice([0, 0.1, 0.3]), 5) / np.sqrt(waves)
    r = 1 + (heights[:, None] * np.cos(waves[:, None] * angles + rng.uniform(0, 6, (5, 1)))).sum(0)
    curve = radius * r.clip(0.2, 2)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    return _turned(rng, curve)


def _polygon(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Corners (n, 2): boxes and irregular polygons."""
    if rng.random() < 0.4:
        return _turned(rng, radius * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.8)
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
    corners = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.6, 1, (len(angles), 1))
    return _turned(rng, radius * corners)


def _turned(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    angle, aspect = rng.uniform(0, np.pi), np.exp(rng.normal(0, 0.35))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points * [aspect**0.5, aspect**-0.5] @ turn


def _fill(alpha: np.ndarray, points: np.ndarray, value: int = 255) -> None:
    """Fill a polygon with sixteenths of a pixel."""
    cv2.fillPoly(alpha, [np.round(points * 16).astype(np.int32)], value, cv2.LINE_AA, shift=4)


def _band(rng: np.random.Generator, size: int) -> np.ndarray:
    x = np.linspace(0, size, 32)
    slope, waviness = rng.normal(0, 0.1), rng.uniform(0, 0.05)
    line = size * rng.uniform(0.25, 0.75) + slope * (x - size / 2)
    line += waviness * size * np.sin(x / size * rng.uniform(2, 20) + rng.uniform(0, 6))
    alpha = np.zeros((size, size), np.uint8)
    _fill(alpha, np.concatenate([np.stack([x, line], 1), [[size, size], [0, size]]]))
    if rng.random() < 0.4:  # a wall or a sky instead of a ground
        alpha = alpha[::-1] if rng.random() < 0.5 else alpha.T
    return alpha.astype(np.float32) / 255


def _part(rng: np.random.Generator, alpha: np.ndarray, extent: float) -> np.ndarray:
    """The alpha of a patch on the object: an eye, a label, a stripe."""
    inside = np.argwhere(alpha > 0.5)
    part = np.zeros(alpha.shape, np.uint8)
    if len(inside):
        centre = inside[rng.integers(len(inside))][::-1]
        _fill(part, centre + _blob(rng, extent * rng.uniform(0.05, 0.3)))
    return part.astype(np.float32) / 255 * alpha


def _placed(rng: np.random.Generator, cutout: np.ndarray, size: int, extent: float) -> tuple[np.ndarray, np.ndarray]:
    """A cut-out turned, mirrored, stretched and put somewhere: RGB float32, alpha float32."""
    height, width = cutout.shape[:2]
    scale = extent / max(height, width)
    if scale < 1:
        shape = (max(2, int(width * scale)), max(2, int(height * scale)))
        cutout, scale = cv2.resize(cutout, shape, interpolation=cv2.INTER_AREA), 1.0
        height, width = cutout.shape[:2]
    angle = rng.normal(0, 0.2) if rng.random() < 0.8 else rng.uniform(-np.pi, np.pi)
    stretch = np.exp(rng.normal(0, 0.12))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    turn = turn @ np.diag([stretch * rng.choice([-1, 1]), 1 / stretch])
    shift = rng.uniform(0.1, 0.9, 2) * size - turn @ np.array([width / 2, height / 2])
    warped = cv2.warpAffine(
        cutout, np.column_stack([turn, shift]), (size, size), flags=cv2.INTER_LINEAR, borderValue=(0, 0, 0, 0)
    )
    return warped[..., :3].astype(np.float32), warped[..., 3].astype(np.float32) / 255


def _relit(rng: np.random.Generator, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Light from one side, and another exposure and tint, where alpha is not 0. Changes `colour`."""
    rows, columns = bounds = _bounds(alpha)
    along = np.arange(len(alpha), dtype=np.float32) / len(alpha) - 0.5
    across, down = rng.normal(0, 0.4, 2)
    light = rng.uniform(0.7, 1.3) * (1 + across * along[columns] + down * along[rows, None])
    lit = colour[bounds] * light[..., None]
    lit *= rng.normal(1, 0.06, 3)
    colour[bounds] = lit.clip(0, 255, out=lit)
    return colour


def _bounds(alpha: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns outside which alpha is 0: most objects are small, the rest is work saved."""
    left, top, width, height = cv2.boundingRect((alpha > 0).view(np.uint8))
    return slice(top, top + height), slice(left, left + width)


def _blend(below: np.ndarray, above: np.ndarray, alpha: np.ndarray, bounds: tuple[slice, slice]) -> None:
    """Lay `above` over `below`, in place, within `bounds`."""
    part = below[bounds]
    part += alpha[bounds][..., None] * (above[bounds] - part)


def _shadow(rng: np.random.Generator, alpha: np.ndarray) -> np.ndarray:
    """How much light an object takes from what lies behind it, 0-1."""
    size = alpha.shape[0]
    across, down = rng.normal(0, 0.03 * size, 2)
    moved = cv2.warpAffine(alpha, np.array([[1, 0, across], [0, 1, down]]), (size, size))
    return cv2.GaussianBlur(moved, (0, 0), rng.uniform(0.01, 0.04) * size) * rng.uniform(0.2, 0.7)


def _photographed(rng: np.random.Generator, image: np.ndarray, difficulty: float) -> np.ndarray:
    """What a camera does: blur, exposure, noise, JPEG. Returns uint8."""
    if rng.random() < 0.3 * difficulty:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.0))
    image = (image - 128) * rng.uniform(0.7, 1.2) + 128 + rng.normal(0, 12) + rng.normal(0, 5, 3)
    if rng.random() < 0.5 * difficulty:
        image = image + rng.normal(0, rng.uniform(1, 14), image.shape)
    image = image.clip(0, 255).astype(np.uint8)
    if rng.random() < 0.4 * difficulty:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))]
        image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_COLOR)
    return image
