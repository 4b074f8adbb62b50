"""A bar chart as SVG: a group for each task, a bar for each program, on a logarithmic scale."""

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

COLOURS = ("#9aa0a6", "#d7a13b", "#7a5c9e", "#1a73b8", "#2e8b57")
LEFT, WIDTH, BAR, GAP, TOP = 170, 560, 16, 18, 64  # pixels


def bars(groups: Mapping[str, Mapping[str, float]], title: str) -> str:
    """groups: by task, and in each by program, a positive number."""
    programs = list(dict.fromkeys(name for group in groups.values() for name in group))
    numbers = [number for group in groups.values() for number in group.values()]
    low, high = math.floor(math.log10(min(numbers))), math.ceil(math.log10(max(numbers)))

    def length(number: float) -> float:
        return max((math.log10(number) - low) / max(high - low, 1) * WIDTH, 1)

    parts, y = [f'<text x="12" y="22" font-weight="bold">{escape(title)}</text>'], TOP
    for index, name in enumerate(programs):
        x = 12 + 150 * index
        parts.append(f'<rect x="{x}" y="34" width="12" height="12" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 18}" y="44">{escape(name)}</text>')
    for task, group in groups.items():
        parts.append(f'<text x="{LEFT - 10}" y="{y + 12}" text-anchor="end">{escape(task)}</text>')
        for name, number in group.items():
            colour, width = COLOURS[programs.index(name) % len(COLOURS)], length(number)
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 11}">{number:.3g}</text>')
            y += BAR
        y += GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{y}" font-family="sans-serif"'
    return "\n".join(
        [f'{head} font-size="12">', '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""]
    )
