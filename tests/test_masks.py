"""What a picture marks when it is sent as a mask, over every kind of picture that can be one.

What is expected is said here in terms of the values in the files; nothing of it is worked out by the handlers.
"""

import io
from itertools import product
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import encoded
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from test_decoding_matrix import DEPTHS, png
from test_tiff_matrix import packed, written

from handlers.pictures import decoding
from handlers.pictures.picture import Picture

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types
HEIGHT, WIDTH = 48, 64


def photo(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    small = np.random.default_rng(7).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


def marked(data: bytes, picture: np.ndarray) -> np.ndarray:
    return decoding.decode_mask(data, Picture(picture))


def check(data: bytes, expected: np.ndarray, picture: np.ndarray | None = None, case: object = "") -> None:
    mask = marked(data, photo(*expected.shape) if picture is None else picture)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected, err_msg=str(case))


def shape() -> np.ndarray:
    """What most masks here mark: no symmetry, and its sides are at blocks of JPEG's."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[16:32, 16:48] = True
    mask[32:48, 0:16] = True
    return mask


def stored(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_alpha(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.dstack([rgb, alpha.astype(rgb.dtype)])


# White on black


def levels(depth: int) -> np.ndarray:
    """16x16: all values of up to 8 bits; of 16, some from end to end and those around the half."""
    if depth == 16:
        return np.append(np.linspace(0, 65535, 254).astype(np.uint16), [32767, 32768]).reshape(16, 16)
    return (np.arange(256) % 2**depth).reshape(16, 16)


@pytest.mark.parametrize("colour", [GREY, RGB, PALETTE, GREY_ALPHA, RGBA])
def test_the_upper_half_of_any_depth_is_white(colour: int) -> None:
    for depth, interlaced in product(DEPTHS[colour], (False, True)):
        values, most = levels(depth), 2**depth - 1
        expected = values >= 2 ** (depth - 1)
        opaque = np.full_like(values, most)
        files: list[tuple[np.ndarray, list[tuple[bytes, bytes]]]] = {
            GREY: [(values[..., None], [])],
            # The brightest channel counts; a transparent colour that no pixel has changes nothing.
            RGB: [
                (np.dstack(channels), extra)
                for channels in ((values,) * 3, (values, values * 0, values // 2), (values * 0, values * 0, values))
                for extra in ([], [(b"tRNS", b"\0\1\0\2\0\3")])
            ],
            PALETTE: [
                (values[..., None], [(b"PLTE", np.repeat(np.linspace(0, 255, most + 1).astype(np.uint8), 3).tobytes())])
            ],
            GREY_ALPHA: [(np.dstack([values, opaque]), [])],
            RGBA: [(np.dstack([values // 3, values, values * 0, opaque]), [])],
        }[colour]
        for pixels, extra in files:
            check(png(pixels, depth, colour, interlaced, extra), expected, case=(depth, interlaced, extra))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_the_upper_half_of_any_tiff_is_white(depth: int, photometric: str) -> None:
    values = levels(depth).astype(np.uint16 if depth == 16 else np.uint8)
    expected = values >= 2 ** (depth - 1) if photometric == "minisblack" else values < 2 ** (depth - 1)
    for order in "<>":
        write = written if depth >= 8 else lambda values, **options: packed(values, depth, **options)
        check(write(values, photometric=photometric, byteorder=order), expected)


MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA"], "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA"],
    "WEBP": ["1", "L", "LA", "P", "RGB", "RGBA"], "GIF": ["1", "L", "P", "RGB", "RGBA"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"], "JPEG": ["1", "L", "RGB"], "AVIF": ["L", "LA", "RGB", "RGBA"],
}  # fmt: skip


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
def test_white_on_black_in_every_format(format: str, mode: str) -> None:
    image = Image.fromarray(shape().astype(np.uint8) * 255).convert(mode)
    for options in ({}, {"lossless": True}) if format == "WEBP" else ({},):
        check(stored(image, format, **options), shape())


@pytest.mark.parametrize(("format", "mode"), [(format, mode) for format in MODES for mode in ("LA", "RGBA")])
@pytest.mark.parametrize("below", [0, 255], ids=["black below", "white below"])
def test_strokes_on_nothing(format: str, mode: str, below: int) -> None:
    """below: the colour that the transparent pixels hide."""
    if mode not in MODES[format] or format == "BMP":
        pytest.skip(f"no {mode} in {format}")
    for colour in [(255, 255, 255)] if mode == "LA" else [(255, 255, 255), (255, 40, 0), (0, 90, 200)]:
        rgb = np.where(shape()[..., None], colour, below).astype(np.uint8)
        image = Image.fromarray(with_alpha(rgb, shape() * 255)).convert(mode)
        check(stored(image, format), shape(), case=colour)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("tint", [(1, 1, 1), (1, 0.2, 0)], ids=["white", "red"])
def test_a_soft_brush_marks_where_it_is_more_than_half(depth: int, tint: tuple[float, float, float]) -> None:
    most, opacity = 2**depth - 1, levels(depth)
    stroke = (np.ones((16, 16, 3)) * tint * most).astype(np.uint16)
    check(png(np.dstack([stroke, opacity]), depth, RGBA, False, []), opacity >= 2 ** (depth - 1))
    check(png(np.dstack([stroke[..., 0], opacity]), depth, GREY_ALPHA, False, []), opacity >= 2 ** (depth - 1))
    if depth == 8:
        straight = np.dstack([stroke, opacity]).astype(np.uint8)
        check(written(straight, photometric="rgb", extrasamples=["unassalpha"]), opacity >= 128)
        check(encoded(straight, "WEBP", lossless=True, exact=True), opacity >= 128)


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("part", [0.51, 0.6, 0.8, 1])
def test_constant_opacity_dims(depth: int, part: float) -> None:
    """The picture as it looks on black: 60 % of white is just white enough."""
    most, values = 2**depth - 1, levels(depth).astype(int)
    alpha = int(part * most)
    data = png(np.dstack([values, np.full_like(values, alpha)]), depth, GREY_ALPHA, False, [])
    check(data, values * alpha // most >= 2 ** (depth - 1))


def test_what_shows_nothing_marks_nothing() -> None:
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    for rgb, alpha in product((photo(), np.full_like(photo(), 255)), (0, 100, 127)):
        check(encoded(with_alpha(rgb, nothing + alpha)), nothing, case=alpha)
        check(encoded(with_alpha(rgb, nothing + alpha)), nothing, picture=rgb, case=alpha)
    clear = Image.fromarray(photo()).quantize(8)
    check(stored(clear, "PNG", transparency=bytes(8)), nothing)
    check(encoded(with_alpha(photo() * 0, shape() * 255)), nothing)  # black strokes


# Of 0 and 1 only


def test_one_marks_where_there_is_nothing_but_zero_and_one() -> None:
    values = shape().astype(np.uint16)
    for colour, depth in [(c, depth) for c in (GREY, RGB, GREY_ALPHA, RGBA) for depth in DEPTHS[c]]:
        alphas = [] if colour in (GREY, RGB) else [np.full_like(values, 2**depth - 1)]
        pixels = np.dstack([values] * (1 if colour in (GREY, GREY_ALPHA) else 3) + alphas)
        check(png(pixels, depth, colour, False, []), shape(), case=(colour, depth))
    for depth in (1, 2, 4, 8, 16):
        written_ = written(values) if depth == 16 else packed(
            values.astype(np.uint8), depth, photometric="minisblack", byteorder="<"
        )  # fmt: skip
        check(written_, shape(), case=depth)
    for depth in DEPTHS[PALETTE]:
        data = png(values[..., None], depth, PALETTE, False, [(b"PLTE", b"\0\0\0\1\1\1")])
        check(data, shape(), case=depth)
    half = np.zeros_like(values)
    half[:, WIDTH // 2 :] = 255
    check(png(np.dstack([values, half]), 8, GREY_ALPHA, False, []), shape() & (half > 0))


def test_two_is_not_one() -> None:
    values = shape().astype(np.uint16)
    values[0, 0] = 2
    for depth in (4, 8, 16):
        assert not marked(png(values[..., None], depth, GREY, False, []), photo()).any()


# Labels


def voc(label: int) -> tuple[int, int, int]:
    """The colour of a class, as PASCAL VOC's development kit works it out."""
    red = green = blue = 0
    for j in range(8):
        red |= (label & 1) << (7 - j)
        green |= (label >> 1 & 1) << (7 - j)
        blue |= (label >> 2 & 1) << (7 - j)
        label >>= 3
    return red, green, blue


