"""What a HEIC or AVIF file says beside its pixels: the items and properties of its primary picture."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from handlers.pictures.containers import bmff_boxes

# Quarter turns anti-clockwise, and whether left and right are exchanged afterwards -> EXIF's orientation.
_ORIENTATIONS = {False: (1, 8, 3, 6), True: (2, 7, 4, 5)}
_MAX_META, _MAX_ITEM = 1 << 18, 1 << 24  # bytes
_MAX_PARTS = 10_000  # of items
_SRGB = (1, 13)  # primaries and transfer; 2 is "unspecified"


class Item(NamedTuple):
    """kind: "Exif", "mime" and so on. content_type: of "mime". parts: whether in `idat`, where, how many bytes."""

    kind: bytes
    content_type: bytes
    parts: list[tuple[bool, int, int]]


class HeifMetadata:
    """exif: a TIFF structure. cicp: the colours where they are not sRGB and there is no profile, as PNG writes them."""

    def __init__(self, data: bytes) -> None:
        self.exif: bytes | None = None
        self.xmp: bytes | None = None
        self.icc: bytes | None = None
        self.cicp: bytes | None = None
        self.orientation = 1
        self.left_out: list[str] = []
        try:
            self._read(data)
        except (ValueError, IndexError):
            self.left_out.append("damaged metadata")

    def _read(self, data: bytes) -> None:
        top = _boxes(data)
        if len(top.get(b"meta", b"")) > _MAX_META:
            raise ValueError("too long to look through")
        meta = _boxes(top.get(b"meta", b"")[4:])
        self._read_properties(meta)
        idat = meta.get(b"idat", b"")
        for item in _items(meta):
            if item.kind == b"Exif" and self.exif is None:
                block = _joined(item, data, idat)
                # The first four bytes say how many more to skip.
                self.exif = block[4 + int.from_bytes(block[:4], "big") :]
            elif item.kind == b"mime" and item.content_type == b"application/rdf+xml" and self.xmp is None:
                self.xmp = _joined(item, data, idat)
            else:
                self.left_out.append("a HEIF item " + item.kind.decode("latin-1"))
        if b"thmb" in _boxes(meta.get(b"iref", b"")[4:]):
            self.left_out.append("a thumbnail")

    def _read_properties(self, meta: dict[bytes, bytes]) -> None:
        turns, mirrored = 0, False
        properties = _properties(meta)
        for kind, value in _primary(meta, properties):
            if kind == b"irot":
                turns += (-1 if mirrored else 1) * (value[0] & 3)
            elif kind == b"imir":
                # Axis 1 exchanges left and right; 0 top and bottom, which is that and half a turn.
                mirrored, turns = not mirrored, turns + (0 if value[0] & 1 else 2)
            elif kind == b"colr" and value[:4] in (b"prof", b"rICC"):
                self.icc = bytes(value[4:])
            elif kind == b"colr" and value[:4] == b"nclx":
                primaries, transfer = value[5], value[7]
                if (primaries, transfer) != _SRGB and 2 not in (primaries, transfer):
                    self.cicp = bytes([primaries, transfer, 0, 1])
        self.orientation = _ORIENTATIONS[mirrored][turns % 4]
        if self.icc:
            self.cicp = None
        if any(kind == b"auxC" and b"alpha" not in value for kind, value in properties):
            self.left_out.append("auxiliary pictures, such as a depth or gain map")


def primary_properties(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and contents of each property of the primary picture, in the order in which they apply; none where there is
    no such picture. Raises ValueError where they are damaged.
    """
    meta = _boxes(_boxes(data).get(b"meta", b"")[:_MAX_META][4:])
    return list(_primary(meta, _properties(meta))) if b"pitm" in meta else []


class _Fields:
    """Reads big-endian numbers one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, size: int) -> int:
        self.at += size
        if self.at > len(self.data):
            raise ValueError("too short")
        return int.from_bytes(self.data[self.at - size : self.at], "big")


def _boxes(data: bytes) -> dict[bytes, bytes]:
    """Reads boxes by name; not the pictures' own, which is long."""
    return {kind: bytes(body) for kind, body in bmff_boxes(data) if kind != b"mdat"}


def _properties(meta: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Reads the properties of all pictures."""
    container = _boxes(meta.get(b"iprp", b"")).get(b"ipco", b"")
    return [(kind, bytes(body)) for kind, body in bmff_boxes(container)]


def _primary(meta: dict[bytes, bytes], properties: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Selects those of the primary item, in the order of their association, which is that of their use."""
    primary = _Fields(meta.get(b"pitm", b""))
    wanted = primary.number(2 if primary.number(4) >> 24 == 0 else 4)
    fields = _Fields(_boxes(meta.get(b"iprp", b"")).get(b"ipma", b""))
    version_and_flags = fields.number(4)
    wide = version_and_flags & 1
    for _ in range(fields.number(4)):
        item = fields.number(4 if version_and_flags >> 24 else 2)
        numbers = [fields.number(1 + wide) & (0x7FFF if wide else 0x7F) for _ in range(fields.number(1))]
        if item == wanted:
            yield from (properties[number - 1] for number in numbers if 0 < number <= len(properties))


def _items(meta: dict[bytes, bytes]) -> Iterator[Item]:
    """Lists the items that are no pictures."""
    fields = _Fields(meta.get(b"iinf", b""))
    fields.number(4 if fields.number(4) >> 24 else 2)
    places = _places(meta.get(b"iloc", b""))
    for _, info in bmff_boxes(fields.data[fields.at :]):
        entry = _Fields(bytes(info))
        identity = entry.number(4 if entry.number(4) >> 24 >= 3 else 2)
        kind = entry.number(6).to_bytes(6, "big")[2:]
        if kind in (b"Exif", b"mime", b"uri "):
            _, content_type, *_ = (*entry.data[entry.at :].split(b"\0"), b"")
            yield Item(kind, content_type, places.get(identity, []))


def _joined(item: Item, data: bytes, idat: bytes) -> bytes:
    if sum(length for _, _, length in item.parts) > _MAX_ITEM:
        raise ValueError("too long to be metadata")
    return b"".join(bytes((idat if in_idat else data)[start : start + length]) for in_idat, start, length in item.parts)


def _places(iloc: bytes) -> dict[int, list[tuple[bool, int, int]]]:
    """The parts of each item, as Item has them."""
    fields = _Fields(iloc)
    number: Callable[[int], int] = fields.number
    version = number(4) >> 24
    sizes = number(2)
    of_offset, of_length, of_base, of_index = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    places, parts = {}, 0
    for _ in range(number(4 if version == 2 else 2)):
        identity = number(4 if version == 2 else 2)
        in_idat = version > 0 and number(2) & 15 == 1
        number(2)
        base = number(of_base)
        extents = []
        count = number(2)
        parts += count
        if parts > _MAX_PARTS:
            raise ValueError("too many to look through")
        for _ in range(count):
            if version > 0:
                number(of_index)
            offset = number(of_offset)
            extents.append((in_idat, base + offset, number(of_length)))
        places[identity] = extents
    return places
