"""What a picture file says beside its pixels: what is kept, what never is, and that every reply can be sent back."""

import base64
import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from handlers.pictures import decoding, encoding, exif_tags, metadata
from handlers.pictures.limits import LIMITS
from handlers.pictures.picture import Metadata, Picture
from handlers.pictures.png import write_png
from handlers.pictures.tiff import write_tiff
from handlers.requests.reply import Reply

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

KINDS = ("image/png", "image/jpeg", "image/webp", "image/tiff")
MARKER = b"ORIGINALPIXELS"
SMOOTH = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), (0, 0), 3)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}

Row = tuple[int, int, int, bytes]
"""Tag, type, count, values."""


# Files


def exif_block(
    image: list[Row], photo: list[Row] = (), gps: list[Row] = (), order: str = "<", thumbnail: bytes = b""
) -> bytes:
    """An EXIF block without prefix: its directories one after the other, values behind each."""

    def directory(rows: list[Row], at: int, following: int = 0) -> bytes:
        table, values, behind = b"", b"", at + 2 + 12 * len(rows) + 4
        for tag, type_, count, value in rows:
            table += struct.pack(f"{order}HHI", tag, type_, count)
            table += value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(f"{order}I", behind + len(values))
            values += value + bytes(len(value) % 2) if len(value) > 4 else b""
        return struct.pack(f"{order}H", len(rows)) + table + struct.pack(f"{order}I", following) + values

    rows = [*image, *([(0x8769, 4, 1, bytes(4))] if photo else []), *([(0x8825, 4, 1, bytes(4))] if gps else [])]
    photo_at = 8 + len(directory(rows, 8))
    gps_at = photo_at + (len(directory(photo, 0)) if photo else 0)
    next_at = gps_at + (len(directory(gps, 0)) if gps else 0)
    places = {0x8769: photo_at, 0x8825: gps_at}
    rows = [
        (tag, type_, count, struct.pack(f"{order}I", places[tag]) if tag in places else value)
        for tag, type_, count, value in rows
    ]
    block = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    block += directory(rows, 8, next_at if thumbnail else 0)
    block += directory(photo, photo_at) if photo else b""
    block += directory(gps, gps_at) if gps else b""
    if thumbnail:
        at = struct.pack(f"{order}I", len(block) + 30)
        size = struct.pack(f"{order}I", len(thumbnail))
        block += directory([(0x201, 4, 1, at), (0x202, 4, 1, size)], len(block)) + thumbnail
    return block


def text_row(tag: int, text: bytes) -> Row:
    return tag, 2, len(text) + 1, text + b"\0"


def short(value: int, order: str = "<") -> bytes:
    return struct.pack(f"{order}H", value)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert zlib.crc32(name + body) == struct.unpack_from(">I", data, at + 8 + size)[0], name
        chunks.append((name, body))
        at += 12 + size
    return chunks


def png_joined(chunks: list[tuple[bytes, bytes]]) -> bytes:
    written = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def png_with(*extra: tuple[bytes, bytes], array: np.ndarray = SMOOTH) -> bytes:
    first, *rest = png_chunks(encoded(array))
    return png_joined([first, *extra, *rest])


def jpeg_with(*segments: tuple[int, bytes], data: bytes = b"") -> bytes:
    data = data or encoded(SMOOTH, "JPEG", quality=90)
    written = (struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return data[:2] + b"".join(written) + data[2:]


def webp_with(*chunks: tuple[bytes, bytes]) -> bytes:
    data = encoded(SMOOTH, "WEBP", lossless=True)
    height, width = SMOOTH.shape[:2]
    flags = 0x20 * any(n == b"ICCP" for n, _ in chunks) | 8 * any(n == b"EXIF" for n, _ in chunks)
    flags |= 4 * any(n == b"XMP " for n, _ in chunks)
    vp8x = (
        b"VP8X" + struct.pack("<IB3x", 10, flags) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    )
    profile = [chunk for chunk in chunks if chunk[0] == b"ICCP"]
    others = [chunk for chunk in chunks if chunk[0] != b"ICCP"]

    def written(chunks: list[tuple[bytes, bytes]]) -> bytes:
        return b"".join(name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for name, body in chunks)

    body = b"WEBP" + vp8x + written(profile) + data[12:] + written(others)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(array: np.ndarray = SMOOTH, **options: Any) -> bytes:
    buffer = io.BytesIO()
    kind = "rgb" if array.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, array, **{"metadata": None, "photometric": kind, "software": False} | options)
    return buffer.getvalue()


def with_exif(format: str, block: bytes) -> bytes:
    """A file of the format with that very block; a TIFF gets the text tags only, being its own block."""
    if format == "JPEG":
        return jpeg_with((0xE1, b"Exif\0\0" + block))
    if format == "PNG":
        return png_with((b"eXIf", block))
    if format == "PNG profile":
        profile = b"Exif\0\0" + block
        return png_with((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(
            b"\nexif\n%8d\n" % len(profile) + profile.hex().encode() + b"\n"
        )))  # fmt: skip
    return webp_with((b"EXIF", block))


def reply(data: bytes, kind: str, picture: Picture | None = None) -> tuple[bytes, list[str]]:
    """A picture that goes through the server unchanged, and the warnings. Without one: some picture with the metadata
    of `data`."""
    if picture is None:
        said, orientation, notes = metadata.read(data)
        picture = Picture(metadata.turned(SMOOTH, orientation), metadata=said, notes=notes)
    sent = Reply(picture)
    sent.warnings += picture.notes
    leaves = sent.encoded(kind)
    assert leaves.content_type == kind
    return leaves.picture, sent.warnings


