"""Made pictures for the Stable Diffusion demo: a thing of some colour and material in a hole of a photograph.

The vocabulary is `COLOURS` x `THINGS` x `MATERIALS`; a prompt names any part of it. A fifth of the combinations is kept
out of training (`is_held_out`), so that evaluation asks for what was never shown.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Points = np.ndarray
# Tone 1 is the thing's own colour, below 1 darker, above 1 towards white (2 is white).
Part = tuple[Points, float]

SIZE = 256  # pixels, width and height of every picture
SUPERSAMPLING = 3
COLOURS = {  # RGB
    "red": (215, 30, 35),
    "orange": (240, 130, 20),
    "yellow": (240, 220, 40),
    "green": (45, 165, 55),
    "cyan": (40, 200, 205),
    "blue": (40, 75, 215),
    "purple": (130, 50, 195),
    "pink": (240, 100, 180),
}


@dataclass(frozen=True)
class Thing:
    """What a prompt names; `thing` None is the empty background."""

    colour: str
    thing: str | None
    material: str = "plain"


def is_held_out(thing: Thing) -> bool:
    """Whether training never sees this combination: one in five, fixed for ever."""
    return zlib.crc32(f"{thing.colour} {thing.material} {thing.thing}".encode()) % 5 == 0


def random_thing(rng: np.random.Generator, held_out: bool = False, background: float = 0.0) -> Thing:
    """A uniformly drawn combination, held out or not; with probability `background` the empty background."""
    if rng.random() < background:
        return Thing("red", None)
    while True:
        thing = Thing(*(str(rng.choice(list(words))) for words in (COLOURS, THINGS, MATERIALS)))
        if is_held_out(thing) == held_out:
            return thing


def prompt(thing: Thing, rng: np.random.Generator | None = None) -> str:
    """The words for `thing`: all that is known of it, or with `rng` a random way to say some of it."""
    if thing.thing is None:
        return "empty background" if rng is None else str(rng.choice(["empty background", "background", "nothing"]))
    material = "" if thing.material == "plain" else thing.material
    if rng is None:
        return " ".join(f"a {thing.colour} {material} {thing.thing}".split())
    adjectives = [word for word, keep in ((thing.colour, 0.9), (material, 0.85)) if rng.random() < keep]
    rng.shuffle(adjectives)
    noun = thing.thing if rng.random() < 0.92 else ""
    opening = str(rng.choice(["a", "a", "", "the", "one", "a photo of a", "a picture of a"]))
    return " ".join(" ".join([opening, *adjectives, noun, _aside(rng)]).split())


def _aside(rng: np.random.Generator) -> str:
    """Now and then words that mean nothing here, so that unknown ones do no harm."""
    if rng.random() < 0.85:
        return ""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return "".join(rng.choice(letters, rng.integers(2, 8)))


def random_hole(rng: np.random.Generator) -> np.ndarray:
    """A hole (SIZE, SIZE) bool of 45 to 88 pixels radius: an ellipse, rectangle or blob, whatever will fill it."""
    radius = rng.uniform(45, 88)
    aspect = rng.uniform(1, 1.3) ** rng.choice([-0.5, 0.5])
    angle = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    exponent = float(rng.choice([2, 2, 8]))  # of a superellipse: 2 is an ellipse, 8 nearly a rectangle
    reach = (np.abs(np.cos(angle)) ** exponent + np.abs(np.sin(angle)) ** exponent) ** (-1 / exponent)
    if rng.random() < 0.4:
        for wave in range(2, 7):
            reach *= 1 + rng.normal(0, 0.22) / wave * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    outline = np.stack([np.cos(angle) * reach * aspect, np.sin(angle) * reach / aspect], axis=1)
    outline = _rotate(outline, rng.uniform(-0.3, 0.3)) * radius
    low, high = 4 - outline.min(axis=0), SIZE - 4 - outline.max(axis=0)
    centre = np.where(low < high, rng.uniform(np.minimum(low, high), np.maximum(low, high)), SIZE / 2)
    hole = np.zeros((SIZE, SIZE), np.uint8)
    cv2.fillPoly(hole, [np.round(outline + centre).astype(np.int32)], 1)
    return hole.astype(bool)


def compose(background: np.ndarray, hole: np.ndarray, thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """`background` uint8 RGB (SIZE, SIZE, 3) with `thing` in the largest disc that fits into `hole`."""
    if thing.thing is None:
        return background
    distance = cv2.distanceTransform(np.pad(hole, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    radius = int(distance.max() * rng.uniform(0.94, 1.0))
    row, column = np.argwhere(distance > 0.97 * distance.max()).mean(axis=0).astype(int).clip(radius, SIZE - radius)
    colours, opacity = draw(thing, radius, rng)
    picture = background.copy()
    window = picture[row - radius : row + radius, column - radius : column + radius]
    window[:] = np.round(window + (colours - window) * opacity[..., None])
    return picture


def draw(thing: Thing, radius: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The thing's colours float32 RGB (2 radius, 2 radius, 3) in 0..255 and its opacity (2 radius, 2 radius) in 0..1.

    It stands upright, within about 8 degrees.
    """
    assert thing.thing is not None
    side = 2 * radius * SUPERSAMPLING
    tilt = rng.normal(0, 0.07)
    tone = np.zeros((side, side), np.float32)
    inside = np.zeros((side, side), np.float32)
    for points, part_tone in THINGS[thing.thing]():
        polygon = [np.round((_rotate(points, tilt) + 1) * radius * SUPERSAMPLING).astype(np.int32)]
        cv2.fillPoly(tone, polygon, part_tone)
        cv2.fillPoly(inside, polygon, 1)
    tone, inside = (
        cv2.resize(layer, (2 * radius, 2 * radius), interpolation=cv2.INTER_AREA) for layer in (tone, inside)
    )
    tone /= np.maximum(inside, 1e-3)
    v, u = np.mgrid[-radius:radius, -radius:radius].astype(np.float32) / radius
    light, whiteness, opacity = MATERIALS[thing.material](u, v, rng)
    light = light * np.minimum(tone, 1) * (1.05 - 0.18 * (u + v))
    white = np.clip(whiteness + np.maximum(tone - 1, 0), 0, 1)[..., None]
    colour = np.array(COLOURS[thing.colour], np.float32) + rng.normal(0, 6, 3).astype(np.float32)
    lit = colour * light[..., None]
    return np.clip(lit + (255 - lit) * white, 0, 255), inside * opacity


