"""JPEG: how one was coded, so that the reply is coded alike; and the segments beside its pixels."""

import struct
from collections.abc import Iterable

from handlers.pictures.picture import JpegCoding

APP0, APP1, APP2, COM, DQT, SOS = 0xE0, 0xE1, 0xE2, 0xFE, 0xDB, 0xDA
JFIF, EXIF, XMP, ICC = b"JFIF\0", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"
MAX_SEGMENT = 65_533
_MAX_TABLES = 1000  # in a file: more are no picture's
_ICC_PART = MAX_SEGMENT - len(ICC) - 2
# Where each of the file's 64 table entries lies in the block, row by row.
_ZIGZAG = sorted(range(64), key=lambda i: (s := i // 8 + i % 8, i // 8 if s % 2 else i % 8))


class CodingReader:
    """Watches a JPEG's segments go by; `coding` is what they say, None for CMYK and for what is damaged."""

    def __init__(self) -> None:
        self._tables: dict[int, bytes] = {}  # as in the file, of 64 or 128 bytes
        self._seen = 0
        self._used: dict[int, bytes] = {}  # by component: the table that was in force at its first scan
        self._components: list[tuple[int, int, int, int]] = []  # id, samples across and down, table
        self._jfif = False
        self._adobe: int | None = None

    def see(self, marker: int, data: bytes) -> None:
        if marker == DQT:
            self._see_tables(data)
        elif marker == APP0 and data.startswith(JFIF):
            self._jfif = True
        elif marker == 0xEE and data.startswith(b"Adobe") and len(data) >= 12:
            self._adobe = data[11]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and not self._components:
            rows = [data[i : i + 3] for i in range(6, len(data) - 2, 3)]
            self._components = [(row[0], row[1] >> 4, row[1] & 15, row[2]) for row in rows]
        elif marker == SOS:
            scanned = set(data[1 : 1 + 2 * data[0] : 2]) if data else set()
            for name, _, _, table in self._components:
                if name in scanned and table in self._tables:
                    self._used.setdefault(name, self._tables[table])

    @property
    def coding(self) -> JpegCoding | None:
        names = [name for name, *_ in self._components]
        if len(names) not in (1, 3) or set(names) - set(self._used):
            return None
        tables = [_row_by_row(self._used[name]) for name in names]
        while len(tables) > 1 and tables[-1] == tables[-2]:
            tables.pop()  # the last one is used for all further components
        if self._is_rgb(names):  # which Pillow writes without subsampling only
            return JpegCoding(tuple(tables), 0, rgb=True)
        return JpegCoding(tuple(tables), self._subsampling())

    def _see_tables(self, data: bytes) -> None:
        at = 0
        while at < len(data) and self._seen < _MAX_TABLES:
            size = 128 if data[at] >> 4 else 64
            self._tables[data[at] & 15] = data[at + 1 : at + 1 + size]
            at += 1 + size
            self._seen += 1

    def _subsampling(self) -> int:
        """What Pillow can write of it: 0 for 4:4:4, 1 for 4:2:2, 2 for 4:2:0.

        For every other one 0, which comes closest: a coarser or finer half would blur the chroma once more.
        """
        factors = [(across, down) for _, across, down, _ in self._components]
        luma, chroma = factors[0], set(factors[1:])
        if len(chroma) != 1:
            return 0
        across, down = chroma.pop()
        return {(2 * across, down): 1, (2 * across, 2 * down): 2}.get(luma, 0)

    def _is_rgb(self, names: list[int]) -> bool:
        """Decides as libjpeg does."""
        if len(names) != 3 or self._jfif:
            return False
        return self._adobe == 0 if self._adobe is not None else names == list(b"RGB")


def _row_by_row(table: bytes) -> tuple[int, ...]:
    """Raises struct.error where it is cut."""
    values = struct.unpack(">64H" if len(table) > 64 else "64B", table)
    ordered = [0] * 64
    for place, value in zip(_ZIGZAG, values, strict=True):
        ordered[place] = value
    return tuple(ordered)


def with_segments(jpeg: bytes, segments: Iterable[tuple[int, bytes]], density: tuple[int, int, int] | None) -> bytes:
    """The file with further segments (marker, data of at most MAX_SEGMENT bytes) behind its first ones.

    density: JFIF's unit, across and down, for a file that has such a segment.
    """
    start = 2
    if jpeg[2:4] == b"\xff\xe0":
        start = 4 + int.from_bytes(jpeg[4:6], "big")
        if density:
            jpeg = jpeg[:13] + struct.pack(">BHH", *density) + jpeg[18:]
    written = (struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in segments)
    return b"".join((jpeg[:start], *written, jpeg[start:]))


def icc_segments(icc: bytes) -> list[tuple[int, bytes]]:
    """A colour profile in as many segments as it takes: at most 255, which is 16 MB."""
    parts = [icc[i : i + _ICC_PART] for i in range(0, len(icc), _ICC_PART)]
    return [(APP2, ICC + bytes([index, len(parts)]) + part) for index, part in enumerate(parts, 1)]


def joined_icc(segments: Iterable[bytes]) -> bytes | None:
    """The profile that APP2 segments hold; None where one is missing."""
    parts = {data[12]: data[14:] for data in segments if len(data) > 14}
    count = max(parts, default=0)
    return b"".join(parts[i] for i in range(1, count + 1)) if set(parts) == set(range(1, count + 1)) else None
