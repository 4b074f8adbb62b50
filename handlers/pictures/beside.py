"""Where each picture format keeps what it says beside its pixels."""

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from handlers.pictures import exif_tags as tags
from handlers.pictures import jpeg, resolution
from handlers.pictures.containers import (
    GIF_CONTROL,
    GIF_FRAME,
    PNG_OF_JPEG,
    gif_blocks,
    jpeg_segments,
    png_chunks,
    riff_chunks,
)
from handlers.pictures.exif import TiffData
from handlers.pictures.heif import HeifMetadata
from handlers.pictures.limits import LIMITS
from handlers.pictures.picture import JpegCoding
from handlers.pictures.resolution import Resolution
from handlers.pictures.texts import holds_picture, png_text, profile_block, unpacked

# The bytes of each of PNG's colour chunks.
_PNG_COLOUR = {
    b"gAMA": (4,),
    b"cHRM": (32,),
    b"sRGB": (1,),
    b"cICP": (4,),
    b"mDCV": (24,),
    b"cLLI": (8,),
    b"sBIT": range(1, 5),
}
# The picture itself, and further frames, of which the decoder tells.
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
_WEBP_PIXELS = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
_JPEG_NAMES = (
    (jpeg.APP0, b"JFXX\0", "a JFXX thumbnail"),
    (jpeg.APP1, b"http://ns.adobe.com/xmp/extension/\0", "extended XMP"),
    (jpeg.APP2, b"MPF\0", "further pictures (MPF)"),
    (0xEB, b"JP", "a signature or gain map (JUMBF)"),
    (0xED, b"Photoshop 3.0\0", "Photoshop resources"),
)


class Found:
    """What lies beside a picture's pixels, as it is in the file.

    exif: TIFF structures. orientation: of a format that has its own (turned_by_container). left_out: names of what is
    not among the rest.
    """

    def __init__(self, format: str) -> None:
        self.format = format
        self.exif: list[bytes] = []
        self.icc: bytes | None = None
        self.xmp: bytes | None = None
        self.resolution: Resolution | None = None
        self.png_colour: list[tuple[bytes, bytes]] = []
        self.png_text: list[tuple[bytes, bytes]] = []
        self.png_text_size = 0
        self.comment: bytes | None = None
        self.jpeg: JpegCoding | None = None
        self.turned_by_container = False
        self.orientation = 1
        self.left_out: list[str] = []


def find(data: bytes) -> Found:
    """Raises nothing: what is damaged is left out."""
    data = _jpeg_within(data) or data
    for format, signature, look in _FORMATS:
        if data[: len(signature)] == signature:
            found = Found(format)
            with _tolerating(found, "damaged metadata"):
                look(data, found)
            return found
    return _heif(data)


def _jpeg_within(data: bytes) -> bytes | None:
    """Returns what speaks for the JPEG, of a PNG that stands for one."""
    bodies = (bytes(chunk.body) for chunk in png_chunks(data) if chunk.kind == PNG_OF_JPEG)
    return next((body for body in bodies if body.startswith(b"\xff\xd8\xff")), None)


@contextmanager
def _tolerating(found: Found, name: str) -> Iterator[None]:
    """What is damaged takes nothing else with it."""
    try:
        yield
    except (ValueError, IndexError, struct.error):
        found.left_out.append(name)


def _png(data: bytes, found: Found) -> None:
    end = 8
    for name, body, _ in png_chunks(data):
        end += 12 + len(body)
        if name == b"IEND":
            _behind(data, end, found)
        elif name not in _PNG_PIXELS:
            shown = f"the PNG chunk {name.decode('latin-1')}"
            with _tolerating(found, shown):
                _png_chunk(name, bytes(body), shown, found)


def _png_chunk(name: bytes, chunk: bytes, shown: str, found: Found) -> None:
    if name in _PNG_COLOUR and len(chunk) in _PNG_COLOUR[name] and name not in dict(found.png_colour):
        found.png_colour.append((name, chunk))
    elif name == b"iCCP" and found.icc is None:
        found.icc = unpacked(chunk.partition(b"\0")[2][1:], LIMITS.max_icc_bytes)
    elif name == b"pHYs":
        found.resolution = resolution.from_png(*struct.unpack(">IIB", chunk))
    elif name == b"eXIf":
        found.exif.append(chunk.removeprefix(jpeg.EXIF))
    elif name in (b"tEXt", b"zTXt", b"iTXt"):
        keyword = chunk[:80].partition(b"\0")[0].decode("latin-1")
        with _tolerating(found, f"the PNG text {keyword}"):
            _png_text(name, chunk, found)
    else:
        found.left_out.append(shown)


def _png_text(name: bytes, chunk: bytes, found: Found) -> None:
    """Raises ValueError for what is not kept."""
    # Past the limit nothing of it is kept, so that no more need be unpacked than shows that it is.
    room = max(0, LIMITS.max_png_text_bytes - found.png_text_size)
    keyword, text = png_text(name, chunk, room)
    found.png_text_size += len(text)
    if keyword == b"XML:com.adobe.xmp" and found.xmp is None:
        found.xmp = text
    elif keyword in (b"Raw profile type exif", b"Raw profile type APP1"):
        found.exif.append(profile_block(text).removeprefix(jpeg.EXIF))
    elif keyword == b"Raw profile type xmp" and found.xmp is None:
        found.xmp = profile_block(text)
    elif keyword.startswith(b"Raw profile type") or holds_picture(text):
        raise ValueError("not to be kept")
    else:
        found.png_text.append((name, chunk))