def background(photographs: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A random square of a photograph, or now and then a made texture, uint8 RGB (SIZE, SIZE, 3)."""
    if rng.random() < 0.2:
        return _texture(rng)
    photograph = photographs[rng.integers(len(photographs))]
    height, width = photograph.shape[:2]
    side = int(rng.uniform(0.45, 1) * min(height, width))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    crop = photograph[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA if side > SIZE else cv2.INTER_LINEAR)


def _texture(rng: np.random.Generator) -> np.ndarray:
    grey = rng.uniform(30, 225, (2, 1)).astype(np.float32)
    ends = grey + rng.normal(0, 25, (2, 3)).astype(np.float32)
    mix = 0.5 + 0.35 * _noise(rng, int(rng.integers(2, 24)), SIZE)[..., None]
    grain = rng.normal(0, rng.uniform(0, 8), (SIZE, SIZE, 1)).astype(np.float32)
    return np.clip(ends[0] * mix + ends[1] * (1 - mix) + grain, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, cells: int, side: int) -> np.ndarray:
    """Smooth noise (side, side) float32 of standard deviation about 0.7 with `cells` bumps across."""
    coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def _rotate(points: Points, angle: float) -> Points:
    cosine, sine = np.cos(angle), np.sin(angle)
    return points @ np.array([[cosine, sine], [-sine, cosine]])


# ---- things: parts from back to front, in a disc of radius 1, y down -------------------------------------------


def _ellipse(x: float, y: float, a: float, b: float | None = None, start: float = 0, stop: float = 360) -> Points:
    angle = np.radians(np.linspace(start, stop, 49))
    return np.stack([x + a * np.cos(angle), y + (a if b is None else b) * np.sin(angle)], axis=1)


def _polygon(*corners: tuple[float, float]) -> Points:
    return np.array(corners, float)


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom))


def _ball() -> list[Part]:
    return [(_ellipse(0, 0, 0.97), 1), (_ellipse(-0.35, -0.38, 0.2), 1.7)]


def _cube() -> list[Part]:
    return [
        (_polygon((0, -0.05), (0.82, -0.48), (0.82, 0.48), (0, 0.97)), 0.55),
        (_polygon((0, -0.05), (-0.82, -0.48), (-0.82, 0.48), (0, 0.97)), 0.85),
        (_polygon((0, -0.97), (0.82, -0.48), (0, -0.02), (-0.82, -0.48)), 1.35),
    ]


def _star() -> list[Part]:
    angle = np.radians(np.arange(10) * 36 - 90)
    reach = np.where(np.arange(10) % 2, 0.48, 1.0)
    return [(np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=1), 1)]


def _heart() -> list[Part]:
    t = np.linspace(0, 2 * np.pi, 80)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [(np.stack([x / 17, (y - 2) / 17], axis=1), 1)]


def _moon() -> list[Part]:
    outer = _ellipse(0.1, 0, 0.97, start=55, stop=305)
    inner = _ellipse(0.62, 0, 0.8, start=262, stop=98)
    return [(np.concatenate([outer, inner]), 1)]


def _house() -> list[Part]:
    return [
        (_box(-0.66, -0.15, 0.66, 0.75), 1),
        (_polygon((-0.92, -0.12), (0, -0.97), (0.92, -0.12)), 0.55),
        (_box(-0.18, 0.2, 0.18, 0.75), 0.25),
        (_box(0.3, 0.08, 0.54, 0.34), 1.9),
        (_box(-0.54, 0.08, -0.3, 0.34), 1.9),
    ]


def _tree() -> list[Part]:
    tiers = [(_polygon((-w, y), (0, y - 0.8), (w, y)), 1.0) for w, y in ((0.78, 0.62), (0.64, 0.22), (0.48, -0.17))]
    return [(_box(-0.14, 0.55, 0.14, 0.97), 0.35), *tiers]


def _fish() -> list[Part]:
    return [
        (_polygon((0.4, 0), (0.97, -0.5), (0.85, 0), (0.97, 0.5)), 0.7),
        (_polygon((-0.3, -0.3), (0.1, -0.75), (0.35, -0.3)), 0.7),
        (_ellipse(-0.2, 0, 0.77, 0.5), 1),
        (_ellipse(-0.6, -0.12, 0.13), 1.95),
        (_ellipse(-0.62, -0.12, 0.06), 0.05),
    ]


def _flower() -> list[Part]:
    angles = np.radians(np.arange(6) * 60 + 30)
    petals = [(_ellipse(0.6 * np.cos(a), 0.6 * np.sin(a), 0.37), 1.0) for a in angles]
    return [*petals, (_ellipse(0, 0, 0.42), 1.0), (_ellipse(0, 0, 0.28), 0.3)]


def _mushroom() -> list[Part]:
    spots = [(_ellipse(x, y, 0.12), 1.85) for x, y in ((-0.45, -0.3), (0, -0.55), (0.45, -0.3))]
    return [(_box(-0.24, -0.1, 0.24, 0.92), 1.65), (_ellipse(0, 0.05, 0.97, 0.92, 180, 360), 1.0), *spots]


def _cup() -> list[Part]:
    handle = np.concatenate([_ellipse(0.45, 0.05, 0.5, 0.45, -90, 90), _ellipse(0.45, 0.05, 0.28, 0.24, 90, -90)])
    return [
        (handle, 0.8),
        (_polygon((-0.8, -0.55), (0.55, -0.55), (0.38, 0.8), (-0.63, 0.8)), 1),
        (_ellipse(-0.125, -0.55, 0.675, 0.2), 0.4),
    ]


def _car() -> list[Part]:
    wheels = [(_ellipse(x, 0.42, 0.24), 0.12) for x in (-0.5, 0.5)]
    hubs = [(_ellipse(x, 0.42, 0.1), 1.7) for x in (-0.5, 0.5)]
    return [
        (_polygon((-0.6, -0.05), (-0.36, -0.55), (0.32, -0.55), (0.62, -0.05)), 1),
        (_polygon((-0.95, -0.05), (0.75, -0.05), (0.96, 0.1), (0.96, 0.42), (-0.95, 0.42)), 1),
        (_polygon((-0.44, -0.08), (-0.28, -0.43), (-0.04, -0.43), (-0.04, -0.08)), 1.85),
        (_polygon((0.06, -0.08), (0.06, -0.43), (0.26, -0.43), (0.46, -0.08)), 1.85),
        *wheels,
        *hubs,
    ]


THINGS: dict[str, Callable[[], list[Part]]] = {
    "ball": _ball,
    "box": _cube,
    "star": _star,
    "heart": _heart,
    "moon": _moon,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "flower": _flower,
    "mushroom": _mushroom,
    "cup": _cup,
    "car": _car,
}

# ---- materials: (light, whiteness, opacity) over the thing's own coordinates -----------------------------------

Surface = tuple[np.ndarray | float, np.ndarray | float, np.ndarray | float]


def _plain(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    return 1.0, 0.0, 1.0


def _wooden(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    rings = np.sin(2 * np.pi * (3.2 * v + 0.35 * np.sin(2.2 * u + rng.uniform(0, 6)) + 0.2 * _noise(rng, 5, len(u))))
    return 0.78 + 0.24 * rings, 0.0, 1.0


def _metal(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    along = u + v
    gleam = np.exp(-(((along + 0.45) / 0.16) ** 2)) + 0.6 * np.exp(-(((along - 0.75) / 0.1) ** 2))
    return 0.85 - 0.3 * np.cos(3 * along), 0.8 * gleam, 1.0


def _glass(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    gleam = np.exp(-((((u + 0.35) ** 2 + (v + 0.4) ** 2) / 0.06) ** 2))
    return 1.05, 0.85 * gleam, 0.6 + 0.35 * gleam


def _striped(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    stripes = np.clip(0.5 + 6 * np.sin(2 * np.pi * (1.7 * (u - v) + 0.1 * rng.normal())), 0, 1)
    return 1.0, 0.85 * stripes, 1.0


def _dotted(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    dots = np.clip(0.5 + 5 * (np.cos(2 * np.pi * 2 * u) + np.cos(2 * np.pi * 2 * v) - 0.9), 0, 1)
    return 1.0, 0.9 * dots, 1.0


def _stone(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> Surface:
    return 0.72 + 0.17 * _noise(rng, 7, len(u)) + 0.1 * _noise(rng, 16, len(u)), 0.1, 1.0


MATERIALS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], Surface]] = {
    "plain": _plain,
    "wooden": _wooden,
    "metal": _metal,
    "glass": _glass,
    "striped": _striped,
    "dotted": _dotted,
    "stone": _stone,
}
