"""What the calls return."""

import io
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from palimpsest import composing, files
from palimpsest.composing import Box
from palimpsest.sources import Source


@dataclass(eq=False)
class Segmentation(Source):
    """The mask of what was selected; other calls take it as their `mask`.

    score: the model's guess, about 0 to 1, at how well the mask fits, before erode and the like. box: around the
    mask, None where that is empty. area: pixels. candidates: with masks="all", the three or one that there are, in the
    model's order. logits: on request, for the next call to refine this mask. warnings: what had no effect. timings:
    milliseconds by stage.

    Example: `found.mask.mean()`, the share of the picture that was selected.
    """

    id: str | None
    data: bytes = field(repr=False)
    """The mask's PNG as the server wrote it: grey, 0 and 255."""
    score: float
    box: Box | None
    area: int
    logits: str | None = field(default=None, repr=False)
    candidates: tuple["Segmentation", ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def scores(self) -> list[float]:
        """Of the candidates; where there are none, of this mask alone."""
        return [each.score for each in self.candidates or (self,)]

    @cached_property
    def image(self) -> Image.Image:
        """The mask as a Pillow picture of mode L: 255 where marked, else 0."""
        return composing.opened(self.data)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """HxW bool, True where marked; as large as the upright picture."""
        return composing.marked(self.data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask's PNG. Raises ValueError for a path that ends on anything else than .png, and OSError.

        Example: `found.save("dog.png")`.
        """
        if files.format_of(path) != "png":
            raise ValueError(f"{os.fspath(path)}: a mask is a PNG, name the file so")
        files.write(Path(path), self.data)


class Made(NamedTuple):
    """How an edit came about, so that it can be made again. pictures: image and mask by field."""

    verb: str
    pictures: dict[str, Source]
    fields: dict[str, Any]


@dataclass(eq=False)
class Edited(Source):
    """An edited picture; other calls take it as their `image`.

    box: what changed, None where the whole picture was asked for as a file. seed: the one that was used; None of an
    erasure. parameters: what decided how it was painted. selected: the mask that points or box became, or that of the
    Segmentation which was given; None where the request brought another. variants: all of them, this one the first.
    warnings: what had no effect, or was left out. timings: milliseconds by stage.

    Example: `edit.image.crop(edit.box)`, what was painted anew.
    """

    id: str | None
    data: bytes | None = field(repr=False)
    """The whole picture's file, where it came here; else there is a patch."""
    patch: bytes | None = field(repr=False)
    box: Box | None
    made: Made = field(repr=False)
    selected: bytes | None = field(default=None, repr=False)
    seed: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()
    timings: dict[str, float] = field(default_factory=dict, repr=False)
    variants: "tuple[Edited, ...]" = field(default=(), repr=False)

    @cached_property
    def image(self) -> Image.Image:
        """The whole picture, upright, as Pillow reads the whole result's file: modes L, LA, RGB, RGBA or I;16."""
        below, patches = self.layers()
        return composing.composed(below, patches)

    @cached_property
    def mask(self) -> NDArray[np.bool_] | None:
        """HxW bool, True where it was painted; None where the request brought a mask that is no Segmentation."""
        return None if self.selected is None else composing.marked(self.selected)

    def layers(self) -> tuple[bytes, list[tuple[bytes, Box]]]:
        """The file below, and the patches on it in their order."""
        patches: list[tuple[bytes, Box]] = []
        below: Source = self
        while isinstance(below, Edited) and below.data is None:
            assert below.patch is not None
            assert below.box is not None
            patches.append((below.patch, below.box))
            below = below.made.pictures["image"]
        assert below.data is not None  # else all of it was fetched (core.py)
        return below.data, patches[::-1]

    def png(self) -> bytes:
        """`image` as a file, without metadata."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


@dataclass(frozen=True)
class Model:
    """An archive that the server can load. place: gpu, memory, parked, suspended or disk. queue: requests that wait.

    leases: requests that run. last_error: of its last load, if that failed.

    Example: `model.state == "ready" and not model.queue`.
    """

    name: str
    version: str | None
    place: str
    state: str
    pinned: bool
    leases: int
    queue: int
    requests: int
    last_error: str | None