VOC = np.array([voc(label) for label in range(256)], np.uint8)
assert VOC[[1, 8, 15]].tolist() == [[128, 0, 0], [64, 0, 0], [192, 128, 128]]


def label_map(classes: int) -> np.ndarray:
    """HxW uint8: 0 in every other column, and the classes between, down to the last."""
    column = np.arange(WIDTH)
    return np.broadcast_to(np.where(column % 2, 0, column // 2 % classes), (HEIGHT, WIDTH)).astype(np.uint8)


def indexed(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels)
    image.putpalette(colours.tobytes())
    return image


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_every_class_but_the_background_is_marked(depth: int) -> None:
    labels = label_map(min(21, 2**depth))
    used = VOC[: min(256, 2**depth)]
    for interlaced, transparent in product((False, True), (b"", b"\0", b"\xff" * 2**depth)):
        extra = [(b"PLTE", used.tobytes())] + ([(b"tRNS", transparent)] if transparent else [])
        check(png(labels[..., None], depth, PALETTE, interlaced, extra), labels > 0, case=(interlaced, transparent))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "GIF", "BMP", "WEBP"])
def test_a_label_map_is_read_in_every_format(format: str) -> None:
    labels = label_map(21)
    check(stored(indexed(labels, VOC), format, **({"lossless": True} if format == "WEBP" else {})), labels > 0)
    colours = np.ascontiguousarray(VOC[labels])
    if format != "GIF":
        check(encoded(colours, format, **({"lossless": True} if format == "WEBP" else {})), labels > 0)
    check(written(labels.astype(np.uint16), photometric="palette", colormap=deep_palette()), labels > 0)


