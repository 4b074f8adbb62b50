"""Text beside a picture: XMP packets and PNG's text chunks. What shows a picture itself is not kept."""

import re
import zlib
from collections.abc import Iterable
from xml.parsers import expat

# A picture's first bytes, as they are or in base64: JPEG, PNG, WebP, GIF.
_PICTURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|(?:/9j/|iVBORw0KGgo|UklGR|R0lGOD)(?:[A-Za-z0-9+/=\s]|&#x[aAdD];){64}",
    re.S,
)
# Properties that hold a picture, or that only mean something beside pictures which are left out.
_PICTURE_NAMESPACES = (
    "http://ns.adobe.com/xap/1.0/g/img/",
    "http://ns.adobe.com/hdr-gain-map/1.0/",
    "http://ns.google.com/photos/1.0/audio/",
    "http://ns.google.com/photos/1.0/camera/",
    "http://ns.google.com/photos/1.0/container/",
    "http://ns.google.com/photos/1.0/depthmap/",
    "http://ns.google.com/photos/1.0/image/",
    "http://ns.google.com/photos/dd/",
    "http://ns.apple.com/HDRGainMap/",
    "http://ns.apple.com/pixeldatainfo/",
)
_MAX_NAMES, _MAX_NAME = 6, 40
_TURNED = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[2-8](?=\s*["'<])""")


def holds_picture(text: bytes) -> bool:
    """Whether a picture file lies in the text, as it is, in base64, or so in UTF-16."""
    return bool(_PICTURES.search(text) or (b"\0" in text and _PICTURES.search(text.replace(b"\0", b""))))


def named(names: Iterable[str]) -> str:
    """A few of the names, shortened, and how many more there are: for a sentence of a bounded length."""
    distinct = list(dict.fromkeys(name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "..." for name in names))
    more = len(distinct) - _MAX_NAMES
    return ", ".join(distinct[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def xmp_orientation(packet: bytes) -> int:
    """The packet's tiff:Orientation, 1 for none."""
    found = _TURNED.search(packet)
    return int(packet[found.end() - 1 : found.end()]) if found else 1


def upright(packet: bytes) -> bytes:
    """The packet for a picture that was turned as it, or the EXIF block, said."""
    return _TURNED.sub(rb"\g<1>1", packet)


def profile_block(text: bytes) -> bytes:
    """ImageMagick's "Raw profile type": a name, a length, and the block in hexadecimal digits. Raises ValueError."""
    _, _, _, digits = text.split(b"\n", 3)
    return bytes.fromhex(digits.decode("ascii"))


def png_text(name: bytes, data: bytes, limit: int) -> tuple[bytes, bytes]:
    """A chunk's keyword and its text, which past `limit` bytes is not unpacked further.

    Raises ValueError for what is no tEXt, zTXt or iTXt chunk.
    """
    keyword, separator, rest = data.partition(b"\0")
    if not separator or not 0 < len(keyword) < 80:
        raise ValueError("no keyword")
    packed = name == b"zTXt"
    if name == b"iTXt":
        flags, rest = rest[:2], rest[2:]
        _language, _, rest = rest.partition(b"\0")
        _translated, separator, rest = rest.partition(b"\0")
        if not separator or flags not in (b"\0\0", b"\1\0"):
            raise ValueError("no international text")
        packed = flags[0] == 1
    elif packed:
        if rest[:1] != b"\0":
            raise ValueError("not deflate")
        rest = rest[1:]
    if packed:
        rest = unpacked(rest, limit)
    return keyword, rest


def unpacked(data: bytes, limit: int) -> bytes:
    """A zlib stream's contents, cut behind the first byte past `limit`. Raises ValueError for a damaged one."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, limit + 1)
    except zlib.error:
        raise ValueError("damaged") from None
    if not stream.eof and len(text) <= limit:
        raise ValueError("ends too early")
    return text


def is_plain_xmp(packet: bytes) -> bool:
    """Whether it is XML without entities of its own, and nothing in it shows a picture or needs one."""

    def refuse(*_: object) -> None:
        raise ValueError

    def check(name: str, attributes: dict[str, str]) -> None:
        if any(each.startswith(_PICTURE_NAMESPACES) for each in (name, *attributes)):
            raise ValueError

    parser = expat.ParserCreate(namespace_separator="|")
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = check
    try:
        # The padding for editing in place may end in NULs.
        parser.Parse(packet.rstrip(b"\0"), True)
    except (ValueError, expat.ExpatError):
        return False
    return not holds_picture(packet)