def _jpeg(data: bytes, found: Found) -> None:
    coding = jpeg.CodingReader()
    profile: list[bytes] = []
    file = jpeg_segments(data)
    for marker, body in file.segments:
        segment = bytes(body)
        with _tolerating(found, "a damaged JPEG segment"):
            coding.see(marker, segment)
            _jpeg_segment(marker, segment, profile, found)
    _behind(data, file.end, found)
    with _tolerating(found, "a damaged quantization table"):
        found.jpeg = coding.coding
    if profile:
        found.icc = jpeg.joined_icc(profile)
        if found.icc is None:
            found.left_out.append("an incomplete colour profile")


def _jpeg_segment(marker: int, segment: bytes, profile: list[bytes], found: Found) -> None:
    if marker == jpeg.APP0 and segment.startswith(jpeg.JFIF):
        _jfif(segment, found)
    elif marker == jpeg.APP1 and segment.startswith(jpeg.EXIF):
        found.exif.append(segment[len(jpeg.EXIF) :])
    elif marker == jpeg.APP1 and segment.startswith(jpeg.XMP) and found.xmp is None:
        found.xmp = segment[len(jpeg.XMP) :]
    elif marker == jpeg.APP2 and segment.startswith(jpeg.ICC):
        profile.append(segment)
    elif marker == jpeg.COM and found.comment is None and not holds_picture(segment):
        found.comment = segment
    elif marker == jpeg.COM or (0xE0 <= marker <= 0xEF and not (marker == 0xEE and segment.startswith(b"Adobe"))):
        found.left_out.append(_jpeg_name(marker, segment))


def _jpeg_name(marker: int, segment: bytes) -> str:
    if marker == jpeg.COM:
        return "a JPEG comment"
    names = (name for code, begin, name in _JPEG_NAMES if code == marker and segment.startswith(begin))
    return next(names, f"JPEG APP{marker - 0xE0}")


def _jfif(segment: bytes, found: Found) -> None:
    unit, x, y, across, down = struct.unpack(">BHHBB", segment[7:14])
    found.resolution = found.resolution or resolution.from_jfif(unit, x, y)
    if across * down or len(segment) > 14:
        found.left_out.append("a JFIF thumbnail")


def _webp(data: bytes, found: Found) -> None:
    for name, chunk in riff_chunks(data):
        if name == b"ICCP" and found.icc is None:
            found.icc = bytes(chunk)
        elif name == b"EXIF":
            found.exif.append(bytes(chunk).removeprefix(jpeg.EXIF))
        elif name == b"XMP " and found.xmp is None:
            found.xmp = bytes(chunk)
        elif name not in _WEBP_PIXELS:
            found.left_out.append(f"the WebP chunk {name.decode('latin-1')}")
    _behind(data, 8 + int.from_bytes(data[4:8], "little"), found)


def _behind(data: bytes, end: int, found: Found) -> None:
    """What follows a picture's end, such as the film of a phone's moving picture; some programs pad with zeros."""
    if bytes(data[end:]).strip(b"\0"):
        found.left_out.append("what lies behind the picture's end")


def _tiff(data: bytes, found: Found) -> None:
    """The first directory is the picture's and its EXIF block at once."""
    tiff = TiffData(data)
    first = tiff.directory(tiff.first)
    found.exif.append(data)
    found.icc = first.value(tags.ICC)
    found.xmp = first.value(tags.XMP)


def _bmp(data: bytes, found: Found) -> None:
    if int.from_bytes(data[14:18], "little") >= 40:
        # Pixels per metre, as in PNG.
        across, down = struct.unpack_from("<ii", data, 38)
        found.resolution = resolution.from_png(across, down, 1)
    if int.from_bytes(data[14:18], "little") >= 124 and data[70:74] == b"DEBM":  # "MBED": a profile in the file
        begin, size = struct.unpack_from("<II", data, 126)
        found.icc = data[14 + begin : 14 + begin + size] or None


def _gif(data: bytes, found: Found) -> None:
    """Comments and extensions lie in between the frames; those that tell how frames are shown go without a word."""
    for label, _, body in gif_blocks(data):
        if label not in (GIF_FRAME, GIF_CONTROL) and not (label == 0xFF and bytes(body[1:12]) == b"NETSCAPE2.0"):
            found.left_out.append({0xFE: "a GIF comment", 0x01: "GIF text"}.get(label, "a GIF extension"))


def _heif(data: bytes) -> Found:
    found = Found("HEIF")
    if data[4:8] == b"ftyp":
        heif = HeifMetadata(data)
        found.exif += [heif.exif] if heif.exif else []
        found.icc, found.xmp = heif.icc, heif.xmp
        found.png_colour += [(b"cICP", heif.cicp)] if heif.cicp else []
        found.turned_by_container, found.orientation = True, heif.orientation
        found.left_out += heif.left_out
    return found


_Look = Callable[[bytes, Found], None]
_FORMATS: tuple[tuple[str, bytes, _Look], ...] = (
    ("PNG", b"\x89PNG", _png),
    ("JPEG", b"\xff\xd8\xff", _jpeg),
    ("WEBP", b"RIFF", _webp),
    ("TIFF", b"II*\0", _tiff),
    ("TIFF", b"MM\0*", _tiff),
    ("TIFF", b"II+\0", _tiff),
    ("TIFF", b"MM\0+", _tiff),
    ("GIF", b"GIF8", _gif),
    ("BMP", b"BM", _bmp),
)