def deep_palette() -> np.ndarray:
    """Of 16 bits: 3x65536 uint16."""
    table = np.zeros((3, 65536), np.uint16)
    table[:, :256] = VOC.T.astype(np.uint16) * 257
    return table


def test_labels_as_colours() -> None:
    labels = label_map(21)
    opaque = with_alpha(VOC[labels], np.full_like(labels, 255))
    check(encoded(opaque), labels > 0)
    check(png(VOC[labels].astype(np.uint16) * 257, 16, RGB, False, []), labels > 0)
    check(png(VOC[labels], 8, RGB, False, [(b"tRNS", b"\0\1\0\2\0\3")]), labels > 0)


@pytest.mark.slow
@pytest.mark.parametrize("label", range(1, 256))
def test_a_class_may_be_alone(label: int) -> None:
    labels = shape().astype(np.uint8) * label
    check(stored(indexed(labels, VOC), "PNG"), shape())
    red, green, blue = voc(label)
    # As grey, a dark class is no class but a dark grey.
    expected = shape() if max(voc(label)) >= 128 or not red == green == blue else shape() & False
    check(encoded(VOC[labels]), expected)


def test_what_the_background_is() -> None:
    labels = label_map(21)
    # Black, wherever in the palette.
    moved = np.roll(VOC, 3, axis=0)
    moved[24:] = 99
    moved[:3] = [(10, 20, 30), (40, 50, 60), (255, 255, 255)]
    check(stored(indexed(labels + 3, moved), "PNG"), labels > 0)
    # Or transparent.
    colours = VOC.copy()
    colours[0] = 255
    for format in ("PNG", "GIF"):
        check(stored(indexed(labels, colours), format, transparency=0), labels > 0)
    # In greys, too, as long as none of those that show is white.
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    check(stored(indexed(labels, greys), "PNG"), labels > 0)
    greys[0] = 255
    check(stored(indexed(labels, greys), "PNG", transparency=0), labels > 0)
    greys[:2] = [[90] * 3, [0] * 3]
    check(stored(indexed(shape().astype(np.uint8), greys), "PNG"), ~shape())


def test_a_transparent_class_is_not_marked() -> None:
    labels = label_map(21)
    check(stored(indexed(labels, VOC), "PNG", transparency=bytes([255] * 5 + [0])), (labels > 0) & (labels != 5))


def test_shades_of_a_colour_are_no_labels() -> None:
    """Noise around a lossy file's colours, or a brush's edge."""
    for colour in ((255, 0, 0), (40, 200, 90)):
        rgb = (shape()[..., None] * colour).astype(np.uint8)
        for format in ("JPEG", "WEBP"):
            check(encoded(rgb, format, quality=75), shape(), case=(colour, format))
        noisy = rgb + (np.random.default_rng(0).integers(0, 9, rgb.shape) * ~shape()[..., None]).astype(np.uint8)
        check(encoded(noisy), shape())
    for darkest in (0, 50):
        red = np.where(levels(8) < darkest, 0, levels(8))
        check(encoded(np.dstack([red, red * 0, red * 0]).astype(np.uint8)), levels(8) >= 128)


