"""No damage to a picture file, whatever its format, does more than have it refused."""

import ctypes
import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from contract.accept import PICTURES
from handlers.pictures import decoding, encoding, metadata
from handlers.pictures.containers import png_chunks
from handlers.pictures.limits import LIMITS
from handlers.pictures.picture import Picture
from handlers.pictures.png import write_png

HEIGHT, WIDTH = 16, 1100  # rows of more than a kilobyte: of less the allocator keeps pieces as they are
PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)).resize((WIDTH, HEIGHT), 3)
)
RGBA = np.dstack([PHOTO, PHOTO[..., :1]])
DEEP = PHOTO.astype(np.uint16) * 257


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, metadata=None, **options)
    return buffer.getvalue()


def heic(mode: str, pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_bytes(mode, (WIDTH, HEIGHT), pixels.tobytes()).save(buffer, quality=50)
    return buffer.getvalue()


def interlaced(pixels: np.ndarray) -> bytes:
    """A PNG in Adam7's seven passes."""
    passes = (pixels[y::dy, x::dx] for y, x, dy, dx in ADAM7)
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for part in passes for row in part)
    kind = {1: 0, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8 * pixels.itemsize, kind, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*each) for each in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def files() -> Iterator[tuple[str, bytes]]:
    image, exif = Image.fromarray(PHOTO), Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Me"
    said = {"exif": exif, "xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", "icc_profile": b"profile!" * 20}
    frames = {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "red")]}
    for channels in (1, 2, 3, 4):
        for pixels in (RGBA[..., :channels].squeeze(), np.dstack([DEEP, DEEP[..., :1]])[..., :channels].squeeze()):
            yield f"PNG {channels} x {pixels.dtype}", write_png(pixels)
            yield (
                f"TIFF {channels} x {pixels.dtype}",
                tiff(
                    pixels, photometric="rgb" if channels > 2 else "minisblack", extrasamples=[2] * (channels in (2, 4))
                ),
            )
    for pixels in (PHOTO, DEEP, RGBA, PHOTO[..., 0], DEEP[..., 0]):
        yield f"PNG interlaced {pixels.shape} x {pixels.dtype}", interlaced(pixels)
    for mode in ("1", "P", "L"):
        yield f"PNG {mode}", saved(image.convert(mode), "PNG", transparency=1)
        yield f"BMP {mode}", saved(image.convert(mode), "BMP")
        yield f"GIF {mode}", saved(image.convert(mode), "GIF", transparency=1)
        for compression in ("raw", "group4" if mode == "1" else "tiff_lzw"):
            yield f"TIFF {mode} {compression}", saved(image.convert(mode), "TIFF", compression=compression)
    yield "APNG", saved(image, "PNG", **frames, **said)
    yield "GIF frames", saved(image, "GIF", **frames, comment=b"a comment")
    yield "WebP frames", saved(image, "WEBP", **frames, **said)
    yield "AVIF frames", saved(image, "AVIF", **frames)
    for mode in ("RGB", "RGBA"):
        yield f"BMP {mode}", saved(Image.fromarray(RGBA).convert(mode), "BMP")
        for lossless in (False, True):
            yield f"WebP {mode} {lossless}", saved(Image.fromarray(RGBA).convert(mode), "WEBP", lossless=lossless)
        yield f"AVIF {mode}", saved(Image.fromarray(RGBA).convert(mode), "AVIF", **said)
        yield f"HEIC {mode}", heic(mode, np.asarray(Image.fromarray(RGBA).convert(mode)))
    yield "HEIC 16", heic("RGB;16", DEEP)
    for bits in (10, 12):
        yield f"AVIF {bits}", imagecodecs.avif_encode(DEEP >> (16 - bits), level=80, bitspersample=bits)
    for mode in ("L", "RGB", "CMYK"):
        for progressive in (False, True):
            yield (
                f"JPEG {mode} {progressive}",
                saved(image.convert(mode), "JPEG", progressive=progressive, restart_marker_blocks=3, **said),
            )
    for planar in ("contig", "separate"):
        for compression in (None, "lzw", "deflate", "packbits", "jpeg"):
            for tile in (None, (16, 16)):
                if compression == "jpeg" and planar == "separate":
                    continue
                pixels = PHOTO if planar == "contig" else np.moveaxis(PHOTO, 2, 0)
                yield f"TIFF {planar} {compression} {tile}", tiff(
                    pixels, photometric="rgb", planarconfig=planar, compression=compression, tile=tile, rowsperstrip=16,
                    bigtiff=tile is not None, predictor=compression in ("lzw", "deflate"),
                )  # fmt: skip
    for compression in ("group3", "group4", "tiff_ccitt"):
        yield f"TIFF {compression}", saved(image.convert("1"), "TIFF", compression=compression)
    yield "TIFF CMYK", saved(image.convert("CMYK"), "TIFF")
    yield "TIFF LAB", saved(Image.frombytes("LAB", (WIDTH, HEIGHT), PHOTO.tobytes()), "TIFF")


