"""Every GIF's first frame is read to the very samples that were put into it."""

import io
import struct
from itertools import product

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from handlers.pictures import decoding
from handlers.pictures.picture import Picture

HEIGHT, WIDTH = 13, 19
NOT_SHOWN = b"\x21\xf9\4\0\0\0\0\0"


def compressed(values: np.ndarray, bits: int) -> bytes:
    """LZW in which every code is an index: the table is cleared before one more bit is needed."""
    clear, size = 1 << bits, bits + 1
    codes: list[int] = []
    for at, value in enumerate(values.ravel().tolist()):
        codes += [clear, value] if at % (clear - 2) == 0 else [value]
    word = sum(code << size * place for place, code in enumerate([*codes, clear + 1]))
    return word.to_bytes(-(-size * (len(codes) + 1) // 8), "little")


def blocks(data: bytes) -> bytes:
    parts = [data[at : at + 255] for at in range(0, len(data), 255)]
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def frame(
    indices: np.ndarray,
    bits: int,
    palette: np.ndarray | None = None,
    at: tuple[int, int] = (0, 0),
    transparent: int | None = None,
    interlaced: bool = False,
) -> bytes:
    rows = [indices[0::8], indices[4::8], indices[2::4], indices[1::2]] if interlaced else [indices]
    flags = (0x80 | (bits - 1) if palette is not None else 0) | 0x40 * interlaced
    height, width = indices.shape
    control = b"" if transparent is None else b"\x21\xf9\4" + struct.pack("<BHBx", 1, 0, transparent)
    colours = b"" if palette is None else palette.tobytes()
    depth = max(2, bits)
    data = blocks(compressed(np.concatenate(rows), depth))
    return control + b"," + struct.pack("<4HB", *at, width, height, flags) + colours + bytes([depth]) + data


def gif(*frames: bytes, bits: int, palette: np.ndarray | None = None, size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    flags = 0 if palette is None else 0x80 | (bits - 1)
    colours = b"" if palette is None else palette.tobytes()
    return b"GIF89a" + struct.pack("<HHBBB", *size, flags, 1, 0) + colours + b"".join(frames) + b";"


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_frame(bits: int) -> None:
    random = np.random.default_rng(bits)
    shared, own = random.integers(0, 256, (2, 2**bits, 3), np.uint8)
    for has_shared, has_own, transparent, interlaced in product((False, True), (False, True), (None, 1), (False, True)):
        if not has_shared and not has_own:
            continue
        indices = random.integers(0, 2**bits, (HEIGHT, WIDTH))
        coded = frame(indices, bits, own if has_own else None, transparent=transparent, interlaced=interlaced)
        data = gif(coded, bits=bits, palette=shared if has_shared else None)
        picture = decoding.decode_picture(data)
        case = f"{has_shared=} {has_own=} {transparent=} {interlaced=}"
        np.testing.assert_array_equal(picture.samples, (own if has_own else shared)[indices], err_msg=case)
        shown = indices != transparent  # what it holds elsewhere, imagecodecs does not say
        np.testing.assert_array_equal(picture.samples[shown], imagecodecs.gif_decode(data)[shown, :3], err_msg=case)
        assert (picture.alpha is not None) == (transparent is not None), case
        if picture.alpha is not None:
            np.testing.assert_array_equal(picture.alpha, shown * 255, err_msg=case)
        assert picture.notes == (), case


@pytest.mark.parametrize("transparent", [None, 2])
def test_a_frame_smaller_than_the_screen_leaves_it_transparent(transparent: int | None) -> None:
    random = np.random.default_rng(0)
    palette, indices = random.integers(0, 256, (8, 3), np.uint8), random.integers(0, 8, (HEIGHT, WIDTH))
    data = gif(frame(indices, 3, at=(5, 4), transparent=transparent), bits=3, palette=palette, size=(30, 20))
    picture = decoding.decode_picture(data)
    alpha = np.zeros((20, 30), np.uint8)
    alpha[4 : 4 + HEIGHT, 5 : 5 + WIDTH] = (indices != transparent) * 255
    np.testing.assert_array_equal(picture.alpha, alpha)
    np.testing.assert_array_equal(picture.samples[4 : 4 + HEIGHT, 5 : 5 + WIDTH], palette[indices])
    mask = decoding.decode_mask(data, Picture(~picture.samples))
    assert not mask[alpha == 0].any()


def test_a_frame_larger_than_the_screen_is_shown_whole() -> None:
    random = np.random.default_rng(0)
    palette, indices = random.integers(0, 256, (8, 3), np.uint8), random.integers(0, 8, (HEIGHT, WIDTH))
    picture = decoding.decode_picture(gif(frame(indices, 3), bits=3, palette=palette, size=(4, 4)))
    np.testing.assert_array_equal(picture.samples, palette[indices])
    assert picture.alpha is None


def test_of_several_frames_the_first_is_shown_with_its_own_control() -> None:
    random = np.random.default_rng(0)
    palette, indices = random.integers(0, 256, (8, 3), np.uint8), random.integers(0, 8, (2, HEIGHT, WIDTH))
    first, second = frame(indices[0], 3), frame(indices[1], 3, transparent=1)
    comment = b"\x21\xfe" + blocks(b"a comment, in which lies , and ; and !" * 20)
    picture = decoding.decode_picture(gif(comment, first, comment, second, bits=3, palette=palette))
    np.testing.assert_array_equal(picture.samples, palette[indices[0]])
    assert picture.alpha is None
    assert "only the first was used" in picture.notes[0]
    assert "a GIF comment" in picture.notes[1]
    (note,) = decoding.decode_picture(gif(NOT_SHOWN, first, second, bits=3, palette=palette)).notes
    assert "only the first" in note


def test_what_others_write_is_read_as_others_read_it() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    for size, mode in product(((7, 5), (120, 90)), ("1", "L", "P", "RGB")):
        image = Image.fromarray(noise).resize((120, 90), Image.Resampling.BICUBIC, (0, 0, 20, 15)).resize(size)
        for options in ({}, {"interlace": 0}, {"optimize": True}):
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, "GIF", **options)
            expected = imagecodecs.gif_decode(buffer.getvalue())
            expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
            picture = decoding.decode_picture(buffer.getvalue())
            np.testing.assert_array_equal(picture.rgb, expected[..., :3])
            assert (picture.samples.ndim == 2) == (mode in ("1", "L"))


def test_a_frame_that_is_not_whole_is_damaged() -> None:
    palette = np.arange(24, dtype=np.uint8).reshape(8, 3)
    indices = np.random.default_rng(0).integers(0, 8, (HEIGHT, WIDTH))
    whole = gif(frame(indices, 3), bits=3, palette=palette)
    fewer = gif(frame(indices[:-1], 3), bits=3, palette=palette)
    fewer = fewer.replace(struct.pack("<2H", WIDTH, HEIGHT - 1), struct.pack("<2H", WIDTH, HEIGHT))
    for data in (fewer, whole[:-10], whole[:-40], whole[:60], whole[:20], whole[:8], b"GIF80a" + whole[6:]):
        with pytest.raises(decoding.NotAPicture, match="damaged"):
            decoding.decode_picture(data)
    for data in (whole[:-1], whole[:-2], whole + b"trailer"):
        np.testing.assert_array_equal(decoding.decode_picture(data).samples, palette[indices])


def test_colours_that_are_nowhere_are_named() -> None:
    with pytest.raises(decoding.NotAPicture, match="a GIF without colours of its own, which is unsupported"):
        decoding.decode_picture(gif(frame(np.zeros((HEIGHT, WIDTH), int), 3), bits=3))


def test_a_screen_is_limited_as_any_picture() -> None:
    palette, coded = np.arange(24, dtype=np.uint8).reshape(8, 3), frame(np.zeros((HEIGHT, WIDTH), int), 3)
    with pytest.raises(decoding.TooLarge, match="60000x60000"):
        decoding.decode_picture(gif(coded, bits=3, palette=palette, size=(60_000, 60_000)))
    with pytest.raises(decoding.TooLarge, match="10000 pixels per byte"):
        decoding.decode_picture(gif(coded, bits=3, palette=palette, size=(8_000, 8_000)))
