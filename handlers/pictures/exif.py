"""EXIF, which is a TIFF file without pixels: what may stay is kept byte for byte, entry by entry.

A damaged, unknown or oversized entry is left out and named; it takes no other with it. Pillow, which rewrites entries,
loses them all for one of a wrong type, and every letter that is not ASCII.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from PIL import ExifTags

from handlers.pictures import exif_tags as tags
from handlers.pictures.exif_tags import Kept
from handlers.pictures.texts import holds_picture

# Bytes of one value by type: BigTIFF's of 8 bytes (16 to 18) and UTF-8 (129) included.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8, 129: 1}
_WHOLE = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_ROW = 12
_POINTERS = {tags.ORIENTATION, tags.PHOTO_AT, tags.GPS_AT, tags.INTEROP_AT}
_MAX_ENTRIES, _MAX_TEXT = 1000, 100_000
# Descriptions by which a program finds its way in the pixels of its own files, which are stored otherwise now.
_LAYOUTS = (b'{"shape"', b"shape=", b"ImageJ=", b"<OME ")


class Entry(NamedTuple):
    """value: `length` values of the TIFF type `type`, in the byte order of its file."""

    tag: int
    type: int
    length: int
    value: bytes


Order = Literal["<", ">"]


class Exif(NamedTuple):
    """order: that of the bytes of all values. Directories by tag, each with entries that exif_tags allows."""

    order: Order = "<"
    image: tuple[Entry, ...] = ()
    photo: tuple[Entry, ...] = ()
    gps: tuple[Entry, ...] = ()
    interop: tuple[Entry, ...] = ()

    def __bool__(self) -> bool:
        return any((self.image, self.photo, self.gps, self.interop))

    def find(self, tag: int) -> Entry | None:
        """The image directory's entry of that tag."""
        return next((entry for entry in self.image if entry.tag == tag), None)


class Directory:
    """One directory of TIFF data, as far as it can be read.

    entries: the first of each tag, of which the values lie inside the data. broken: the tags of the others.
    next: the offset of the following directory; 0 for none.
    """

    def __init__(self, source: "TiffData", offset: int) -> None:
        self.entries: dict[int, tuple[int, int, int]] = {}  # type, count, offset of the values
        self.broken: list[int] = []
        self.next = 0
        self._source = source
        for tag, type_, count, at in source.rows(offset):
            size = _SIZES.get(type_, 0) * count
            if not size or at + size > len(source.data):
                self.broken.append(tag)
            else:
                self.entries.setdefault(tag, (type_, count, at))
        self.next = source.following(offset)

    def value(self, tag: int) -> bytes | None:
        if tag not in self.entries:
            return None
        type_, count, at = self.entries[tag]
        return bytes(self._source.data[at : at + _SIZES[type_] * count])

    def whole(self, tag: int) -> int | None:
        """The first value as an integer, where it is one."""
        type_, _, at = self.entries.get(tag, (0, 0, 0))
        return self._source.number(_WHOLE[type_], at) if type_ in _WHOLE else None


class TiffData:
    """TIFF or BigTIFF data, in either byte order. Nothing in them raises anything."""

    @staticmethod
    def is_one(data: bytes | memoryview) -> bool:
        return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        head = bytes(data[:4])
        self.order: Order = "<" if head[:1] == b"I" else ">"
        self.big = b"+" in head
        self.first = self.number("Q", 8) if self.big else self.number("I", 4)

    def number(self, code: str, offset: int) -> int:
        """0 outside the data."""
        size = struct.calcsize(self.order + code)
        chunk = self.data[offset : offset + size]
        return int(struct.unpack(self.order + code, chunk)[0]) if len(chunk) == size else 0

    def directory(self, offset: int) -> Directory:
        return Directory(self, offset)

    def rows(self, offset: int) -> Iterator[tuple[int, int, int, int]]:
        """Tag, type, count and where the values are, of each entry that is inside the data."""
        count, row, layout = self._layout(offset)
        inline = 8 if self.big else 4
        for start in range(offset + (8 if self.big else 2), len(self.data) - row + 1, row)[: min(count, _MAX_ENTRIES)]:
            tag, type_, values = struct.unpack_from(layout, self.data, start)
            at = start + row - inline
            if _SIZES.get(type_, 0) * values > inline:
                at = self.number("Q" if self.big else "I", at)
            yield tag, type_, values, at

    def following(self, offset: int) -> int:
        count, row, _ = self._layout(offset)
        end = offset + (8 if self.big else 2) + count * row
        return self.number("Q" if self.big else "I", end)

    def _layout(self, offset: int) -> tuple[int, int, str]:
        """How many entries there are, the bytes of each, and how its first three numbers are packed."""
        if not 0 < offset < len(self.data):
            return 0, 12, self.order + "HHI"
        if self.big:
            return self.number("Q", offset), 20, self.order + "HHQ"
        return self.number("H", offset), 12, self.order + "HHI"