FILES = dict(files())
# What lengths, offsets, counts and sides are changed to.
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 255, 256, 1000, 5000, 32767, 32768, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


class Change(NamedTuple):
    kind: str
    where: float
    until: float
    value: int
    other: str


def changed(data: bytes, change: Change) -> bytes:
    # Most of what can go wrong lies in front (a TIFF's and an AVIF's at the end, too): the square brings changes there.
    at = int(change.where**2 * len(data))
    end = max(at, int(change.until * len(data)))
    match change.kind:
        case "byte":
            return data[:at] + bytes([change.value % 256]) + data[at + 1 :]
        case "bit":
            return data[:at] + bytes(byte ^ 1 << change.value % 8 for byte in data[at : at + 1]) + data[at + 1 :]
        case "short" | "short behind":
            order = "<" if change.kind == "short" else ">"
            number = struct.pack(order + "H", NUMBERS[change.value % len(NUMBERS)] & 0xFFFF)
            return data[:at] + number + data[at + 2 :]
        case "long" | "long behind":
            order = "<" if change.kind == "long" else ">"
            return data[:at] + struct.pack(order + "I", NUMBERS[change.value % len(NUMBERS)]) + data[at + 4 :]
        case "cut":
            return data[: int(change.until * len(data))]
        case "without":
            return data[:at] + data[end:]
        case "twice":
            return data[:end] + data[at:end] + data[end:]
        case "splice":
            return data[:at] + FILES[change.other][at:]
        case _:
            raise AssertionError(change.kind)


KINDS = ("byte", "bit", "short", "short behind", "long", "long behind", "cut", "without", "twice", "splice")
changes = st.builds(
    Change, st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 1), st.integers(0, 255), st.sampled_from(list(FILES))
)


def with_right_checksums(data: bytes) -> bytes:
    """A PNG that no decoder refuses for its checksums alone."""
    chunks = b"".join(chunk(kind, bytes(body)) for kind, body, _ in png_chunks(data))
    return data[:8] + chunks if chunks else data


@contextmanager
def memory_holds(value: int) -> Iterator[None]:
    """What is allocated holds `value` in every byte until it is written (glibc's M_PERTURB)."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-6, ~value & 0xFF)
    try:
        assert set(np.empty(5000, np.uint8).tolist()) == {value}
        yield
    finally:
        mallopt(-6, 0)


@contextmanager
def memory_taken(at_most: int) -> Iterator[None]:
    """Bytes, of whichever library."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    yield
    taken = memory("VmHWM") - before
    assert taken <= at_most, f"{taken:,} bytes"


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


class Outcome(NamedTuple):
    """What a file is decoded to: pictures as bytes, or refusals as sentences. said: what lies beside its pixels."""

    picture: Any
    mask: Any
    said: Any


def outcome(data: bytes) -> Outcome:
    return Outcome(decoded(data), decoded_mask(data), beside(data))


def decoded(data: bytes) -> Any:
    try:
        picture = decoding.decode_picture(data)
    except decoding.NotAPicture as error:
        return refusal(error)
    samples, alpha = picture.samples, picture.alpha
    assert samples.dtype in (np.uint8, np.uint16)
    assert samples.ndim == 2 or (samples.ndim == 3 and samples.shape[2] == 3)
    assert 0 < samples.shape[0] * samples.shape[1] <= MOST_PIXELS
    assert alpha is None or (alpha.dtype == samples.dtype and alpha.shape == samples.shape[:2])
    kind = picture.metadata.content_type
    again = decoding.decode_picture(encoding.encode_picture(picture, kind))
    if kind not in ("image/jpeg", "image/webp"):  # which hold neither 16 bits nor grey
        assert np.array_equal(again.samples, samples)
    return samples.shape, samples.tobytes(), alpha is not None and alpha.tobytes(), picture.metadata, picture.notes


