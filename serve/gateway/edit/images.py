"""Uploads that are kept for a while, so that many requests about one picture send it once."""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve.errors import BadRequest, RequestTooLarge

PREFIX = "img_"


class UnknownImage(BadRequest):
    status, code = 404, "image_not_found"


@dataclass
class _Kept:
    data: bytes
    last_used: float


class Images:
    """Pictures by the hash of their bytes, in memory, for `seconds` since their last use.

    max_bytes: of all together; past it those unused longest go first. now: seconds on any clock that does not go back.
    """

    def __init__(self, max_bytes: int, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.max_bytes, self.seconds, self._now = max_bytes, seconds, now
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._size = 0

    def put(self, data: bytes) -> str:
        """Returns the id. The same bytes have the same id. Raises RequestTooLarge where they alone exceed the bound."""
        if len(data) > self.max_bytes:
            raise RequestTooLarge(
                f"image has {len(data) / 2**20:.0f} MiB; uploads may take {self.max_bytes >> 20} MiB together"
                " (PALIMPSEST_IMAGES_MIB)",
                "image",
            )
        name = PREFIX + hashlib.sha256(data).hexdigest()[:40]
        if name not in self._kept:
            self._kept[name] = _Kept(data, self._now())
            self._size += len(data)
        self._touch(name)
        self._forget()
        return name

    def get(self, name: str, field: str) -> bytes:
        """Raises UnknownImage, which names the field, where it is unknown or has expired."""
        self._forget()
        if name not in self._kept:
            raise UnknownImage(
                f"{field}: there is no image {name[:60]!r} (any more): upload it again with POST /v1/images", field
            )
        self._touch(name)
        return self._kept[name].data

    def _touch(self, name: str) -> None:
        self._kept[name].last_used = self._now()
        self._kept.move_to_end(name)

    def _forget(self) -> None:
        """The oldest are first."""
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            if self._size <= self.max_bytes and self._now() - oldest.last_used <= self.seconds:
                return
            del self._kept[name]
            self._size -= len(oldest.data)
