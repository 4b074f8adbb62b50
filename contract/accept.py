"""The kinds of replies, and which of them an Accept header likes best."""

import re
from collections.abc import Container

JSON = "application/json"
PICTURES = ("image/png", "image/jpeg", "image/webp", "image/tiff")
OWN = "image/*"
"""The request's picture's own kind."""

_QUALITY = re.compile(r"q=([01](?:\.[0-9]*)?)")
_MAX_KINDS = 50  # that are looked at: a client can name 10,000


def preferred(header: str, kinds: Container[str], default: str) -> str:
    """The one of `kinds` with the highest quality, of several the first; */* stands for the default."""
    ranked: list[tuple[float, int, str]] = []
    for position, item in enumerate(header.lower().split(",", _MAX_KINDS)[:_MAX_KINDS]):
        kind, *parameters = (part.strip() for part in item.split(";"))
        kind = default if kind == "*/*" else kind
        quality = _quality(next((p for p in parameters if p.startswith("q=")), "q=1"))
        if quality and kind in kinds:
            ranked.append((-quality, position, kind))
    return min(ranked)[2] if ranked else default


def _quality(parameter: str) -> float:
    """0, which is never, where it is none."""
    match = _QUALITY.fullmatch(parameter)
    return float(match[1]) if match else 0.0