def exif_of(data: bytes) -> dict[int, tuple[int, bytes]]:
    """Tag -> type and bytes of the directories in a file's EXIF, read by tifffile."""
    if data[:4] in (b"II*\0", b"MM\0*"):
        block = data
    else:
        image = Image.open(io.BytesIO(data))
        block = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    if not block:
        return {}
    assert block[:4] in (b"II*\0", b"MM\0*")
    order = "<" if block[:1] == b"I" else ">"
    found: dict[int, tuple[int, bytes]] = {}

    def read(offset: int) -> None:
        (count,) = struct.unpack_from(f"{order}H", block, offset)
        rows = [struct.unpack_from(f"{order}HHI", block, offset + 2 + 12 * i) for i in range(count)]
        assert [tag for tag, *_ in rows] == sorted({tag for tag, *_ in rows})
        assert struct.unpack_from(f"{order}I", block, offset + 2 + 12 * count) == (0,)
        for i, (tag, type_, number) in enumerate(rows):
            size, at = SIZES[type_] * number, offset + 10 + 12 * i
            if size > 4:
                (at,) = struct.unpack_from(f"{order}I", block, at)
                assert at % 2 == 0
            assert at + size <= len(block)
            found[tag] = type_, block[at : at + size]
            if tag in (0x8769, 0x8825, 0xA005):
                read(struct.unpack(f"{order}I", found.pop(tag)[1])[0])

    read(struct.unpack_from(f"{order}I", block, 4)[0])
    return found


# EXIF


@pytest.mark.slow
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "PNG profile", "WEBP"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["© Jürgen Müller".encode(), "Jürgen".encode("latin-1"), "名前".encode("shift_jis")])
def test_text_is_kept_byte_for_byte(format: str, kind: str, order: str, name: bytes) -> None:
    block = exif_block([text_row(0x013B, name)], [text_row(0x9003, b"2020:02:02 02:02:02")], order=order)
    body, warnings = reply(with_exif(format, block), kind)
    assert exif_of(body)[0x013B] == (2, name + b"\0")
    assert exif_of(body)[0x9003] == (2, b"2020:02:02 02:02:02\0")
    assert warnings == []


@pytest.mark.slow
@pytest.mark.parametrize(("order", "orientation_type"), [("<", 3), (">", 4), ("<", 9), (">", 1)])
@pytest.mark.parametrize("table", ["IMAGE", "PHOTO", "GPS"])
def test_the_orientation_holds_whatever_else_is_wrong(order: str, orientation_type: int, table: str) -> None:
    code = {1: "B", 3: "H", 4: "I", 9: "i"}[orientation_type]
    upright = (0x0112, orientation_type, 1, struct.pack(order + code, 6))
    rules = getattr(exif_tags, table)
    for tag, type_, count in itertools.product(rules, SIZES, (1, 5)):
        row = (tag, type_, count, b"\1" * (SIZES[type_] * count))
        # An EXIF block whose entries are in no order: that, too, is often seen.
        artist = text_row(0x013B, b"Me") if tag != 0x013B else text_row(0x8298, b"Me")
        block = exif_block(
            [upright, artist, *([row] if table == "IMAGE" else [])],
            [row] if table == "PHOTO" else [],
            [row] if table == "GPS" else [],
            order,
        )
        said, orientation, notes = metadata.read(jpeg_with((0xE1, b"Exif\0\0" + block), data=b"\xff\xd8\xff\xd9"))
        assert orientation == 6, (tag, type_)
        assert b"Me\0" in [entry.value for entry in said.exif.image], (tag, type_)
        kept = {entry.tag for part in (said.exif.image, said.exif.photo, said.exif.gps) for entry in part}
        turned = {0x011A: 0x011B, 0x011B: 0x011A}.get(tag, tag)
        rule = rules[tag]
        right = type_ in rule.types and (rule.at_most is None or count <= rule.at_most)
        assert (turned in kept) == right, (tag, type_, count)
        assert (rule.name in " ".join(notes)) == (not right), (tag, type_, count)


def test_entries_that_point_outside_take_no_others_with_them() -> None:
    block = exif_block([text_row(0x010F, b"A maker"), text_row(0x0110, b"A model"), (0x0112, 3, 1, short(8))])
    at = block.index(struct.pack("<HHI", 0x010F, 2, 8)) + 8
    block = block[:at] + b"\xf0\xff\xff\xff" + block[at + 4 :]
    said, orientation, (note,) = metadata.read(jpeg_with((0xE1, b"Exif\0\0" + block)))
    assert (orientation, note) == (8, "holds what the reply leaves out: EXIF Make")
    assert [entry.value for entry in said.exif.image] == [b"A model\0"]


def test_directories_that_point_at_themselves_end() -> None:
    block = bytearray(exif_block([text_row(0x010F, b"A maker")], [text_row(0x9003, b"2020")], [text_row(1, b"N")]))
    for tag in (0x8769, 0x8825):
        at = block.index(struct.pack("<HHI", tag, 4, 1)) + 8
        block[at : at + 4] = struct.pack("<I", 8)
    said, _, _ = metadata.read(jpeg_with((0xE1, b"Exif\0\0" + bytes(block))))
    assert [entry.value for entry in said.exif.image] == [b"A maker\0"]


@pytest.mark.parametrize("tag", [0x010F, 0x0112, 0xABCD])
def test_a_directory_of_65535_entries_is_read_to_a_bound(tag: int) -> None:
    # All point at the same bytes, as many as there are.
    row = struct.pack("<HHII", tag, 2, 700_000, 8)
    block = b"II*\0\x08\0\0\0\xff\xff" + row * 65_535 + bytes(4)
    _, _, notes = metadata.read(png_with((b"eXIf", block)))
    assert len(" ".join(notes)) < 200


def test_of_tags_that_are_there_twice_the_first_counts() -> None:
    rows = [(0x0112, 3, 1, short(6)), (0x0112, 3, 1, short(1)), text_row(0x010F, b"first"), text_row(0x010F, b"second")]
    said, orientation, _ = metadata.read(jpeg_with((0xE1, b"Exif\0\0" + exif_block(rows))))
    assert orientation == 6
    assert [entry.value for entry in said.exif.image] == [b"first\0"]


