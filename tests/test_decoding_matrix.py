"""PNG, JPEG, WebP, AVIF and HEIC over what each format allows, against decoders that share no code with ours.

Where the decoder is the same library (libjpeg-turbo), what is checked is that the right samples come out of the right
file: the layout, the depth, the transparency.
"""

import io
import struct
import zlib
from itertools import product
from typing import Any

import imagecodecs
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from handlers.pictures import decoding

HEIGHT, WIDTH = 13, 19
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
BESIDE: list[list[tuple[bytes, bytes]]] = [
    [],
    [(b"gAMA", struct.pack(">I", 45455)), (b"sRGB", b"\0")],
    [(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000))), (b"tEXt", b"a\0" + bytes([65]) * 2_000_000)],
]
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def scanlines(values: np.ndarray, depth: int) -> bytes:
    """HxWxC -> rows with filter 0."""
    if not values.size:
        return b""
    if depth == 16:
        rows = values.astype(">u2").reshape(len(values), -1).view(np.uint8)
    elif depth == 8:
        rows = values.astype(np.uint8).reshape(len(values), -1)
    else:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=3)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(len(values), -1), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in rows)


def png(values: np.ndarray, depth: int, colour: int, interlaced: bool, extra: list[tuple[bytes, bytes]]) -> bytes:
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, colour, 0, 0, interlaced)
    passes = [values[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [values]
    data = zlib.compress(b"".join(scanlines(part, depth) for part in passes))
    parts = [(b"IHDR", head), *extra, (b"IDAT", data[: len(data) // 2]), (b"IDAT", data[len(data) // 2 :])]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts) + chunk(b"IEND", b"")


@pytest.mark.slow
@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
def test_png(colour: int) -> None:
    random = np.random.default_rng(colour)
    for depth, interlaced, keyed, beside in product(DEPTHS[colour], (False, True), (False, True), BESIDE):
        values = random.integers(0, 2**depth, (HEIGHT, WIDTH, CHANNELS[colour]))
        extra = list(beside)
        palette = random.integers(0, 256, (2**depth, 3)).astype(np.uint8)
        opacity = random.integers(0, 256, max(1, 2**depth // 2)).astype(np.uint8)
        if colour == 3:
            extra.append((b"PLTE", palette.tobytes()))
        key = values[3, 5]
        if keyed and colour in (0, 2):
            extra.append((b"tRNS", key.astype(">u2").tobytes()))
        elif keyed and colour == 3:
            extra.append((b"tRNS", opacity.tobytes()))
        picture = decoding.decode_picture(png(values, depth, colour, interlaced, extra))
        most = 65535 if depth == 16 else 255
        full = (values * (most // (2**depth - 1))).astype(np.uint16 if depth == 16 else np.uint8)
        alpha = None
        if colour == 3:
            expected = palette[values[..., 0]]
            if keyed:
                alpha = np.append(opacity, np.full(256, 255))[values[..., 0]]
        else:
            expected = full[..., 0] if colour in (0, 4) else full[..., :3]
            if colour in (4, 6):
                alpha = full[..., -1]
            elif keyed:
                alpha = (values != key).any(axis=2) * most
        case = f"{colour=} {depth=} {interlaced=} {keyed=} {[name for name, _ in extra]}"
        np.testing.assert_array_equal(picture.samples, expected, err_msg=case)
        assert (picture.alpha is None) == (alpha is None), case
        if alpha is not None:
            np.testing.assert_array_equal(picture.alpha, alpha, err_msg=case)
            assert picture.alpha.dtype == picture.samples.dtype


def test_png_reads_past_what_is_broken_beside_the_picture_only() -> None:
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3))
    whole = png(values, 8, 2, False, [(b"tEXt", b"note\0text")])
    text, data = whole.index(b"tEXt"), whole.index(b"IDAT")
    broken_text = whole[: text + 13] + b"\0\0\0\0" + whole[text + 17 :]
    for served in (broken_text, whole[:-12], whole + b"trailer"):
        np.testing.assert_array_equal(decoding.decode_picture(served).samples, values)
    for damaged in (whole[:-20], whole[: data + 20], whole[: data + 4] + b"\0" + whole[data + 5 :]):
        with pytest.raises(decoding.NotAPicture, match="damaged"):
            decoding.decode_picture(damaged)
    short = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0))
    short += chunk(b"PLTE", bytes(6)) + chunk(b"IDAT", zlib.compress(bytes(9 * 4))) + chunk(b"IEND", b"")
    with pytest.raises(decoding.NotAPicture, match="damaged"):  # four rows of eight
        decoding.decode_picture(short)


PHOTO = np.asarray(
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3)).astype(np.uint8)).resize((96, 72), 3)
)


def saved(pixels: np.ndarray, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg(progressive: bool, subsampling: int) -> None:
    film = (
        b"\0\0\0\x18ftypmp42"
        + np.random.default_rng(0).integers(0, 256, 400_000, np.uint8).tobytes()
        + b"\xff\xda" * 200
    )
    for pixels, restart, trailer in product((PHOTO, PHOTO[..., 0]), (0, 1), (b"", film)):
        data = saved(
            pixels, "JPEG", quality=85, progressive=progressive, subsampling=subsampling, restart_marker_blocks=restart
        )
        expected = imagecodecs.jpeg8_decode(data)
        np.testing.assert_array_equal(decoding.decode_picture(data + trailer).samples, expected)
        np.testing.assert_array_equal(decoding.decode_picture(data[:-2]).samples, expected)
        np.testing.assert_array_equal(decoding.decode_picture(data[:-1]).samples, expected)
        for cut in (40, len(data) // 2):
            with pytest.raises(decoding.NotAPicture, match="damaged"):
                decoding.decode_picture(data[:-cut])


def test_jpeg_tables_of_any_id() -> None:
    data = bytearray(saved(PHOTO, "JPEG"))
    for table in (0, 1):
        data[data.index(b"\xff\xdb\0C" + bytes([table])) + 4] += 2
    frame = data.index(b"\xff\xc0")
    for component in range(3):
        data[frame + 12 + 3 * component] += 2
    np.testing.assert_array_equal(
        decoding.decode_picture(bytes(data)).samples, imagecodecs.jpeg8_decode(saved(PHOTO, "JPEG"))
    )


def test_jpeg_of_four_inks() -> None:
    inks = np.dstack([PHOTO, PHOTO[..., 0]])
    data = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(data, "JPEG", quality=95)
    picture = decoding.decode_picture(data.getvalue())
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    assert np.abs(picture.samples - expected).mean() < 8
    assert picture.notes == ("was converted from CMYK to sRGB",)


@pytest.mark.parametrize(
    ("frame", "words"), [(0xC3, "lossless JPEG"), (0xC9, "arithmetic-coded JPEG"), (0xC5, "hierarchical JPEG")]
)
def test_jpeg_of_other_kinds_is_refused_by_name(frame: int, words: str) -> None:
    data = saved(PHOTO, "JPEG").replace(b"\xff\xc0", bytes([0xFF, frame]), 1)
    with pytest.raises(decoding.NotAPicture, match=f"{words}.*unsupported"):
        decoding.decode_picture(data)


def test_jpeg_of_12_bits_is_refused_by_name() -> None:
    data = imagecodecs.jpeg_encode(np.full((16, 16), 2000, np.uint16), bitspersample=12)
    with pytest.raises(decoding.NotAPicture, match=r"JPEG of 12 bits.*unsupported"):
        decoding.decode_picture(data)


def test_webp() -> None:
    alpha = np.random.default_rng(0).integers(0, 256, (72, 96, 1)).astype(np.uint8)
    for pixels, lossless in product((PHOTO, np.dstack([PHOTO, alpha])), (True, False)):
        data = saved(pixels, "WEBP", lossless=lossless, exact=True)
        expected = imagecodecs.webp_decode(data)
        picture = decoding.decode_picture(data)
        np.testing.assert_array_equal(picture.samples, expected[..., :3])
        if pixels.shape[2] == 4:
            np.testing.assert_array_equal(picture.alpha, expected[..., 3])
        with pytest.raises(decoding.NotAPicture, match="damaged"):
            decoding.decode_picture(data[:-30])


@pytest.mark.slow
@pytest.mark.parametrize("brand", [b"avif", b"mif1", b"msf1", b"miaf"])
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("with_alpha", [False, True])
def test_avif(brand: bytes, bits: int, with_alpha: bool) -> None:
    pixels = np.dstack([PHOTO, PHOTO[..., :1]]) if with_alpha else PHOTO
    deep = pixels if bits == 8 else pixels.astype(np.uint16) << (bits - 8) | 3
    data = imagecodecs.avif_encode(deep, level=100, bitspersample=bits)
    expected = imagecodecs.avif_decode(data)
    picture = decoding.decode_picture(data[:8] + brand + data[12:])
    if bits > 8:
        expected = np.round(expected.astype(float) * 65535 / (2**bits - 1))
        assert picture.samples.dtype == np.uint16
    tolerance = 2 if bits == 8 else 2 * 65535 / (2**bits - 1)
    assert np.abs(picture.samples - expected[..., :3].astype(float)).max() <= tolerance
    assert (picture.alpha is not None) == with_alpha
    if picture.alpha is not None:
        assert np.abs(picture.alpha - expected[..., 3].astype(float)).max() <= tolerance


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_heic(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pillow_heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    mode, stored = ("RGB", PHOTO) if bits == 8 else ("RGB;16", PHOTO.astype(np.uint16) * 257)
    buffer = io.BytesIO()
    pillow_heif.from_bytes(mode, (96, 72), stored.tobytes()).save(buffer, quality=-1, chroma=444)
    picture = decoding.decode_picture(buffer.getvalue())
    assert picture.samples.dtype == (np.uint8 if bits == 8 else np.uint16)
    assert np.abs(picture.samples.astype(float) - stored).max() <= (4 if bits == 8 else 4 * 65535 / (2**bits - 1))
    white = np.full((64, 64, 3), 255 if bits == 8 else 65535, stored.dtype)
    buffer = io.BytesIO()
    pillow_heif.from_bytes(mode, (64, 64), white.tobytes()).save(buffer, quality=-1, chroma=444)
    assert decoding.decode_picture(buffer.getvalue()).samples.min() >= (254 if bits == 8 else 65000)


def test_what_a_heic_may_be_large_is_what_any_picture_may(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    pillow_heif.from_bytes("RGB", (96, 72), PHOTO.tobytes()).save(buffer)
    monkeypatch.setattr("handlers.pictures.pixels.LIMITS", decoding_limits(max_side=90))
    with pytest.raises(decoding.TooLarge, match="90 pixels a side"):
        decoding.decode_picture(buffer.getvalue())


def decoding_limits(**changed: int) -> Any:
    from handlers.pictures.limits import LIMITS

    return LIMITS._replace(**changed)