def read_exif(data: TiffData, own_file: bool = False) -> tuple[Exif, int, list[str]]:
    """What is kept of the first directory and of those that it points to; the orientation (1 to 8); the names of what
    is left out.

    own_file: whether the directory is that of a TIFF file. Neither the orientation nor what describes stored pixels is
    in what is kept, or among the names.
    """
    left_out: list[str] = []
    first = data.directory(data.first)
    photo, gps = _pointed(data, first, tags.PHOTO_AT), _pointed(data, first, tags.GPS_AT)
    interop = photo and _pointed(data, photo, tags.INTEROP_AT)
    elsewhere = _POINTERS | ({tags.XMP, tags.ICC} if own_file else set())
    directories = [
        _kept(directory, table, elsewhere, left_out) if directory else ()
        for directory, table in ((first, tags.IMAGE), (photo, tags.PHOTO), (gps, tags.GPS), (interop, tags.INTEROP))
    ]
    if first.next and not own_file:
        left_out.append("thumbnail")
    orientation = first.whole(tags.ORIENTATION) or 1
    name = "TIFF" if own_file else "EXIF"
    return (
        Exif(data.order, *directories),
        orientation if orientation in range(1, 9) else 1,
        [f"{name} {each}" for each in left_out],
    )


def write_exif(exif: Exif, extra: Iterable[Entry] = ()) -> bytes:
    """A classic TIFF structure of the kept entries, with `extra` ones (in exif.order) in its first directory."""
    image, photo = [*exif.image, *extra], list(exif.photo)
    has_photo, has_interop, has_gps = bool(exif.photo or exif.interop), bool(exif.interop), bool(exif.gps)
    photo_at = 8 + _size(image) + _ROW * (has_photo + has_gps)
    interop_at = photo_at + has_photo * (_size(photo) + _ROW * has_interop)
    gps_at = interop_at + has_interop * _size(exif.interop)
    if has_photo:
        image.append(entry(exif.order, tags.PHOTO_AT, tags.LONG, photo_at))
    if has_gps:
        image.append(entry(exif.order, tags.GPS_AT, tags.LONG, gps_at))
    if has_interop:
        photo.append(entry(exif.order, tags.INTEROP_AT, tags.LONG, interop_at))
    written = b"II*\0\x08\0\0\0" if exif.order == "<" else b"MM\0*\0\0\0\x08"
    for wanted, entries in ((True, image), (has_photo, photo), (has_interop, exif.interop), (has_gps, exif.gps)):
        if wanted:
            written += _directory(exif.order, entries, len(written))
    return written


def entry(order: Order, tag: int, type_: int, *values: int) -> Entry:
    """An entry of whole numbers; of rationals, each is a numerator and a denominator."""
    code = {tags.SHORT: "H", tags.LONG: "I", tags.RATIONAL: "I"}[type_]
    count = len(values) // 2 if type_ == tags.RATIONAL else len(values)
    return Entry(tag, type_, count, struct.pack(f"{order}{len(values)}{code}", *values))


def turned(exif: Exif, orientation: int) -> Exif:
    """Exchanges the resolutions of the sides where the picture was laid on its side."""
    if orientation < 5:
        return exif
    other = {tags.X_RESOLUTION: tags.Y_RESOLUTION, tags.Y_RESOLUTION: tags.X_RESOLUTION}
    return exif._replace(image=tuple(each._replace(tag=other.get(each.tag, each.tag)) for each in exif.image))


def _pointed(data: TiffData, directory: Directory, tag: int) -> Directory | None:
    offset = directory.whole(tag)
    return data.directory(offset) if offset else None


def _kept(
    directory: Directory, table: Mapping[int, Kept], elsewhere: set[int], left_out: list[str]
) -> tuple[Entry, ...]:
    found = {tag: _kept_entry(directory, tag, table.get(tag)) for tag in directory.entries}
    lost = [tag for tag, entry in found.items() if entry is None]
    lost += [tag for tag in directory.broken if tag not in found]
    left_out += [_name(tag, table) for tag in lost if tag not in elsewhere and tag not in tags.STRUCTURE]
    return tuple(sorted(entry for entry in found.values() if entry))


def _kept_entry(directory: Directory, tag: int, rule: Kept | None) -> Entry | None:
    type_, count, _ = directory.entries[tag]
    if rule is None or type_ not in rule.types or (rule.at_most is not None and count > rule.at_most):
        return None
    if count > _MAX_TEXT:
        return None
    value = directory.value(tag) or b""
    if rule.at_most is None and (holds_picture(value) or value.startswith(_LAYOUTS[:3]) or _LAYOUTS[3] in value[:1000]):
        return None
    return Entry(tag, type_, count, value)


def _name(tag: int, table: Mapping[int, Kept]) -> str:
    return table[tag].name if tag in table else ExifTags.TAGS.get(tag, f"tag {tag}")


def _size(entries: Iterable[Entry]) -> int:
    """Returns the bytes of what _directory makes of them."""
    return len(_directory("<", entries, 0))


def _directory(order: str, entries: Iterable[Entry], offset: int) -> bytes:
    """The directory and, behind it, its values, as they are to lie at `offset`; of an even number of bytes."""
    ordered = sorted(entries)
    rows, values = b"", b""
    start = offset + 2 + 12 * len(ordered) + 4
    for each in ordered:
        padded = each.value + bytes(len(each.value) % 2)
        rows += struct.pack(f"{order}HHI", each.tag, each.type, each.length)
        if len(each.value) <= 4:
            rows += each.value.ljust(4, b"\0")
        else:
            rows += struct.pack(f"{order}I", start + len(values))
            values += padded
    return struct.pack(f"{order}H", len(ordered)) + rows + bytes(4) + values