CAMERA = exif_block(
    [
        text_row(0x010F, b"A maker"), (0x0112, 3, 1, short(6)), (0x011A, 5, 1, struct.pack("<II", 300, 1)),
        (0x011B, 5, 1, struct.pack("<II", 150, 1)), (0x0128, 3, 1, short(2)), text_row(0x013B, "Jürgen".encode()),
        (0x0213, 3, 1, short(1)),
    ],
    [
        (0x829A, 5, 1, struct.pack("<II", 1, 250)), (0x8827, 3, 1, short(200)), (0x9000, 7, 4, b"0232"),
        text_row(0x9003, b"2020:02:02 02:02:02"), (0x9286, 7, 13, b"ASCII\0\0\0hello"), (0xA002, 4, 1, bytes(4)),
    ],
    [text_row(1, b"N"), (2, 5, 3, struct.pack("<6I", 48, 1, 8, 1, 30, 1))],
)  # fmt: skip
CAMERA_KEPT = {
    0x010F: (2, b"A maker\0"), 0x013B: (2, "Jürgen".encode() + b"\0"), 0x829A: (5, struct.pack("<II", 1, 250)),
    0x8827: (3, short(200)), 0x9000: (7, b"0232"), 0x9003: (2, b"2020:02:02 02:02:02\0"),
    0x9286: (7, b"ASCII\0\0\0hello"), 1: (2, b"N\0"), 2: (5, struct.pack("<6I", 48, 1, 8, 1, 30, 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "PNG profile", "WEBP"])
def test_what_a_camera_says_is_kept(format: str, kind: str) -> None:
    data = with_exif(format, CAMERA)
    body, warnings = reply(data, kind)
    assert warnings == []
    found = exif_of(body)
    assert {tag: found.get(tag) for tag in CAMERA_KEPT} == CAMERA_KEPT
    assert not {0x0112, 0xA002, 0x0213} & set(found)
    picture = Image.open(io.BytesIO(body))
    assert picture.size == SMOOTH.shape[:2]
    assert picture.getexif()[0x011A] == 150  # laid on its side
    assert picture.getexif()[0x011B] == 300


@pytest.mark.slow
@settings(deadline=None, max_examples=75)
@given(
    st.lists(st.tuples(st.integers(0, len(CAMERA) - 1), st.integers(0, 255)), min_size=1, max_size=12), st.booleans()
)
def test_no_damage_to_exif_breaks_anything(changes: list[tuple[int, int]], cut: bool) -> None:
    block = bytearray(CAMERA)
    for at, value in changes:
        block[at] = value
    if cut:
        del block[changes[0][0] :]
    said, orientation, notes = metadata.read(jpeg_with((0xE1, b"Exif\0\0" + bytes(block))))
    assert orientation in range(1, 9)
    assert len(" ".join(notes)) < 700
    for kind in KINDS:
        body = encoding.encode_picture(Picture(SMOOTH[:4, :4], metadata=said), kind)
        exif_of(body)
        again, upright, _ = metadata.read(body)
        assert upright == 1
        assert encoding.encode_picture(Picture(SMOOTH[:4, :4], metadata=again._replace(jpeg=said.jpeg)), kind) == body


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiffs_own_tags_are_kept_classic_and_big(kind: str, order: str, big: bool) -> None:
    tags = [
        (0x013B, 2, None, "© Jürgen".encode(), True), (0x8298, 2, None, b"Mine", True),
        (34377, 7, 14, MARKER, True), (37724, 7, 14, MARKER, True), (65000, 7, 14, MARKER, True),
    ]  # fmt: skip
    data = tiff(bigtiff=big, byteorder=order, extratags=tags, resolution=(72, 36), resolutionunit="inch")
    body, (warning,) = reply(data, kind)
    found = exif_of(body)
    assert found[0x013B] == (2, "© Jürgen".encode() + b"\0")
    assert found[0x8298] == (2, b"Mine\0")
    assert MARKER not in body
    assert "TIFF ImageResources" in warning
    assert "TIFF tag 65000" in warning
    assert "StripOffsets" not in warning
    if kind != "image/webp":
        assert Image.open(io.BytesIO(body)).info["dpi"] == pytest.approx((72, 36), abs=0.02)


# Resolution


@pytest.mark.parametrize(
    ("data", "dpi"),
    [
        (tiff(), None),
        (tiff(resolution=(1, 1), resolutionunit="none"), None),
        (tiff(resolution=(300, 150), resolutionunit="inch"), (300, 150)),
        (tiff(resolution=(100, 50), resolutionunit="centimeter"), (254, 127)),
        (encoded(SMOOTH, "JPEG"), None),
        (encoded(SMOOTH, "JPEG", dpi=(300, 150)), (300, 150)),
        (encoded(SMOOTH, "PNG"), None),
        (encoded(SMOOTH, "PNG", dpi=(300, 150)), (300, 150)),
        (png_with((b"pHYs", struct.pack(">IIB", 2835, 2835, 1))), (72, 72)),
        (png_with((b"pHYs", struct.pack(">IIB", 0, 2835, 1))), None),
        (encoded(SMOOTH, "BMP", dpi=(300, 150)), (300, 150)),
        (webp_with((b"EXIF", CAMERA)), (150, 300)),
    ],
)
def test_resolutions_are_the_same_in_every_format_and_do_not_drift(
    data: bytes, dpi: tuple[float, float] | None
) -> None:
    for kinds in itertools.islice(itertools.permutations(KINDS), 0, None, 3):
        body = data
        for kind in kinds * 2:
            body, _ = reply(body, kind)
        image = Image.open(io.BytesIO(body))
        if kinds[-1] == "image/webp":
            said, _, _ = metadata.read(body)
            found = said.resolution and said.resolution[:2]
        else:
            found = image.info.get("dpi") if dpi else None
            assert dpi or "pHYs" not in [name for name, _ in png_chunks(body)] if kinds[-1] == "image/png" else True
            assert dpi or kinds[-1] != "image/tiff" or 282 not in image.tag_v2
        assert found is None if dpi is None else found == pytest.approx(dpi, abs=0.02), kinds


def test_pixels_that_are_not_square_stay_so() -> None:
    data = png_with((b"pHYs", struct.pack(">IIB", 2, 1, 0)))
    for kinds in itertools.permutations(KINDS, 2):
        body = data
        for kind in kinds * 2:
            body, _ = reply(body, kind)
        said, _, _ = metadata.read(body)
        assert said.resolution == (2, 1, False), kinds


# PNG


COLOURS = {
    b"cICP": bytes([9, 16, 0, 1]), b"mDCV": bytes(range(24)), b"cLLI": bytes(8), b"sRGB": b"\0",
    b"gAMA": struct.pack(">I", 100_000), b"sBIT": b"\5\6\5",
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000),
}  # fmt: skip


