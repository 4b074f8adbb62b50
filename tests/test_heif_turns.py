"""HEIC and AVIF are cropped, turned and mirrored as their container says, once, whatever EXIF says beside it."""

import io
import struct
from collections.abc import Iterator
from itertools import product

import imagecodecs
import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps

from handlers.pictures import decoding, encoding
from handlers.pictures.picture import Picture

HEIGHT, WIDTH = 64, 96
PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), np.uint8)).resize((WIDTH, HEIGHT), 3)
)
Properties = list[tuple[bytes, bytes]]


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), kind) + body


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + length]
        at += length


def with_properties(data: bytes, properties: Properties) -> bytes:
    """The file with further properties of its primary picture, behind those that it has."""
    meta = dict(boxes(data))[b"meta"]
    inside = dict(boxes(meta[4:]))
    listed = dict(boxes(inside[b"iprp"]))
    first = 1 + len(list(boxes(listed[b"ipco"])))
    container = listed[b"ipco"] + b"".join(box(*each) for each in properties)
    association, at = listed[b"ipma"][:8], 8
    for _ in range(int.from_bytes(listed[b"ipma"][4:8], "big")):
        item, count = struct.unpack_from(">HB", listed[b"ipma"], at)
        numbers, at = listed[b"ipma"][at + 3 : at + 3 + count], at + 3 + count
        if item == int.from_bytes(inside[b"pitm"][4:6], "big"):
            numbers += bytes(0x80 | (first + index) for index in range(len(properties)))
        association += struct.pack(">HB", item, len(numbers)) + numbers
    inside[b"iprp"] = box(b"ipco", container) + box(b"ipma", association)
    grown = len(inside[b"iprp"]) - len(dict(boxes(meta[4:]))[b"iprp"])
    inside[b"iloc"] = moved(inside[b"iloc"], grown)
    written = {b"meta": meta[:4] + b"".join(box(*each) for each in inside.items())}
    return b"".join(box(kind, written.get(kind, body)) for kind, body in boxes(data))


def moved(iloc: bytes, by: int) -> bytes:
    """With the places of all that lies in the file, and not in `idat`, moved."""
    version, of_offset, of_length = iloc[0], iloc[4] >> 4, iloc[4] & 15
    of_base, of_index = iloc[5] >> 4, iloc[5] & 15 if version else 0
    assert of_offset == 4
    places, at = bytearray(iloc), 8
    for _ in range(int.from_bytes(iloc[6:8], "big")):
        in_file = version == 0 or iloc[at + 3] & 15 == 0
        at += (6 if version else 4) + of_base
        parts, at = int.from_bytes(iloc[at : at + 2], "big"), at + 2
        for _ in range(parts):
            at += of_index
            if in_file:
                places[at : at + 4] = (int.from_bytes(iloc[at : at + 4], "big") + by).to_bytes(4, "big")
            at += 4 + of_length
    return bytes(places)


def file(kind: str, pixels: np.ndarray = PHOTO, orientation: int = 1) -> bytes:
    """orientation: that of an EXIF block, which says nothing of these pixels."""
    if kind == "AVIF, 10 bits":
        return imagecodecs.avif_encode(pixels.astype(np.uint16) << 2, level=100, bitspersample=10)
    # Encoders would turn what EXIF says into the container's own properties: so it says it in the end only.
    exif, buffer, placeholder = Image.Exif(), io.BytesIO(), b"\x01\x13\0\3\0\0\0\1"
    exif[0x0113], exif[0x013B] = orientation, "Me"
    if kind == "HEIC":
        mode, size = "RGB" if pixels.shape[2] == 3 else "RGBA", pixels.shape[1::-1]
        heif = pillow_heif.from_bytes(mode, size, np.ascontiguousarray(pixels).tobytes())
        heif.save(buffer, quality=-1, chroma=444, exif=exif.tobytes())
    else:
        Image.fromarray(pixels).save(buffer, "AVIF", quality=100, subsampling="4:4:4", exif=exif.tobytes())
    assert buffer.getvalue().count(placeholder) == 1
    return buffer.getvalue().replace(placeholder, b"\x01\x12\0\3\0\0\0\1")


