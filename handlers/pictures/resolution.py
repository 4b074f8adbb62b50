"""How large a picture is to be printed, or how far from square its pixels are, in each format's own units."""

from typing import NamedTuple

from handlers.pictures import exif_tags as tags
from handlers.pictures.exif import Entry, Exif, Order, entry

_INCH, _CM = 2, 3  # TIFF's units; 1 is none
_STEPS = 10_000  # to an inch's pixel: PNG's pixels per metre and whole numbers per cm come out exactly


class Resolution(NamedTuple):
    """per_inch: x and y are pixels per inch; else only x / y means anything, and y is 1."""

    x: float
    y: float
    per_inch: bool = True

    def turned(self, orientation: int) -> "Resolution":
        """Returns it for a picture that was turned as EXIF's orientation says."""
        if orientation < 5:
            return self
        return self._replace(x=self.y, y=self.x) if self.per_inch else self._replace(x=1 / self.x)


def from_png(per_metre: int, down: int, unit: int) -> Resolution | None:
    return _inches(per_metre * 0.0254, down * 0.0254) if unit == 1 else _ratio(per_metre, down)


def to_png(resolution: Resolution) -> tuple[int, int, int]:
    """Across, down, and PNG's unit."""
    if resolution.per_inch:
        return round(resolution.x / 0.0254), round(resolution.y / 0.0254), 1
    return round(resolution.x * _STEPS), _STEPS, 0


def from_jfif(unit: int, x: int, y: int) -> Resolution | None:
    scale = {1: 1, 2: 2.54}.get(unit)
    return _inches(x * scale, y * scale) if scale else _ratio(x, y)


def to_jfif(resolution: Resolution) -> tuple[int, int, int] | None:
    """JFIF's unit, across, down; None where its 16 bits can't say it."""
    if not resolution.per_inch:
        across = round(resolution.x * _STEPS)
        return (0, across, _STEPS) if across < 65_536 else None

    def written(unit: int, scale: float) -> tuple[float, tuple[int, int, int]]:
        x, y = round(resolution.x / scale), round(resolution.y / scale)
        return max(abs(x * scale / resolution.x - 1), abs(y * scale / resolution.y - 1)), (unit, x, y)

    _, best = min(written(1, 1), written(2, 2.54))
    return best if all(0 < value < 65_536 for value in best[1:]) else None


def from_exif(exif: Exif) -> Resolution | None:
    x, y = (_rational(exif.order, exif.find(tag)) for tag in (tags.X_RESOLUTION, tags.Y_RESOLUTION))
    unit = exif.find(tags.RESOLUTION_UNIT)
    code = int.from_bytes(unit.value, "little" if exif.order == "<" else "big") if unit else _INCH
    if code in (_INCH, _CM):
        scale = 1 if code == _INCH else 2.54
        return _inches(x * scale, y * scale)
    return _ratio(x, y)


def to_exif(resolution: Resolution, order: Order) -> tuple[Entry, ...]:
    def rational(tag: int, value: float) -> Entry:
        return entry(order, tag, tags.RATIONAL, *_fraction(value))

    unit = entry(order, tags.RESOLUTION_UNIT, tags.SHORT, _INCH if resolution.per_inch else 1)
    return rational(tags.X_RESOLUTION, resolution.x), rational(tags.Y_RESOLUTION, resolution.y), unit


def _fraction(value: float) -> tuple[int, int]:
    steps = round(value * _STEPS)
    return (steps // _STEPS, 1) if steps % _STEPS == 0 else (steps, _STEPS)


def _rational(order: Order, found: Entry | None) -> float:
    """0 for none, and for one without a value."""
    if found is None or len(found.value) != 8:
        return 0
    name = "little" if order == "<" else "big"
    numerator, denominator = (int.from_bytes(part, name) for part in (found.value[:4], found.value[4:]))  # type: ignore[arg-type]
    return numerator / denominator if denominator else 0


def _inches(x: float, y: float) -> Resolution | None:
    return Resolution(x, y) if 0.01 <= x < 100_000 and 0.01 <= y < 100_000 else None


def _ratio(x: float, y: float) -> Resolution | None:
    """None for square pixels, too: they need no word."""
    return Resolution(x / y, 1, per_inch=False) if y and x != y and 0.01 <= x / y <= 100 else None