@pytest.mark.parametrize("name", COLOURS)
def test_colour_chunks_stay_in_png_and_are_named_elsewhere(name: bytes) -> None:
    data = png_with((name, COLOURS[name]))
    body, warnings = reply(data, "image/png")
    chunks = png_chunks(body)
    assert dict(chunks)[name] == COLOURS[name]
    names = [each for each, _ in chunks]
    assert names.index(name) < names.index(b"IDAT")
    assert warnings == []
    for kind in KINDS[1:]:
        _, (warning,) = reply(data, kind)
        assert warning == f"{kind} holds no PNG colour chunks: {name.decode()} left out"


@pytest.mark.parametrize("name", COLOURS)
def test_colour_chunks_of_a_wrong_length_are_left_out(name: bytes) -> None:
    body, (warning,) = reply(png_with((name, COLOURS[name] + b"\1\1\1\1\1")), "image/png")
    assert name not in dict(png_chunks(body))
    assert name.decode() in warning


def test_significant_bits_fit_the_channels() -> None:
    palette = Image.fromarray(SMOOTH).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=3)
    first, *rest = png_chunks(buffer.getvalue())
    body, _ = reply(b"", "image/png", decoding.decode_picture(png_joined([first, (b"sBIT", b"\5\6\5"), *rest])))
    chunks = dict(png_chunks(body))
    assert (chunks[b"IHDR"][9], chunks[b"sBIT"]) == (6, b"\5\6\5\x08")


TEXTS = (
    (b"tEXt", b"parameters\0a castle, steps: 20"),
    (b"zTXt", b"workflow\0\0" + zlib.compress(b'{"nodes": []}' * 50)),
    (b"iTXt", b"Title\0\0\0de\0Titel\0" + "Ein Schloß".encode()),
    (b"iTXt", b"Author\0\1\0\0\0" + zlib.compress("Jürgen".encode())),
    (b"tEXt", b"parameters\0and again"),
)


def test_texts_stay_in_png_and_are_named_elsewhere() -> None:
    data = png_with(*TEXTS)
    body, warnings = reply(data, "image/png")
    assert [chunk for chunk in png_chunks(body) if chunk[0].endswith(b"TXt") or chunk[0] == b"tEXt"] == list(TEXTS)
    assert warnings == []
    for kind in KINDS[1:]:
        _, (warning,) = reply(data, kind)
        assert warning == f"{kind} holds no PNG text: parameters, workflow, Title, Author left out"


def test_our_own_parameters_replace_those_of_the_last_edit() -> None:
    picture = decoding.decode_picture(png_with(*TEXTS))
    for prompt in ("a red ball", "a blue ball"):
        edited = picture._replace(metadata=picture.metadata._replace(text={"parameters": prompt}))
        body = encoding.encode_picture(edited, "image/png")
        picture = decoding.decode_picture(body)
        assert Image.open(io.BytesIO(body)).text["parameters"] == prompt  # type: ignore[attr-defined]
        assert [data for _, data in png_chunks(body) if data.startswith(b"parameters")] == [
            b"parameters\0\0\0\0\0" + prompt.encode()
        ]
    assert picture.metadata.png_text[:3] == TEXTS[1:4]


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"broken\0\0" + b"no deflate"),
        (b"zTXt", b"broken\0\0" + zlib.compress(b"x" * 100)[:-9]),
        (b"iTXt", b"broken\0\2\0\0\0text"),
        (b"tEXt", b"no separator"),
        (b"tEXt", b"k" * 80 + b"\0text"),
        (b"tEXt", b"Raw profile type 8bim\0\n8bim\n 14\n" + MARKER.hex().encode()),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"nonsense")),
        (b"tEXt", b"image\0data:image/jpeg;base64," + base64.b64encode(encoded(SMOOTH, "JPEG"))),
        (b"tEXt", b"image\0" + base64.b64encode(encoded(SMOOTH, "PNG"))),
        (b"tEXt", b"image\0" + encoded(SMOOTH, "JPEG")),
    ],
)
def test_text_that_is_damaged_or_a_picture_is_left_out_and_named(chunk: tuple[bytes, bytes]) -> None:
    body, (warning,) = reply(png_with(chunk), "image/png")
    assert {name for name, _ in png_chunks(body)} == {b"IHDR", b"IDAT", b"IEND"}
    assert "the PNG text" in warning
    assert len(warning) < 120


@pytest.mark.slow
def test_text_and_profile_up_to_the_limit_are_kept_and_come_back() -> None:
    profile = np.random.default_rng(0).integers(0, 256, LIMITS.max_icc_bytes, np.uint8).tobytes()
    text = b"workflow\0\0" + zlib.compress(b"abcdefgh" * (LIMITS.max_png_text_bytes // 8))
    data = png_with((b"iCCP", b"p\0\0" + zlib.compress(profile, 1)), (b"zTXt", text))
    for _ in range(2):
        said, _, notes = metadata.read(data)
        assert said.icc == profile
        assert said.png_text == ((b"zTXt", text),)
        assert notes == ()
        data, _ = reply(data, "image/png")
    for kind in KINDS[1:]:
        assert metadata.read(reply(data, kind)[0])[0].icc == profile


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            (b"iCCP", b"p\0\0" + zlib.compress(bytes(LIMITS.max_icc_bytes + 1))),
            "colour profile; the limit is 4,000,000",
        ),
        (
            (b"zTXt", b"w\0\0" + zlib.compress(b"x" * (LIMITS.max_png_text_bytes + 1))),
            "PNG text; the limit is 4,000,000",
        ),
        ((b"zTXt", b"w\0\0" + zlib.compress(b"x" * 100_000_000)), "PNG text; the limit is 4,000,000"),
        (
            (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<a>" + b" " * LIMITS.max_xmp_bytes + b"</a>"),
            "XMP; the limit is 1,000,000",
        ),
        ((b"eXIf", exif_block([text_row(tag, b"m" * 31_000) for tag in (0x10F, 0x110)])), "EXIF; the limit is 60,000"),
    ],
)
def test_what_is_past_a_limit_is_left_out_with_a_note(extra: tuple[bytes, bytes], words: str) -> None:
    body, (warning,) = reply(png_with(extra), "image/png")
    assert words in warning
    assert len(body) < 30_000


