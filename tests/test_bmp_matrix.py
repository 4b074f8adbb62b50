"""Every BMP is read to the very samples that were put into it, or refused by name."""

import io
import struct
from itertools import product

import imagecodecs
import numpy as np
import pytest
from conftest import encoded
from PIL import Image, ImageCms

from handlers.pictures import decoding

HEIGHT, WIDTH = 13, 19  # no row of a whole number of words, whatever the bits
PLAIN, RLE8, RLE4, MASKS, ALPHA_MASKS = 0, 1, 2, 3, 6
SCREENS = {16: (0x7C00, 0x3E0, 0x1F), 32: (0xFF0000, 0xFF00, 0xFF)}


def bmp(
    pixels: bytes,
    bits: int,
    header: int = 40,
    compression: int = PLAIN,
    palette: np.ndarray | None = None,
    masks: tuple[int, ...] = (),
    top_down: bool = False,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> bytes:
    width, height = size
    if header == 12:
        head = struct.pack("<I4H", 12, width, height, 1, bits)
    else:
        colours = 0 if palette is None or len(palette) == 2**bits else len(palette)
        signed = -height if top_down else height
        head = struct.pack("<IiiHHIIiiII", header, width, signed, 1, bits, compression, 0, 0, 0, colours, 0)
    head += struct.pack(f"<{len(masks)}I", *masks)
    head = head.ljust(header, b"\0")
    if palette is not None:
        bgr = palette[:, ::-1].astype(np.uint8)
        head += (bgr if header == 12 else np.insert(bgr, 3, 0, axis=1)).tobytes()
    start = 14 + len(head)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + pixels


def rows(values: np.ndarray, bits: int, top_down: bool) -> bytes:
    """HxW or, of 24 bits, HxWx3 values -> rows of whole words."""
    if bits < 8:
        each = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :].reshape(len(values), -1)
        packed = [row.tobytes() for row in np.packbits(each, axis=1)]
    else:
        packed = [row.astype({16: "<u2", 32: "<u4"}.get(bits, "u1")).tobytes() for row in values]
    ordered = packed if top_down else packed[::-1]
    return b"".join(row + b"\xee" * (-len(row) % 4) for row in ordered)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits: int) -> None:
    random = np.random.default_rng(bits)
    for header, top_down, count in product((12, 40, 52, 56, 64, 108, 124), (False, True), (2**bits, 2**bits - 1)):
        if header == 12 and (top_down or count < 2**bits):
            continue  # it can't say so
        palette = random.integers(0, 256, (count, 3), np.uint8)
        indices = random.integers(0, 2**bits, (HEIGHT, WIDTH))
        data = bmp(rows(indices, bits, top_down), bits, header, palette=palette, top_down=top_down)
        expected = np.append(palette, np.zeros((1, 3), np.uint8), axis=0)[indices]
        picture = decoding.decode_picture(data)
        np.testing.assert_array_equal(picture.samples, expected, err_msg=f"{header=} {top_down=} {count=}")
        assert picture.alpha is None
        if (bits, header, count) == (8, 40, 256):
            np.testing.assert_array_equal(imagecodecs.bmp_decode(data, asrgb=True), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_palettes_are_grey(bits: int) -> None:
    ramp = np.linspace(0, 255, 2**bits).astype(np.uint8)
    for table in (ramp, ramp[::-1], np.arange(2**bits, dtype=np.uint8)):
        indices = np.random.default_rng(bits).integers(0, 2**bits, (HEIGHT, WIDTH))
        data = bmp(rows(indices, bits, False), bits, palette=np.repeat(table[:, None], 3, axis=1))
        np.testing.assert_array_equal(decoding.decode_picture(data).samples, table[indices])


def test_whole_bytes() -> None:
    values = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    for header, top_down in product((12, 40, 64, 124), (False, True)):
        if header > 12 or not top_down:
            data = bmp(rows(values[..., ::-1], 24, top_down), 24, header, top_down=top_down)
            np.testing.assert_array_equal(decoding.decode_picture(data).samples, values)
    np.testing.assert_array_equal(decoding.decode_picture(imagecodecs.bmp_encode(values)).samples, values)
    for written in (values, values[..., 0]):
        np.testing.assert_array_equal(decoding.decode_picture(encoded(written, "BMP")).samples, written)


@pytest.mark.parametrize("bits", [16, 32])
def test_without_masks(bits: int) -> None:
    """Of 32 bits the upper 8 are nothing, whatever they hold."""
    values = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH))
    for header, top_down in product((40, 56, 108, 124), (False, True)):
        # Masks that the header has, but its method does not use.
        data = bmp(rows(values, bits, top_down), bits, header, masks=(1, 2, 4, 8) * (header > 40), top_down=top_down)
        picture = decoding.decode_picture(data)
        np.testing.assert_array_equal(picture.samples, np.dstack([spread(values, mask) for mask in SCREENS[bits]]))
        assert picture.alpha is None


