"""Uploads and results that are kept for a while, so that many requests about one picture send it once, or never."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from contract.pictures import name_of
from serve.errors import BadRequest, RequestTooLarge
from serve.gateway.peers import ALONE, Peers, marked, unmarked
from serve.memory_file import MemoryFile, Part, whole

MOST = 500
"""Pictures at once: each takes a descriptor."""


class UnknownImage(BadRequest):
    status, code = 404, "image_not_found"

    def __init__(self, name: str, field: str) -> None:
        super().__init__(
            f"{field}: there is no image {name[:60]!r} (any more): upload it again with POST /v1/images", field
        )


@dataclass
class _Kept:
    file: MemoryFile
    size: int
    last_used: float


class Images:
    """Pictures by the hash of their bytes, in memory, for `seconds` since their last use.

    max_bytes: of all together; past it, or past MOST of them, those unused longest go first. peers: who may have what
    is not here. now: seconds on any clock that does not go back.
    """

    def __init__(
        self,
        max_bytes: int,
        seconds: float,
        peers: Peers = ALONE,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes, self.seconds, self._peers, self._now = max_bytes, seconds, peers, now
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self._size

    def check(self, size: int, field: str) -> None:
        """Raises RequestTooLarge, which names the field, where so many bytes alone exceed the bound."""
        if size > self.max_bytes:
            raise RequestTooLarge(
                f"{field}: {size / 2**20:.0f} MiB would have to be kept; all uploads and results that are kept may take"
                f" {self.max_bytes >> 20} MiB together (PALIMPSEST_IMAGES_MIB)",
                field,
            )

    async def put(self, image: Part, field: str = "image") -> str:
        """Keeps a copy and returns its id, which is the same for the same bytes. Raises as check."""
        self.check(image.size, field)
        name, file = await asyncio.to_thread(_copied, image)
        if name in self._kept:
            file.close()
        else:
            self._kept[name] = _Kept(file, image.size, self._now())
            self._size += image.size
        self._touch(name)
        self._forget()
        return marked(name, self._peers.box)

    async def get(self, name: str, field: str) -> tuple[str, MemoryFile]:
        """Its name among all pictures, and the file, which is the caller's to close.

        Raises UnknownImage, which names the field, where it is unknown or has expired.
        """
        plain, box = unmarked(name)
        found = self.find(plain)
        if found is None and box not in ("", self._peers.box):
            await self._fetch(plain, box, field)
            found = self.find(plain)
        if found is None:
            raise UnknownImage(name, field)
        return plain, found

    def find(self, plain: str) -> MemoryFile | None:
        """The caller's to close; None where there is none here."""
        self._forget()
        if plain not in self._kept:
            return None
        self._touch(plain)
        return self._kept[plain].file.duplicate()

    async def _fetch(self, plain: str, box: str, field: str) -> None:
        """Keeps here what the box has, if it has."""
        picture = await self._peers.picture(box, plain)
        if picture is not None:
            with MemoryFile() as file:
                await asyncio.to_thread(file.write, picture)
                await self.put(whole(file), field)

    def close(self) -> None:
        """Forgets all."""
        for kept in self._kept.values():
            kept.file.close()
        self._kept.clear()
        self._size = 0

    def _touch(self, name: str) -> None:
        self._kept[name].last_used = self._now()
        self._kept.move_to_end(name)

    def _forget(self) -> None:
        """The oldest are first."""
        while self._kept:
            name, oldest = next(iter(self._kept.items()))
            few = self._size <= self.max_bytes and len(self._kept) <= MOST
            if few and self._now() - oldest.last_used <= self.seconds:
                return
            del self._kept[name]
            self._size -= oldest.size
            oldest.file.close()


def _copied(image: Part) -> tuple[str, MemoryFile]:
    """Copies the picture piece by piece, so that the event loop runs in between; returns its id and the copy."""
    file, digest = MemoryFile(), hashlib.sha256()
    try:
        for piece in image.pieces():
            digest.update(piece)
            file.write(piece)
        file.seal()
    except BaseException:
        file.close()
        raise
    return name_of(digest.digest()), file