# XMP


def xmp(inside: str = "", attributes: str = "") -> bytes:
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
        ' xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
        f' dc:title="Schloß" {attributes}>{inside}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


def with_xmp(format: str, packet: bytes) -> bytes:
    return {
        "JPEG": lambda: jpeg_with((0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)),
        "PNG": lambda: png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)),
        "WEBP": lambda: webp_with((b"XMP ", packet)),
        "TIFF": lambda: tiff(extratags=[(700, 1, len(packet), packet, True)]),
    }[format]()


def xmp_of(data: bytes) -> bytes | None:
    image = Image.open(io.BytesIO(data))
    found = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if image.format == "TIFF":
        found = image.tag_v2.get(700)  # type: ignore[attr-defined]
    return found.encode() if isinstance(found, str) else found


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("kind", KINDS)
def test_xmp_is_kept_in_every_format(format: str, kind: str) -> None:
    body, warnings = reply(with_xmp(format, xmp()), kind)
    assert xmp_of(body) == xmp()
    assert warnings == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "packet",
    [
        b"no XML", b"<a>", b"\xff\xfe", xmp()[:-40],
        b'<!DOCTYPE a [<!ENTITY b "b">]><a>&b;</a>',
        xmp(attributes='xmlns:G="http://ns.google.com/photos/1.0/container/item/" G:Mime="image/jpeg"'),
        xmp('<i:image xmlns:i="http://ns.adobe.com/xap/1.0/g/img/">ORIGINALPIXELS</i:image>'),
        xmp(attributes='xmlns:G="http://ns.google.com/photos/1.0/image/" G:Data="ORIGINALPIXELS"'),
        xmp(f"<dc:source>{base64.b64encode(encoded(SMOOTH, 'JPEG')).decode()}</dc:source>"),
        xmp(f"<dc:source>{base64.encodebytes(encoded(SMOOTH, 'PNG')).decode()}</dc:source>"),
    ],
    ids=range(10),
)  # fmt: skip
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_xmp_that_is_damaged_or_holds_a_picture_is_left_out(format: str, packet: bytes) -> None:
    for kind in KINDS:
        body, (warning,) = reply(with_xmp(format, packet), kind)
        assert xmp_of(body) is None
        assert "XMP that is damaged or holds pictures" in warning


def test_xmp_too_long_for_a_jpeg_is_named() -> None:
    packet = xmp(" " * 70_000)
    body, (warning,) = reply(with_xmp("PNG", packet), "image/jpeg")
    assert xmp_of(body) is None
    assert "image/jpeg holds 65,504 bytes of XMP" in warning
    assert xmp_of(reply(with_xmp("PNG", packet), "image/webp")[0]) == packet


@pytest.mark.parametrize("said", ['tiff:Orientation="6"', "tiff:Orientation='6'"])
def test_xmp_never_turns_a_picture_again(said: str) -> None:
    packet = xmp(attributes=said)
    block = exif_block([(0x0112, 3, 1, short(6))])
    both = jpeg_with((0xE1, b"Exif\0\0" + block), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet))
    for data in (both, with_xmp("PNG", packet)):
        body, _ = reply(data, "image/png")
        assert Image.open(io.BytesIO(body)).size == SMOOTH.shape[:2]
        assert xmp_of(body) == packet.replace(said.encode(), said.replace("6", "1").encode())
        assert metadata.read(body)[1] == 1


# Colour profiles


def test_a_grey_profile_stays_with_grey() -> None:
    profile = PROFILE[:16] + b"GRAY" + PROFILE[20:]
    picture = Picture(SMOOTH[..., 0], metadata=Metadata(icc=profile))
    for kind in KINDS:
        body, warnings = reply(b"", kind, picture)
        assert metadata.read(body)[0].icc == (None if kind == "image/webp" else profile)
        assert warnings == (
            ["image/webp holds no grey: the colour profile, which describes grey, was left out"]
            if kind == "image/webp"
            else []
        )


def test_a_profile_in_several_segments_is_joined_in_their_order() -> None:
    parts = [(0xE2, b"ICC_PROFILE\0" + bytes([n, 3]) + part) for n, part in ((2, b"b"), (3, b"c"), (1, b"a"))]
    assert metadata.read(jpeg_with(*parts))[0].icc == b"abc"
    said, _, (note,) = metadata.read(jpeg_with(*parts[:2]))
    assert said.icc is None
    assert "an incomplete colour profile" in note


# JPEG's coding


def moved(data: bytes, tables: list[int], extra: bytes = b"") -> bytes:
    """A JPEG whose components use tables of other numbers."""
    out = bytearray(data)
    places = [out.find(b"\xff\xdb\0C" + bytes([old])) for old in range(len(tables))]
    for at, table in zip(places, tables, strict=True):
        if at >= 0:
            out[at + 4] = table
    at = out.index(b"\xff\xc0")
    for component in range(out[at + 9]):
        out[at + 12 + 3 * component] = tables[min(component, len(tables) - 1)]
    at = out.index(b"\xff\xdb")
    return bytes(out[:at] + extra + out[at:])


def error(data: bytes) -> float:
    """How far a picture is from its reply as JPEG."""
    body, _ = reply(data, "image/jpeg", decoding.decode_picture(data))
    before, after = (np.asarray(Image.open(io.BytesIO(each)).convert("RGB")).astype(int) for each in (data, body))
    return float(np.abs(before - after).mean())