def spread(values: np.ndarray, mask: int) -> np.ndarray:
    low = mask & -mask
    return np.rint((values & mask) // low * 255 / (mask // low)).astype(np.uint8)


LAYOUTS = {
    16: [
        (0x7C00, 0x3E0, 0x1F, 0), (0xF800, 0x7E0, 0x1F, 0), (0x7C00, 0x3E0, 0x1F, 0x8000), (0x1F, 0x3E0, 0x7C00, 0),
        (0xF00, 0xF0, 0xF, 0xF000), (0xE000, 0x1C00, 0x380, 0x7F), (0xFF00, 0xFC, 2, 1),
    ],
    32: [
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000), (0xFF, 0xFF00, 0xFF0000, 0xFF000000), (0xFF, 0xFF00, 0xFF0000, 0),
        (0xFF000000, 0xFF0000, 0xFF00, 0xFF), (0xFF00, 0xFF0000, 0xFF000000, 0xFF), (0xF8000000, 0x7E0000, 0x1F, 0x100),
    ],
}  # fmt: skip


@pytest.mark.parametrize("bits", [16, 32])
def test_masks(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (HEIGHT, WIDTH))
    for header, top_down, masks in product((40, 52, 56, 108, 124), (False, True), LAYOUTS[bits]):
        methods = (MASKS, ALPHA_MASKS) if header == 40 else (MASKS,)
        for method in methods:
            has_alpha = bool(masks[3]) and (method == ALPHA_MASKS or header >= 56)
            stated = masks if header != 40 or method == ALPHA_MASKS else masks[:3]
            data = bmp(rows(values, bits, top_down), bits, header, method, masks=stated, top_down=top_down)
            picture = decoding.decode_picture(data)
            case = f"{header=} {top_down=} {masks=} {method=}"
            expected = np.dstack([spread(values, mask) for mask in masks[:3]])
            np.testing.assert_array_equal(picture.samples, expected, err_msg=case)
            assert (picture.alpha is not None) == has_alpha, case
            if has_alpha:
                np.testing.assert_array_equal(picture.alpha, spread(values, masks[3]), err_msg=case)


def run_lengths(values: np.ndarray, halves: bool, seed: int) -> tuple[bytes, np.ndarray]:
    """Codes of every kind for the rows from below, and what they say: 0 where they skip."""
    random = np.random.default_rng(seed)
    said, codes, y = np.zeros_like(values), b"", 0
    height, width = values.shape
    while y < height:
        row, x = values[height - 1 - y], 0
        while x < width:
            kind, length = (
                random.choice(["run", "plain", "skip", "end of row", "skip up"], p=[0.4, 0.4, 0.1, 0.07, 0.03]),
                0,
            )
            if kind == "run":
                length = min(int(random.integers(1, 12)), width - x)
                two = row[x : x + 2].tolist()
                pair = (two[0], two[-1]) if halves else (two[0], two[0])
                said[height - 1 - y, x : x + length] = np.resize(pair, length)
                codes += bytes([length, pair[0] << 4 | pair[1] if halves else pair[0]])
            elif kind == "plain" and width - x >= 3:
                length = int(random.integers(3, width - x + 1))
                part = row[x : x + length]
                said[height - 1 - y, x : x + length] = part
                padded = np.append(part, 0)[: length + length % 2].reshape(-1, 2)
                stored = bytes(high << 4 | low for high, low in padded.tolist()) if halves else part.tobytes()
                codes += bytes([0, length]) + stored + b"\0" * (len(stored) % 2)
            elif kind == "skip":
                length = int(random.integers(0, width - x))
                codes += bytes([0, 2, length, 0])
            elif kind == "end of row":
                break
            elif kind == "skip up" and y + 3 < height:
                codes += bytes([0, 2, 0, 2])  # and so this row is left in the middle
                y += 2
                row = values[height - 1 - y]
            x += length
        codes, y = codes + b"\0\0", y + 1
    return codes + b"\0\1", said


@pytest.mark.parametrize("halves", [False, True])
def test_run_lengths(halves: bool) -> None:
    bits, method = (4, RLE4) if halves else (8, RLE8)
    for seed in range(30):
        random = np.random.default_rng(seed)
        palette = random.integers(0, 256, (2**bits, 3), np.uint8)
        values = random.integers(0, 2**bits, (HEIGHT, WIDTH), np.uint8)
        codes, said = run_lengths(values, halves, seed)
        picture = decoding.decode_picture(bmp(codes, bits, compression=method, palette=palette))
        np.testing.assert_array_equal(picture.samples, palette[said], err_msg=f"{seed=}")