def test_strokes_have_edges_of_many_shades() -> None:
    """A white stroke with a black outline, smoothed, on nothing."""
    white = np.zeros((192, 256), bool)
    white[48:144, 48:208] = True
    shades = cv2.GaussianBlur(white.astype(np.uint8) * 255, (5, 5), 1)
    alpha = np.zeros_like(shades)
    alpha[40:152, 40:216] = 255
    assert len(np.unique(shades >> 3)) > 4
    check(encoded(with_alpha(np.dstack([shades] * 3), alpha)), shades >= 128)


# The picture with a hole


def scene(name: str) -> np.ndarray:
    picture = photo()
    if name == "grey photograph":
        return np.repeat(picture[..., :1], 3, axis=2)
    if name == "noise":
        return np.random.default_rng(1).integers(0, 256, picture.shape, np.uint8)
    if name == "at night":
        return picture // 12
    if name == "product on white":
        picture = np.full_like(picture, 255)
        picture[20:26, 30:60] = photo()[20:26, 30:60]
        return picture
    if name == "drawing":
        picture = np.full_like(picture, 255)
        picture[::6] = 0
        return picture
    if name == "flat":
        return np.full_like(picture, (200, 120, 40))
    if name == "two halves":
        picture[:, : WIDTH // 2], picture[:, WIDTH // 2 :] = (20, 20, 200), (240, 240, 240)
    return picture


SCENES = [
    "photograph", "grey photograph", "noise", "at night", "product on white", "drawing", "flat", "two halves",
]  # fmt: skip


def holed(rgb: np.ndarray, kind: str, below: int | None) -> bytes:
    """rgb with a hole of `shape` in a file of a kind; below: the colour in the hole, the picture's own where None."""
    hole = shape()
    pixels = with_alpha(rgb if below is None else np.where(hole[..., None], below, rgb).astype(np.uint8), 255 * ~hole)
    image = Image.fromarray(pixels)
    if kind == "PNG 16":
        return png(pixels.astype(np.uint16) * 257, 16, RGBA, False, [])
    if kind in ("PNG palette", "GIF"):
        palette = Image.fromarray(pixels[..., :3]).quantize(255)
        indices = np.where(hole, 255, np.asarray(palette)).astype(np.uint8)
        colours = np.frombuffer(bytes(palette.palette.palette).ljust(768, b"\xff"), np.uint8).reshape(256, 3)
        return stored(indexed(indices, colours), kind.split()[0], transparency=255)
    if kind == "TIFF premultiplied":
        return written(np.where(hole[..., None], 0, pixels), photometric="rgb", extrasamples=["assocalpha"])
    if kind == "WEBP lossy":
        return stored(image, "WEBP", quality=80)
    if kind == "grey":
        return stored(image.convert("LA"), "PNG")
    return stored(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("kind", ["PNG", "PNG 16", "TIFF", "TIFF premultiplied", "WEBP", "AVIF"])
def test_the_picture_with_a_hole_marks_the_hole(name: str, kind: str) -> None:
    if (name, kind) == ("noise", "AVIF"):
        pytest.skip("which keeps little of it")
    for below in (None, 0, 255):
        check(holed(scene(name), kind, below), shape(), scene(name), (name, kind, below))


@pytest.mark.parametrize("name", [name for name in SCENES if name != "noise"])
@pytest.mark.parametrize("kind", ["PNG palette", "GIF", "WEBP lossy"])
def test_a_hole_in_a_copy_of_fewer_colours(name: str, kind: str) -> None:
    check(holed(scene(name), kind, None), shape(), scene(name))


def test_a_hole_in_the_original_of_a_jpeg() -> None:
    for name in SCENES:
        sent = decoding.decode_picture(encoded(scene(name), "JPEG", quality=85)).samples
        if name != "noise":
            check(holed(scene(name), "PNG", 0), shape(), sent, name)


def test_a_hole_in_a_grey_or_deep_picture() -> None:
    grey = photo()[..., 0]
    check(holed(np.dstack([grey] * 3), "grey", 0), shape(), grey)
    check(holed(np.dstack([grey] * 3), "PNG", 0), shape(), grey)
    check(holed(photo(), "PNG 16", 0), shape(), photo().astype(np.uint16) * 257)
    check(holed(photo(), "PNG", 0), shape(), photo().astype(np.uint16) * 257)


def test_a_hole_with_a_soft_edge_is_what_is_more_than_half_clear() -> None:
    alpha = np.broadcast_to(np.arange(WIDTH) * 4, (HEIGHT, WIDTH)).astype(np.uint8)
    check(encoded(with_alpha(photo(), alpha)), alpha < 128, photo())


def test_a_hole_that_takes_up_nearly_all() -> None:
    hole = np.ones((HEIGHT, WIDTH), bool)
    hole[10:12, 10:14] = False
    check(encoded(with_alpha(photo(), 255 * ~hole)), hole, photo())


def test_what_may_be_strokes_or_a_hole_is_refused() -> None:
    white = np.full_like(photo(), 255)
    with pytest.raises(decoding.NotAPicture, match="white on black"):
        marked(holed(white, "PNG", None), white)
    # White strokes on the white part of a picture: all that shows is as the picture.
    strokes = shape() & (np.arange(HEIGHT) > 30)[:, None]
    with pytest.raises(decoding.NotAPicture, match="white on black"):
        marked(encoded(with_alpha(white, strokes * 255)), scene("product on white"))
    check(encoded((shape() * 255).astype(np.uint8)), shape(), white)


def test_another_photograph_with_a_hole_is_refused() -> None:
    for name, kind in product(("photograph", "noise", "grey photograph"), ("PNG", "TIFF", "PNG palette", "GIF")):
        with pytest.raises(decoding.NotAPicture, match=r"not the picture.*transparent hole"):
            marked(holed(scene(name), kind, None), 255 - scene(name))
    labels = label_map(21)
    with pytest.raises(decoding.NotAPicture, match="colours"):
        marked(encoded(with_alpha(VOC[labels], 255 * (labels > 0))), photo())


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 0.98))
def test_a_hole_is_never_taken_for_its_surroundings(seed: int, height: int, width: int, part: float) -> None:
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (random.integers(1, 6), 3), np.uint8)
    picture = colours[random.integers(0, len(colours), (height, width))]
    hole = random.random((height, width)) < part
    try:
        mask = marked(encoded(with_alpha(picture, 255 * ~hole)), picture)
    except decoding.NotAPicture as error:
        if "white strokes" not in str(error):
            raise
        return
    # With nothing left to see it marks nothing; with no hole it is a picture like any.
    assert not hole.any() or np.array_equal(mask, hole) or (hole.all() and not mask.any())