UNUSED = b"".join(b"\xff\xdb\0C" + bytes([number]) + b"c" * 64 for number in (0, 3))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("quality", [50, 95])
def test_the_tables_that_a_jpeg_uses_are_used_again(mode: str, quality: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(SMOOTH).convert(mode).save(buffer, "JPEG", quality=quality)
    plain = buffer.getvalue()
    expected = Image.open(io.BytesIO(plain)).quantization  # type: ignore[attr-defined]
    for data in (plain, moved(plain, [2, 3]), moved(plain, [1, 2], UNUSED), moved(plain, [2, 1], UNUSED)):
        body, _ = reply(data, "image/jpeg")
        image = Image.open(io.BytesIO(body))
        assert list(image.quantization.values()) == list(expected.values())  # type: ignore[attr-defined]
        assert error(data) == pytest.approx(error(plain), abs=0.01)


def test_each_component_keeps_a_table_of_its_own() -> None:
    tables = [[2] * 64, [5] * 64, [9] * 64]
    data = encoded(SMOOTH, "JPEG", qtables=tables, subsampling=0)
    body, _ = reply(data, "image/jpeg")
    old, new = (Image.open(io.BytesIO(each)) for each in (data, body))
    assert new.quantization == old.quantization  # type: ignore[attr-defined]
    assert [layer[3] for layer in new.layer] == [layer[3] for layer in old.layer] == [0, 1, 2]  # type: ignore[attr-defined]


def test_tables_of_16_bits_are_kept() -> None:
    table = [1 + 300 * (i > 40) for i in range(64)]
    data = encoded(SMOOTH, "JPEG", qtables=[table, table], subsampling=2)
    body, _ = reply(data, "image/jpeg")
    assert list(Image.open(io.BytesIO(body)).quantization[0]) == table  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("factor", "written"),
    [(0x411111, (1, 1)), (0x221111, (2, 2)), (0x211111, (2, 1)), (0x121111, (1, 1)), (0x111111, (1, 1))],
)
def test_chroma_is_kept_as_fine_as_it_was(factor: int, written: tuple[int, int]) -> None:
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor, cv2.IMWRITE_JPEG_QUALITY, 95]
    data = cv2.imencode(".jpg", SMOOTH, options)[1].tobytes()
    body, _ = reply(data, "image/jpeg")
    assert Image.open(io.BytesIO(body)).layer[0][1:3] == written  # type: ignore[attr-defined]
    assert error(data) < 0.7


def test_a_jpeg_of_rgb_stays_one() -> None:
    data = encoded(SMOOTH, "JPEG", keep_rgb=True, quality=90)
    assert b"Adobe\0d\0\0\0\0\0" in data
    block = exif_block([text_row(0x010F, b"A maker")])
    body, _ = reply(jpeg_with((0xE1, b"Exif\0\0" + block), data=data), "image/jpeg")
    assert b"JFIF" not in body
    assert exif_of(body)[0x010F] == (2, b"A maker\0")
    assert error(data) < 0.3


def test_a_jpeg_of_rgb_may_store_fewer_of_two_colours() -> None:
    """Which Pillow does not write: the reply stores as many of each."""
    data = encoded(SMOOTH, "JPEG", subsampling=2)
    assert data[2:4] == b"\xff\xe0"
    adobe = b"\xff\xee\0\x0eAdobe\0d\0\0\0\0\0"
    picture = decoding.decode_picture(data[:2] + adobe + data[20:])
    body, _ = reply(b"", "image/jpeg", picture)
    assert np.abs(decoding.decode_picture(body).samples.astype(int) - picture.samples).mean() < 1


def test_a_jpegs_comment_stays_in_jpeg() -> None:
    data = jpeg_with((0xFE, "Schloß".encode()), (0xFE, b"second"))
    body, (warning,) = reply(data, "image/jpeg")
    assert Image.open(io.BytesIO(body)).info["comment"] == "Schloß".encode()
    assert "a JPEG comment" in warning
    assert "image/png holds no JPEG comment: it was left out" in reply(data, "image/png")[1]


# HEIC and AVIF


def heif(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if format == "AVIF":
        Image.fromarray(SMOOTH).save(buffer, "AVIF", **options)
    elif pillow_heif is None:
        pytest.skip("no HEIC decoder here")
    else:
        pillow_heif.from_pillow(Image.fromarray(SMOOTH)).save(buffer, quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_avif_is_turned_as_its_container_says(orientation: int) -> None:
    plain, exif = heif("AVIF"), Image.Exif()
    exif[0x0112], exif[0x013B] = orientation, "Me"
    data = heif("AVIF", exif=exif)
    said, turn, _ = metadata.read(data)
    assert turn == orientation
    assert [entry.value for entry in said.exif.image] == [b"Me\0"]
    upright = metadata.turned(decoding.decode_picture(plain).samples, orientation)
    assert np.array_equal(decoding.decode_picture(data).samples, upright)


def test_colours_beyond_srgb_are_named_in_the_png() -> None:
    wide = {"color_primaries": 9, "transfer_characteristics": 16, "matrix_coefficients": 9, "full_range_flag": 1}
    said, _, _ = metadata.read(heif("HEIF", nclx_profile=wide))
    assert said.png_colour == ((b"cICP", bytes([9, 16, 0, 1])),)
    assert metadata.read(heif("HEIF"))[0].png_colour == ()


# TIFF


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_our_tiff_is_every_readers_tiff(channels: int, dtype: Any, order: str) -> None:
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (700, 301, channels), dtype, endpoint=True)
    array = array[..., 0] if channels == 1 else array
    colours = array if channels in (1, 3) else array[..., 0] if channels == 2 else array[..., :3]
    picture = Picture(colours, array[..., -1] if channels in (2, 4) else None)
    said, _, _ = metadata.read(jpeg_with((0xE1, b"Exif\0\0" + exif_block([text_row(0x010F, b"A maker")], order=order))))
    said = said._replace(jpeg=None, icc=b"profile!", xmp=xmp())
    body = encoding.encode_picture(picture._replace(metadata=said), "image/tiff")
    assert body[:2] == {"<": b"II", ">": b"MM"}[order]
    with tifffile.TiffFile(io.BytesIO(body)) as file:
        (page,) = file.pages
        assert np.array_equal(page.asarray(), array)
        assert page.photometric.name == ("RGB" if channels > 2 else "MINISBLACK")
        assert [extra.name for extra in page.extrasamples] == (["UNASSALPHA"] if channels in (2, 4) else [])
        assert page.tags[34675].value == b"profile!"
        assert page.tags[271].value == "A maker"
    if channels != 2 and (channels, dtype) != (4, np.uint8):  # OpenCV multiplies these colours by alpha
        read = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(read, array if channels == 1 else array[..., [2, 1, 0, 3][:channels]])
    if dtype == np.uint8 or channels == 1:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), array)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_leave_as_they_came(channels: int) -> None:
    array = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), np.uint16).squeeze()
    picture = decoding.decode_picture(tiff(array))
    for kind in ("image/tiff", "image/png"):
        body, warnings = reply(b"", kind, picture)
        assert np.array_equal(decoding.decode_picture(body).samples, array)
        assert warnings == []
    for kind in ("image/jpeg", "image/webp"):
        assert "8 bits" in reply(b"", kind, picture)[1][0]