def test_run_lengths_end_as_they_should_or_are_damaged() -> None:
    palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)

    def decoded(codes: bytes) -> np.ndarray:
        return decoding.decode_picture(bmp(codes, 8, compression=RLE8, palette=palette, size=(4, 2))).samples

    full = palette[np.array([[9, 9, 9, 9], [7, 7, 7, 7]])]
    whole = b"\4\7\0\0\4\x09"
    for ending in (b"", b"\0\1", b"\0\0\0\1", b"\0\0\4\5\4\5"):  # none; as it should be; and what would lie above
        np.testing.assert_array_equal(decoded(whole + ending), full)
    np.testing.assert_array_equal(decoded(b"\xff\7\0\0\xff\x09\0\1"), full)  # runs longer than the row are cut
    np.testing.assert_array_equal(decoded(b"\0\1"), palette[np.zeros((2, 4), int)])
    for cut in (b"", b"\4", b"\4\7", b"\4\7\0\0", b"\4\7\0\0\3\7", b"\4\7\0\0\0\4ab"):
        with pytest.raises(decoding.NotAPicture, match="damaged: it ends too early"):
            decoded(cut)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bmp(b"", 8, compression=4), "compressed with JPEG, which is unsupported"),
        (bmp(b"", 8, compression=5), "compressed with PNG, which is unsupported"),
        (bmp(b"", 1, header=64, compression=3), "compressed with method 3, which is unsupported"),
        (bmp(b"", 24, compression=RLE8), "24 bits a pixel with method 1, which is unsupported"),
        (bmp(b"", 64), "64 bits a pixel with method 0, which is unsupported"),
        (bmp(bytes(10), 8, header=16), "header of 16 bytes, which is unsupported"),
        (bmp(bytes(4 * WIDTH * HEIGHT), 32, 40, MASKS, masks=(0x3FF00000, 0xFFC00, 0x3FF)), "10 bits a channel"),
        (bmp(bytes(4 * WIDTH * HEIGHT), 32, 40, MASKS, masks=(0xFF, 0xFF, 0xFF)), "damaged: the bit masks"),
        (bmp(bytes(4 * WIDTH * HEIGHT), 32, 40, MASKS, masks=(0xF0F, 0xF0, 0xF000)), "damaged: the bit masks"),
        (bmp(b"\0\1", 8, compression=RLE8, top_down=True), "damaged: what is run-length coded goes upwards"),
        (bmp(b"\0\2\0\0" * 1_000_001, 8, compression=RLE8), "of more than 1,000,000 run-length codes"),
        (bmp(b"", 8, size=(-WIDTH, HEIGHT)), "damaged: its header says -19 pixels across"),
        (bmp(b"", 8, size=(0, HEIGHT)), "damaged: its header says 0x13 pixels"),
    ],
)
def test_what_is_not_read_is_named(data: bytes, words: str) -> None:
    with pytest.raises(decoding.NotAPicture, match=words):
        decoding.decode_picture(data)


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 24, 32])
def test_a_cut_file_is_damaged_but_for_the_padding_at_its_end(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2 ** min(bits, 16), (HEIGHT, WIDTH * (3 if bits == 24 else 1)))
    palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3), np.uint8) if bits <= 8 else None
    data = bmp(rows(values, bits, False), bits, palette=palette)
    padding = -((WIDTH * bits + 7) // 8) % 4
    whole = decoding.decode_picture(data).samples
    assert np.array_equal(decoding.decode_picture(data[: len(data) - padding]).samples, whole)
    with pytest.raises(decoding.NotAPicture, match="damaged: it ends too early"):
        decoding.decode_picture(data[: len(data) - padding - 1])


def test_a_profile_in_the_file_is_kept() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = bytearray(bmp(bytes(HEIGHT * 60), 24, header=124))
    data[70:74] = b"DEBM"
    data[126:134] = struct.pack("<II", len(data) - 14, len(profile))
    assert decoding.decode_picture(bytes(data) + profile).metadata.icc == profile
    assert decoding.decode_picture(bytes(data)).metadata.icc is None


def test_what_pillow_writes_is_read_as_pillow_reads_it() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8))
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, "BMP")
        expected = np.asarray(Image.open(buffer).convert("L" if mode in ("1", "L") else "RGB"))
        np.testing.assert_array_equal(decoding.decode_picture(buffer.getvalue()).samples, expected)