def decoded_mask(data: bytes) -> Any:
    try:
        picture = decoding.decode_picture(data)
        mask = decoding.decode_mask(data, picture._replace(samples=picture.samples.copy()))
    except decoding.NotAPicture as error:
        return refusal(error)
    assert mask.dtype == bool
    return mask.shape, mask.tobytes()


def beside(data: bytes) -> Any:
    """Which is read and can be written, whatever the pixels are."""
    said, orientation, notes = metadata.read(data)
    assert orientation in range(1, 9)
    assert len(" ".join(notes)) < 1000
    for kind in PICTURES:
        body = encoding.encode_picture(Picture(PHOTO[:4, :4], metadata=said), kind)
        assert metadata.read(body)[1:] == (1, ())
    return said, orientation, notes


def refusal(error: decoding.NotAPicture) -> tuple[type, str]:
    assert len(str(error)) < 300
    return type(error), str(error)


MOST_PIXELS = 1_000_000
MOST_MEMORY = 150_000_000  # for a million pixels of 4 x 16 bits, which several steps hold


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LIMITS._replace(max_pixels=MOST_PIXELS, small_picture=MOST_PIXELS // 4)
    for module in ("pixels", "tiff_layout"):
        monkeypatch.setattr(f"handlers.pictures.{module}.LIMITS", limits)


@pytest.mark.slow
@pytest.mark.usefixtures("small_limits")
@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(FILES)), st.lists(changes, min_size=1, max_size=3), st.booleans())
def test_no_damage_does_more_than_have_a_file_refused(name: str, made: list[Change], checked: bool) -> None:
    """Whatever memory held before. No step takes more than a picture within the limits may."""
    data = FILES[name]
    for change in made:
        data = changed(data, change)
    if checked:
        data = with_right_checksums(data)
    with memory_taken(at_most=MOST_MEMORY), memory_holds(0x55):
        first = outcome(data)
    with memory_holds(0xAA):
        assert outcome(data) == first


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_what_is_not_damaged_is_read(name: str) -> None:
    with memory_holds(0x55):
        first = outcome(FILES[name])
    with memory_holds(0xAA):
        assert outcome(FILES[name]) == first
    assert set(first.picture[0][:2]) == {HEIGHT, WIDTH}  # some lie on their side


# Small files that promise much


def promising(name: str, mark: bytes, sides: bytes) -> bytes:
    """The file, with other sides behind the mark."""
    place = FILES[name].index(mark) + len(mark)
    return with_right_checksums(FILES[name][:place] + sides + FILES[name][place + len(sides) :])


SIDE = 3_900  # of a picture that is still a small one, however small its file
FORWARDS, BACKWARDS = struct.pack("<HH", SIDE, SIDE), struct.pack(">II", SIDE, SIDE)
PROMISES = {
    "PNG": promising("PNG 4 x uint16", b"IHDR", BACKWARDS),
    "PNG interlaced": promising(f"PNG interlaced {(HEIGHT, WIDTH, 4)} x uint8", b"IHDR", BACKWARDS),
    "GIF": promising("GIF P", b",\0\0\0\0", FORWARDS),
    "BMP": promising("BMP RGB", b"(\0\0\0", struct.pack("<ii", SIDE, SIDE)),
    "WebP": promising("WebP RGB False", b"\x9d\x01\x2a", FORWARDS),
    "HEIC": promising("HEIC RGB", b"ispe\0\0\0\0", BACKWARDS),
}


@pytest.mark.parametrize("name", PROMISES)
def test_what_a_small_file_promises_is_not_believed(name: str) -> None:
    """Of what its samples would take (50 to 120 MB) it gets no more than the decoder's own buffers."""
    with memory_taken(at_most=70_000_000), pytest.raises(decoding.NotAPicture):
        decoding.decode_picture(PROMISES[name])


@pytest.mark.parametrize("name", [name for name in FILES if "PNG" in name])
def test_a_png_that_lacks_rows_is_refused_however_whole_it_looks(name: str) -> None:
    """Its chunks, their checksums and the end of the compressed data are right; only pixels are missing."""
    chunks = [(kind, bytes(body)) for kind, body, _ in png_chunks(FILES[name])]
    rows = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    for kept in (len(rows) - 1, len(rows) // 2, 1, 0):
        cut = [(kind, zlib.compress(rows[:kept]) if kind == b"IDAT" else body) for kind, body in chunks]
        with pytest.raises(decoding.NotAPicture, match="too early"):
            decoding.decode_picture(FILES[name][:8] + b"".join(chunk(*each) for each in cut))