# What would take for ever is not looked at to its end


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


BOMB = zlib.compress(bytes(100_000_000), 9)
ENDLESS = {
    # 40,000 items of 65,535 parts each, which take no byte of the file
    "HEIF items": box(b"ftyp", b"avif" + bytes(4)) + box(b"meta", bytes(4) + box(b"pitm", bytes(6)) + box(
        b"iinf", bytes(6)) + box(b"iloc", bytes(6) + b"\xff\xff" + b"\0\0\0\0\xff\xff" * 40_000)),
    "PNG text": png_with(*[(b"zTXt", b"a\0\0" + BOMB)] * 50),
    "PNG XMP": png_with(*[(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)] * 50),
    "PNG profiles": png_with(*[(b"iCCP", b"a\0\0" + BOMB)] * 50),
    "JPEG tables": b"\xff\xd8" + (b"\xff\xdb\xff\xfd" + (b"\0" + b"c" * 64) * 1008 + bytes(11)) * 100,
    "JPEG segments": b"\xff\xd8" + b"\xff\xe5\0\2" * 300_000,
    "GIF extensions": b"GIF89a" + bytes(7) + b"\x21\xfe\0" * 1_000_000,
    "GIF blocks": b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\1a" * 1_100_000,
    "BigTIFF": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**64 - 1) + struct.pack("<HHQQ", 270, 2, 2**63, 2**63) * 9,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDLESS)
def test_no_file_takes_for_ever(name: str) -> None:
    _, orientation, notes = metadata.read(ENDLESS[name])
    assert orientation == 1
    assert len(" ".join(notes)) < 500


# Every reply can be sent back


def joined(array: np.ndarray) -> np.ndarray:
    return array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array


def samples(channels: int, dtype: Any) -> np.ndarray:
    array = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (17, 23, channels), dtype, endpoint=True)
    return joined(array)


SAID_IN_JPEG = (
    (0xE1, b"Exif\0\0" + CAMERA), (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp()),
    (0xE2, b"ICC_PROFILE\0\1\1" + PROFILE), (0xFE, b"a comment"), (0xED, b"Photoshop 3.0\0"),
)  # fmt: skip
SAID_IN_PNG = (
    (b"gAMA", COLOURS[b"gAMA"]), (b"iCCP", b"p\0\0" + zlib.compress(PROFILE)), (b"eXIf", CAMERA),
    (b"pHYs", struct.pack(">IIB", 11811, 5906, 1)), *TEXTS, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp()),
    (b"tIME", bytes(7)),
)  # fmt: skip
SAID_IN_TIFF: dict[str, Any] = {
    "resolution": (300, 150), "resolutionunit": "inch", "iccprofile": PROFILE,
    "extratags": [(700, 1, len(xmp()), xmp(), True), (315, 2, None, "Jürgen".encode(), True)],
}  # fmt: skip


def inputs() -> Iterator[Any]:
    for dtype in (np.uint8, np.uint16):
        for channels in (1, 2, 3, 4):
            array = samples(channels, dtype)
            name = f"{channels} x {dtype.__name__}"
            yield pytest.param(write_png(array, SAID_IN_PNG), id=f"PNG {name}")
            yield pytest.param(write_tiff(array), id=f"plain TIFF {name}")
        for channels in (1, 3):
            yield pytest.param(tiff(samples(channels, dtype), **SAID_IN_TIFF), id=f"TIFF {channels} x {dtype.__name__}")
    yield pytest.param(write_png(SMOOTH), id="plain PNG")
    for mode in ("L", "RGB"):
        buffer = io.BytesIO()
        Image.fromarray(SMOOTH).convert(mode).save(buffer, "JPEG", quality=85, dpi=(300, 150))
        yield pytest.param(buffer.getvalue(), id=f"plain JPEG {mode}")
        yield pytest.param(jpeg_with(*SAID_IN_JPEG, data=buffer.getvalue()), id=f"JPEG {mode}")
    yield pytest.param(webp_with((b"ICCP", PROFILE), (b"EXIF", CAMERA), (b"XMP ", xmp())), id="WebP")
    yield pytest.param(encoded(SMOOTH, "BMP", dpi=(96, 96)), id="BMP")
    yield pytest.param(encoded(SMOOTH, "GIF", comment=b"a comment"), id="GIF")
    yield pytest.param(heif("AVIF", exif=CAMERA, xmp=xmp(), icc_profile=PROFILE), id="AVIF")
    if pillow_heif:
        yield pytest.param(heif("HEIF", exif=CAMERA, xmp=xmp(), icc_profile=PROFILE), id="HEIC")


def independently_read(data: bytes, kind: str) -> np.ndarray:
    if kind == "image/tiff":
        return tifffile.imread(io.BytesIO(data))
    decode = {
        "image/png": imagecodecs.png_decode, "image/jpeg": imagecodecs.jpeg8_decode,
        "image/webp": imagecodecs.webp_decode,
    }[kind]  # fmt: skip
    return np.asarray(decode(data))


def whole(picture: Picture) -> np.ndarray:
    return picture.samples if picture.alpha is None else np.dstack([picture.samples, picture.alpha])


@pytest.mark.slow
@pytest.mark.parametrize("data", list(inputs()))
@pytest.mark.parametrize("kind", KINDS)
def test_every_reply_can_be_sent_back(data: bytes, kind: str) -> None:
    picture = decoding.decode_picture(data)
    first, warnings = reply(b"", kind, picture)
    back = decoding.decode_picture(first)
    assert back.metadata.content_type == kind
    assert np.array_equal(independently_read(first, kind), whole(back))
    assert back.notes == ()
    second, more = reply(b"", kind, back)
    assert set(more) <= set(warnings)
    again = decoding.decode_picture(second)
    assert again.metadata == back.metadata
    if kind != "image/jpeg":
        assert second == first
        before, after = (picture.rgb, back.rgb) if kind == "image/webp" else (picture.samples, back.samples)
        assert np.array_equal(before, after)
    assert back.metadata.icc == picture.metadata.icc
    assert back.metadata.xmp == picture.metadata.xmp
    assert exif_tags.ORIENTATION not in exif_of(first)