def aperture(left: int, top: int, width: int, height: int, whole: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    right, down = 2 * left + width - whole[0], 2 * top + height - whole[1]
    return struct.pack(">IIIIiIiI", width, 1, height, 1, right, 2, down, 2)


def shown(properties: Properties, pixels: np.ndarray = PHOTO) -> np.ndarray:
    """By the standard: in the order in which they are listed."""
    for kind, value in properties:
        if kind == b"irot":
            pixels = np.rot90(pixels, value[0])
        elif value == b"\0":
            pixels = pixels[::-1]
        else:
            pixels = pixels[:, ::-1]
    return pixels


def turns() -> Iterator[Properties]:
    for quarter, axis in product((None, 0, 1, 2, 3), (None, 0, 1)):
        both = [(b"irot", quarter), (b"imir", axis)]
        said = [(kind, bytes([value])) for kind, value in both if value is not None]
        yield said
        if len(said) == 2:
            yield said[::-1]


def check(data: bytes, expected: np.ndarray, tolerance: int = 4) -> None:
    picture = decoding.decode_picture(data)
    assert picture.rgb.shape == expected.shape
    assert np.abs(picture.rgb.astype(int) - expected).max() <= tolerance
    for kind in ("image/png", "image/tiff"):
        again = decoding.decode_picture(encoding.encode_picture(picture, kind))
        assert np.array_equal(again.samples, picture.samples)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AVIF", "AVIF, 10 bits", "HEIC"])
def test_every_turn_is_made_once(kind: str) -> None:
    plain = file(kind)
    for properties in turns():
        check(with_properties(plain, properties), shown(properties))


def test_other_decoders_turn_alike() -> None:
    avif, heic = file("AVIF"), file("HEIC")
    for properties in turns():
        data = with_properties(heic, properties)
        assert np.array_equal(decoding.decode_picture(data).samples, pillow_heif.open_heif(data))
        if [kind for kind, _ in properties] == [b"imir", b"irot"]:
            continue  # libavif turns before it mirrors, whichever is listed first
        data = with_properties(avif, properties)
        assert np.array_equal(
            decoding.decode_picture(data).samples, ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_never_turns_them(kind: str, orientation: int) -> None:
    plain = file(kind, orientation=orientation)
    for properties in ([], [(b"irot", b"\1")], [(b"irot", b"\3"), (b"imir", b"\1")]):
        data = with_properties(plain, list(properties))
        check(data, shown(list(properties)))
        entries = decoding.decode_picture(data).metadata.exif.image
        assert [entry.value for entry in entries] == [b"Me\0"]


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_masks_are_turned_as_pictures_are(kind: str) -> None:
    marked = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    marked[5:20, 8:60] = 255
    for properties in turns():
        expected = shown(properties, marked)
        mask = decoding.decode_mask(with_properties(file(kind, marked), properties), Picture(~expected))
        assert np.array_equal(mask, expected[..., 0] == 255)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AVIF", "AVIF, 10 bits", "HEIC"])
def test_what_lies_outside_the_clean_aperture_is_not_shown(kind: str) -> None:
    inside = PHOTO[10:43, 7:78]
    for properties in ([], [(b"irot", b"\1")], [(b"irot", b"\2"), (b"imir", b"\1")]):
        data = with_properties(file(kind), [(b"clap", aperture(7, 10, 71, 33)), *properties])
        check(data, shown(list(properties), inside))


def test_alpha_is_cropped_and_turned_with_its_picture() -> None:
    rgba = np.dstack([PHOTO, PHOTO[..., :1]])
    properties: Properties = [(b"irot", b"\3"), (b"imir", b"\0")]
    picture = decoding.decode_picture(
        with_properties(file("AVIF", rgba), [(b"clap", aperture(7, 10, 71, 33)), *properties])
    )
    assert picture.alpha is not None
    expected = shown(properties, rgba[10:43, 7:78])
    assert np.abs(np.dstack([picture.samples, picture.alpha]).astype(int) - expected).max() <= 4


@pytest.mark.parametrize(
    "value",
    [
        aperture(60, 10, 71, 33), aperture(-1, 0, 20, 20), aperture(0, 0, 0, 10), bytes(32), b"", b"\0" * 31,
        struct.pack(">IIIIiIiI", 71, 1, 33, 1, 0, 1, 0, 1), struct.pack(">IIIIiIiI", 71, 2, 32, 1, 0, 1, 0, 1),
    ],
)  # fmt: skip
def test_a_clean_aperture_that_is_none_is_refused(value: bytes) -> None:
    with pytest.raises(decoding.NotAPicture, match="damaged"):
        decoding.decode_picture(with_properties(file("AVIF"), [(b"clap", value)]))


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_what_is_coded_is_limited_however_little_of_it_is_shown(kind: str) -> None:
    sides = struct.pack(">II", 20_000, 20_000)
    plain = file(kind).replace(struct.pack(">II", WIDTH, HEIGHT), sides)
    corner = aperture(0, 0, 8, 8, (20_000, 20_000))
    with pytest.raises(decoding.TooLarge, match="20000x20000"):
        decoding.decode_picture(with_properties(plain, [(b"clap", corner)]))


def test_colours_that_were_multiplied_by_alpha_are_divided_by_it() -> None:
    colours, alpha = PHOTO // 2, np.full((HEIGHT, WIDTH), 128, np.uint8)
    for mode, most in (("RGBa", 255), ("RGBa;16", 65535)):
        buffer, scale = io.BytesIO(), most // 255
        stored = np.dstack([colours, alpha]).astype(np.uint8 if most == 255 else np.uint16) * scale
        pillow_heif.from_bytes(mode, (WIDTH, HEIGHT), stored.tobytes()).save(buffer, quality=-1, chroma=444)
        assert b"prem" in buffer.getvalue()
        picture = decoding.decode_picture(buffer.getvalue())
        assert np.abs(picture.samples - PHOTO.astype(float) * scale).max() <= 9 * scale
        assert picture.alpha is not None
        assert np.abs(picture.alpha - 128.0 * scale).max() <= 2 * scale