# Size and orientation


@pytest.mark.parametrize("size", [(HEIGHT, WIDTH + 1), (WIDTH, HEIGHT), (1, 1), (2 * HEIGHT, 2 * WIDTH)])
def test_a_mask_is_as_large_as_its_picture(size: tuple[int, int]) -> None:
    height, width = size
    for channels, format in product((1, 3, 4), ("PNG", "TIFF", "WEBP")):
        pixels = np.full((*size, channels), 255, np.uint8).squeeze(axis=2 if channels == 1 else ())
        with pytest.raises(decoding.NotAPicture, match=f"{width}x{height} but the picture is {WIDTH}x{HEIGHT}"):
            marked(encoded(pixels, format), photo())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_turned_upright_as_pictures_are(orientation: int) -> None:
    def upright(array: np.ndarray) -> np.ndarray:
        image = Image.fromarray(array)
        image.getexif()[0x0112] = orientation
        return np.asarray(ImageOps.exif_transpose(image))

    exif = Image.Exif()
    exif[0x0112] = orientation
    labels = shape().astype(np.uint8) * 8
    expected, picture = upright(shape().astype(np.uint8)) > 0, upright(photo())
    for format in ("PNG", "TIFF", "WEBP", "JPEG"):
        options = {"exif": exif} | ({"lossless": True, "exact": True} if format == "WEBP" else {})
        check(encoded(shape().astype(np.uint8) * 255, format, **options), expected, picture, format)
        if format != "JPEG":
            check(stored(indexed(labels, VOC), format, **options), expected, picture, format)
            check(encoded(with_alpha(photo(), 255 * ~shape()), format, **options), expected, picture, format)
        if orientation > 4:
            with pytest.raises(decoding.NotAPicture, match="same size"):
                marked(encoded(shape().astype(np.uint8) * 255, format, **options), photo())