# Nothing that shows the picture before the edit leaves


def marked_exif(order: str) -> bytes:
    """The marker in every tag of every directory but those of text, in every type that holds it; in a thumbnail."""
    long = MARKER * 3  # 42 bytes

    def rows(table: dict[int, exif_tags.Kept], others: tuple[int, ...]) -> list[Row]:
        marked = []
        for tag in sorted({*table, *others}):
            is_text = tag in table and table[tag].at_most is None
            type_ = 3 if is_text else 7
            marked.append((tag, type_, len(long) // SIZES[type_], long))
        return marked

    own = (254, 270, 273, 330, 347, 513, 700, 33723, 34377, 34675, 37724, 50341, 50706, 50740, 65000)
    image = rows(exif_tags.IMAGE, own)
    photo = rows(exif_tags.PHOTO, (0x927C, 0xA20C, 0xA302, 0xA40B, 0xEA1C, 0xFDE8))
    gps = rows(exif_tags.GPS, (0x63,))
    return exif_block(image, photo, gps, order, thumbnail=MARKER)


def marked_files() -> Iterator[Any]:
    for order in "<>":
        block = marked_exif(order)
        yield pytest.param(
            jpeg_with(
                *((0xE0 + n, MARKER) for n in range(16)),
                *((0xE0 + n, name + MARKER) for n, name in (
                    (0, b"JFXX\0\x10"), (1, b"http://ns.adobe.com/xmp/extension/\0"), (2, b"MPF\0"), (2, b"FPXR\0"),
                    (2, b"ICC_PROFILE\0\3\7"), (3, b"JPS_V\0"), (11, b"JP\0\1"), (13, b"Photoshop 3.0\x008BIM\4\x0c"),
                    (14, b"Adobe\0d\0\0\0\0\1"),
                )),
                (0xE1, b"Exif\0\0" + block), (0xFE, b"a comment"), (0xFE, MARKER), (0xFD, MARKER), (0xF0, MARKER),
                (0xE1, b"Exif\0\0" + exif_block([text_row(0x10F, MARKER)])),
            ) + MARKER,
            id=f"JPEG {order}",
        )  # fmt: skip
        ancillary = [b"bKGD", b"hIST", b"sPLT", b"pCAL", b"sCAL", b"oFFs", b"sTER", b"tIME", b"gIFg", b"gIFx", b"prVt",
                     b"caBX", b"iDOT", b"vpAg", b"fcTL", b"fdAT", b"dSIG", b"iCCP", *COLOURS, b"pHYs"]  # fmt: skip
        yield pytest.param(
            png_with(*((name, MARKER) for name in ancillary), (b"eXIf", block), (b"zTXt", b"a\0\1" + MARKER)) + MARKER,
            id=f"PNG {order}",
        )
        webp = webp_with((b"EXIF", block), (b"abcd", MARKER), (b"C2PA", MARKER), (b"EXIF", MARKER))
        yield pytest.param(webp + MARKER, id=f"WebP {order}")
        tags = [
            (tag, type_, len(value) // SIZES[type_], value, True)
            for tag, type_, value in (
                (330, 4, struct.pack(f"{order}I", 8)), (33723, 7, MARKER), (34377, 7, MARKER), (37724, 7, MARKER),
                (347, 7, MARKER), (50706, 1, MARKER[:4]), (50740, 1, MARKER), (65000, 7, MARKER), (32781, 2, MARKER),
                (270, 3, MARKER), (305, 7, MARKER), (40001, 12, MARKER[:8]), (42112, 2, MARKER), (50839, 1, MARKER),
            )
        ]  # fmt: skip
        for big in (False, True):
            buffer = io.BytesIO()
            with tifffile.TiffWriter(buffer, byteorder=order, bigtiff=big) as writer:
                writer.write(SMOOTH, photometric="rgb", metadata=None, software=False, extratags=tags)
                writer.write(np.frombuffer(MARKER * 3, np.uint8).reshape(1, 14, 3), photometric="rgb", metadata=None)
            yield pytest.param(buffer.getvalue() + MARKER, id=f"TIFF {order}{' big' * big}")
    yield pytest.param(encoded(SMOOTH, "GIF", comment=MARKER) + MARKER, id="GIF")
    yield pytest.param(encoded(SMOOTH, "BMP") + MARKER, id="BMP")
    yield pytest.param(heif("AVIF", exif=marked_exif("<")), id="AVIF")
    if pillow_heif:
        yield pytest.param(heif("HEIF", exif=marked_exif(">"), thumbnails=[16]) + MARKER, id="HEIC")


@pytest.mark.parametrize("data", list(marked_files()))
def test_nothing_of_the_original_leaves(data: bytes) -> None:
    assert MARKER in data
    for kind in KINDS:
        body, warnings = reply(data, kind)
        assert MARKER not in body
        assert len(" ".join(warnings)) < 1000
        if data[:2] != b"BM":
            assert any("holds what the reply leaves out" in warning for warning in warnings)


FILES = [each.values[0] for each in (*inputs(), *marked_files())]


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_no_damage_to_a_file_breaks_anything(file: bytes, changes: list[tuple[float, int]]) -> None:
    data = bytearray(file)
    for where, value in changes:
        # Most of what can go wrong lies in front: the square brings changes there.
        data[int(where**2 * (len(data) - 1))] = value
    said, _, _ = metadata.read(bytes(data))
    for kind in KINDS:
        body = encoding.encode_picture(Picture(SMOOTH[:4, :4], metadata=said), kind)
        again, upright, notes = metadata.read(body)
        assert (upright, notes) == (1, ())
        assert encoding.encode_picture(Picture(SMOOTH[:4, :4], metadata=again._replace(jpeg=said.jpeg)), kind) == body
