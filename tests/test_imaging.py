"""Pictures and masks: decode, encode, geometry."""

import io

import numpy as np
import pytest
from conftest import encoded, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from handlers import imaging
from handlers.imaging import Box, Picture, SquareFit

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def decode(data: bytes) -> Picture:
    return imaging.decode_picture(data)[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_orientations_are_turned_upright(orientation: int) -> None:
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:5, :10] = 255
    # What a camera held that way stores: the inverse of what a viewer does with the tag.
    undo = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(np.ascontiguousarray(undo(upright)), "PNG", exif=exif)
    assert np.array_equal(decode(stored).rgb, upright)


def test_alpha_is_kept_apart_and_comes_back_identical() -> None:
    rgba = noise(9, 7, 4)
    picture = decode(encoded(rgba))
    assert np.array_equal(pixels(imaging.encode(picture, "image/png")), rgba)
    assert np.array_equal(pixels(imaging.encode(picture, "image/webp"))[..., 3], rgba[..., 3])


def test_palette_transparency_becomes_alpha() -> None:
    palette = Image.fromarray(noise(8, 8)).quantize(4)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=2)
    picture = decode(buffer.getvalue())
    assert picture.alpha is not None
    assert np.array_equal(picture.alpha == 0, np.asarray(palette) == 2)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(decode(encoded(values)).rgb[..., 0], (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(noise(6, 5)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    assert np.array_equal(decode(buffer.getvalue()).rgb, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, encoded(noise(64, 64), "JPEG")[:300]]
)
def test_what_is_no_picture_is_named_so(data: bytes) -> None:
    with pytest.raises(imaging.NotAPicture):
        imaging.decode_picture(data)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    # 20,000 x 20,000 black pixels: 50 kB of file, 1.2 GB decoded.
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")
    with pytest.raises(imaging.TooManyPixels, match="megapixels"):
        imaging.decode_picture(buffer.getvalue())


def test_frames_are_counted_and_the_first_is_taken() -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    picture, frames = imaging.decode_picture(buffer.getvalue())
    assert frames == 2
    assert picture.rgb[0, 0].tolist() == [255, 0, 0]


def test_decoding_leaves_pillows_limit_alone() -> None:
    before = Image.MAX_IMAGE_PIXELS
    decode(encoded(noise(4, 4)))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    "stored",
    [
        np.array([[0, 127], [128, 255]], np.uint8),
        np.array([[0, 0], [1, 1]], np.uint8),
        np.array([[False, False], [True, True]]),
        np.repeat(np.array([[0, 0], [254, 254]], np.uint8)[..., None], 3, axis=2),
        np.array([[[9, 9, 9, 255]] * 2, [[255, 255, 255, 255]] * 2], np.uint8),
        np.array([[[255, 255, 255, 0]] * 2, [[255, 255, 255, 255]] * 2], np.uint8),
        np.array([[0, 0], [65535, 65535]], np.uint16),
    ],
    ids=["grey", "0/1", "bool", "254", "rgba", "transparent", "16 bit"],
)
def test_every_kind_of_mask_is_read_alike(stored: np.ndarray) -> None:
    assert imaging.decode_mask(encoded(stored)).tolist() == [[False, False], [True, True]]


def test_a_jpeg_mask_keeps_its_exact_shape() -> None:
    mask = np.zeros((200, 200), bool)
    mask[40:160, 60:150] = True
    jpeg = encoded(mask.astype(np.uint8) * 255, "JPEG", quality=75)
    assert np.array_equal(imaging.decode_mask(jpeg), mask)


@pytest.mark.parametrize("kernel", [0, 1, 2, 3, 6, 7])
def test_dilation_is_symmetric(kernel: int) -> None:
    mask = np.zeros((31, 31), bool)
    mask[15, 15] = True
    grown = imaging.dilate(mask, kernel)
    radius = (kernel | 1) // 2 if kernel > 1 else 0
    assert imaging.bounding_box(grown) == Box(15 - radius, 15 - radius, 16 + radius, 16 + radius)


sizes = st.integers(1, 300)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """A rectangle anywhere in a picture of any size, borders and single pixels included."""
    height, width = draw(sizes), draw(sizes)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    mask = np.zeros((height, width), bool)
    mask[top : draw(st.integers(top + 1, height)), left : draw(st.integers(left + 1, width))] = True
    return mask


@settings(deadline=None)
@given(masks(), st.sampled_from([16, 64, 128]))
def test_the_context_box_holds_the_mask_and_lies_inside(mask: np.ndarray, native: int) -> None:
    box, inner = imaging.context_box(mask, native), imaging.bounding_box(mask)
    height, width = mask.shape
    assert 0 <= box.left <= inner.left < inner.right <= box.right <= width
    assert 0 <= box.top <= inner.top < inner.bottom <= box.bottom <= height
    assert box.width >= min(width, native)
    assert box.height >= min(height, native)


@settings(deadline=None)
@given(masks(), st.sampled_from([16, 64, 128]))
def test_painting_anything_leaves_the_outside_identical(mask: np.ndarray, native: int) -> None:
    picture = Picture(RNG.integers(0, 256, (*mask.shape, 3), np.uint8))
    box = imaging.context_box(mask, native)
    fit = SquareFit(box.width, box.height, native)
    canvas, hole = fit.put(box.of(picture.rgb)), fit.put_mask(box.of(mask))
    assert canvas.shape == (native, native, 3)
    assert hole.shape == (native, native)
    assert hole.any()
    painted = picture.rgb.copy()
    box.of(painted)[:] = fit.take(255 - canvas)
    result = imaging.paste_back(picture, painted, mask)
    assert np.array_equal(result.rgb[~mask], picture.rgb[~mask])


@settings(deadline=None)
@given(masks())
def test_where_the_scale_is_one_the_whole_path_is_exact(mask: np.ndarray) -> None:
    native = max(mask.shape)
    picture = RNG.integers(0, 256, (*mask.shape, 3), np.uint8)
    fit = SquareFit(mask.shape[1], mask.shape[0], native)
    assert np.array_equal(fit.take(fit.put(picture)), picture)
    assert np.array_equal(fit.put_mask(mask)[: mask.shape[0], : mask.shape[1]], mask)


@pytest.mark.parametrize("offset", range(8))
def test_a_thin_stroke_survives_the_latent_grid(offset: int) -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, 8 + offset : 12 + offset] = True
    grown = imaging.grow_to_cells(mask, 8)
    assert grown[mask].all()
    # One sample per latent, wherever in its cell the model takes it.
    assert grown[::8, ::8].any()
    assert grown.sum() <= 2 * 8 * 64


@pytest.mark.parametrize("content_type", ["image/png", "image/webp"])
def test_lossless_formats_are_lossless(content_type: str) -> None:
    rgb = noise(33, 21)
    assert np.array_equal(pixels(imaging.encode(Picture(rgb), content_type)), rgb)


def test_jpeg_is_close_and_without_alpha() -> None:
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    back = pixels(imaging.encode(Picture(smooth, np.full((64, 64), 7, np.uint8)), "image/jpeg"))
    assert back.shape == (64, 64, 3)
    assert np.abs(back.astype(int) - smooth).max() <= 12
