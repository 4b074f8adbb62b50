"""Pictures and masks: decode, encode, masks, geometry."""

import io
import struct
import sys
import tracemalloc
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import encoded, pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from handlers.editing import geometry, imaging
from handlers.editing.geometry import Box, Fit
from handlers.pictures import decoding, encoding
from handlers.pictures.limits import LIMITS
from handlers.pictures.picture import Metadata, Picture, from_rgb, to_rgb
from handlers.pictures.png import write_png

try:
    import pillow_heif
except ImportError:
    pillow_heif = None

RNG = np.random.default_rng(0)


def srgb_profile() -> bytes:
    """The same in every run: a new one holds the second it was made in."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    made[24:36] = struct.pack(">6H", 2020, 2, 2, 2, 2, 2)
    return bytes(made)


SRGB = srgb_profile()


def noise(height: int, width: int, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def stored(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def deep(array: np.ndarray, extension: str) -> bytes:
    """A file of 16 bits per sample, which Pillow can't write."""
    order = {2: array, 3: array[..., ::-1] if array.ndim == 3 else array}[array.ndim]
    if array.ndim == 3 and array.shape[2] == 4:
        order = array[..., [2, 1, 0, 3]]
    return bytes(cv2.imencode(extension, np.ascontiguousarray(order))[1])


class TestDecoding:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
    def test_all_eight_orientations_are_turned_upright(self, orientation: int, format: str) -> None:
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
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(np.ascontiguousarray(undo(upright)), format, exif=exif, **options)
        assert np.array_equal(decoding.decode_picture(data).samples, upright)

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_png_comes_back_as_it_was(self, channels: int, dtype: Any) -> None:
        array = noise(9, 7, channels, dtype)
        array = array[..., 0] if channels == 1 else array
        picture = decoding.decode_picture(write_png(array))
        colours = array if channels in (1, 3) else array[..., 0] if channels == 2 else array[..., :3]
        assert picture.samples.dtype == dtype
        assert np.array_equal(picture.samples, colours)
        assert (picture.alpha is not None) == (channels in (2, 4))
        if picture.alpha is not None:
            assert np.array_equal(picture.alpha, array[..., -1])

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("extension", [".png", ".tiff"])
    def test_sixteen_bits_stay_sixteen(self, channels: int, extension: str) -> None:
        array = noise(12, 10, channels, np.uint16).squeeze()
        assert np.array_equal(decoding.decode_picture(deep(array, extension)).samples, array)

    def test_a_model_sees_the_upper_eight_bits(self) -> None:
        values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
        assert np.array_equal(decoding.decode_picture(encoded(values)).rgb[..., 0], (values >> 8).astype(np.uint8))

    def test_palette_transparency_becomes_alpha(self) -> None:
        palette = Image.fromarray(noise(8, 8)).quantize(4)
        picture = decoding.decode_picture(stored(palette, "PNG", transparency=2))
        assert picture.alpha is not None
        assert np.array_equal(picture.alpha == 0, np.asarray(palette) == 2)
        assert np.array_equal(picture.samples, np.asarray(palette.convert("RGB")))

    def test_a_transparent_colour_becomes_alpha(self) -> None:
        array = noise(8, 8)
        array[2:4] = (1, 2, 3)
        picture = decoding.decode_picture(stored(Image.fromarray(array), "PNG", transparency=(1, 2, 3)))
        assert picture.alpha is not None
        assert np.array_equal(picture.alpha == 0, (array == (1, 2, 3)).all(axis=2))

    @pytest.mark.parametrize("mode", ["L", "1"])
    @pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
    def test_grey_stays_grey(self, mode: str, format: str) -> None:
        data = stored(Image.fromarray(noise(16, 24)).convert(mode), format)
        assert np.array_equal(
            decoding.decode_picture(data).samples, np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        )

    @pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG", "TIFF", "BMP", "GIF", "AVIF"])
    def test_every_format_is_read_as_pillow_reads_it(self, format: str) -> None:
        smooth = cv2.GaussianBlur(noise(40, 56), (0, 0), 5)
        data = encoded(smooth, format)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(decoding.decode_picture(data).samples.astype(int) - expected).max() <= 1

    def test_heic_is_read_and_its_reply_is_png(self) -> None:
        if pillow_heif is None:
            pytest.skip("no HEIC decoder here")
        smooth = cv2.GaussianBlur(noise(64, 96), (0, 0), 9)
        buffer = io.BytesIO()
        pillow_heif.from_pillow(Image.fromarray(smooth)).save(buffer, quality=95)
        picture = decoding.decode_picture(buffer.getvalue())
        assert np.abs(picture.samples.astype(int) - smooth).mean() < 4
        assert picture.metadata.content_type == "image/png"

    def test_heic_without_a_decoder_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        with pytest.raises(decoding.NotAPicture, match="no decoder"):
            decoding.decode_picture(b"\0\0\0\x1cftypheic" + bytes(40))

    def test_cmyk_is_converted_through_its_profile(self) -> None:
        # An sRGB profile cannot describe CMYK, so it is taken as none; the pixels are Pillow's own conversion.
        image = Image.fromarray(noise(16, 16)).convert("CMYK")
        picture = decoding.decode_picture(stored(image, "TIFF", icc_profile=SRGB))
        assert np.array_equal(picture.samples, np.asarray(image.convert("RGB")))
        assert picture.metadata.icc is None
        assert "CMYK" in picture.notes[0]

    @pytest.mark.parametrize(
        "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, encoded(noise(64, 64), "JPEG")[:300]]
    )
    def test_what_is_no_picture_is_named_so(self, data: bytes) -> None:
        with pytest.raises(decoding.NotAPicture):
            decoding.decode_picture(data)

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF"])
    @pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
    def test_a_cut_file_is_damaged_never_grey_below(self, format: str, part: float) -> None:
        data = encoded(noise(64, 64), format)
        with pytest.raises(decoding.NotAPicture):
            decoding.decode_picture(data[: int(len(data) * part)])

    def test_frames_are_noted_and_the_first_is_taken(self) -> None:
        first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
        for format in ("GIF", "WEBP", "PNG", "TIFF"):
            options = {"lossless": True} if format == "WEBP" else {}
            picture = decoding.decode_picture(stored(first, format, save_all=True, append_images=[second], **options))
            assert "first" in picture.notes[0], format
            assert picture.samples[0, 0].tolist() == [255, 0, 0]

    def test_samples_of_32_bits_are_refused(self) -> None:
        with pytest.raises(decoding.NotAPicture, match="32-bit"):
            decoding.decode_picture(stored(Image.new("F", (4, 4), 0.5), "TIFF"))


class TestLimits:
    @pytest.mark.slow
    def test_too_many_pixels_are_refused_before_decoding(self) -> None:
        # 20,000 x 20,000 black pixels: 50 kB of file, 1.2 GB decoded.
        data = stored(Image.new("1", (20000, 20000)), "PNG")
        tracemalloc.start()
        with pytest.raises(decoding.TooLarge, match="64 megapixels"):
            decoding.decode_picture(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()

    def test_a_side_is_limited(self) -> None:
        with pytest.raises(decoding.TooLarge, match="32767 pixels a side"):
            decoding.decode_picture(stored(Image.new("L", (40_000, 2)), "PNG"))

    @pytest.mark.slow
    def test_a_large_picture_in_a_tiny_file_is_a_bomb(self) -> None:
        data = stored(Image.new("RGB", (5000, 5000)), "WEBP", lossless=True)
        assert len(data) < 2500
        with pytest.raises(decoding.TooLarge, match="10000 pixels per byte"):
            decoding.decode_picture(data)
        # A blank mask of a photograph's size is no bomb.
        assert decoding.decode_picture(stored(Image.new("1", (6000, 6000)), "PNG")).size == (6000, 6000)

    def test_a_jpeg_of_endless_scans_is_refused(self) -> None:
        data = encoded(noise(8, 8), "JPEG", progressive=True)
        begin = data.rindex(b"\xff\xda")
        with pytest.raises(decoding.TooLarge, match="100 scans"):
            decoding.decode_picture(data[:begin] + data[begin:-2] * 101 + data[-2:])

    def test_pillows_globals_are_left_alone(self) -> None:
        from PIL import ImageFile

        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, sorted(Image.OPEN)
        decoding.decode_picture(encoded(noise(4, 4), "AVIF"))
        assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, sorted(Image.OPEN))


class TestMasks:
    def test_a_jpeg_mask_keeps_its_exact_shape(self) -> None:
        mask = np.zeros((200, 200), bool)
        mask[40:160, 60:150] = True
        jpeg = encoded(mask.astype(np.uint8) * 255, "JPEG", quality=75)
        assert np.array_equal(decoding.decode_mask(jpeg, Picture(noise(200, 200))), mask)

    @pytest.mark.parametrize("kernel", [0, 1, 2, 3, 6, 7])
    def test_dilation_is_symmetric(self, kernel: int) -> None:
        mask = np.zeros((31, 31), bool)
        mask[15, 15] = True
        grown = imaging.dilate(mask, kernel)
        radius = (kernel | 1) // 2 if kernel > 1 else 0
        assert geometry.bounding_box(grown) == Box(15 - radius, 15 - radius, 16 + radius, 16 + radius)

    @pytest.mark.parametrize("radius", [1, 2, 5, 9])
    def test_a_dot_grows_to_a_disc_and_shrinks_back(self, radius: int) -> None:
        mask = np.zeros((31, 31), bool)
        mask[15, 15] = True
        grown = imaging.grow(mask, radius)
        y, x = np.mgrid[:31, :31] - 15
        assert np.array_equal(grown, x**2 + y**2 <= radius**2)
        assert imaging.shrink(grown, radius)[15, 15]

    def test_shrinking_spares_the_border_and_nothing_grows_from_nothing(self) -> None:
        assert imaging.shrink(np.ones((5, 5), bool), 3).all()
        assert not imaging.grow(np.zeros((5, 5), bool), 3).any()

    def test_holes_are_filled_and_bays_are_not(self) -> None:
        ring = np.zeros((9, 9), bool)
        ring[1:8, 1:8] = True
        ring[3:6, 3:6] = False
        assert imaging.fill_holes(ring)[1:8, 1:8].all()
        ring[4, 5:] = False  # a channel to the outside
        assert np.array_equal(imaging.fill_holes(ring), ring)

    def test_smoothing_rounds_steps_and_keeps_straight_edges(self) -> None:
        straight = np.zeros((40, 40), bool)
        straight[:, 17:] = True
        assert np.array_equal(imaging.smooth(straight, 5), straight)
        stairs = np.tri(64, dtype=bool).repeat(4, axis=0).repeat(4, axis=1)
        edge = imaging.smooth(stairs, 4).argmin(axis=1)[40:-40]
        assert np.diff(edge).max() < np.diff(stairs.argmin(axis=1)[40:-40]).max()

    @pytest.mark.parametrize("offset", range(8))
    def test_a_thin_stroke_survives_the_latent_grid(self, offset: int) -> None:
        mask = np.zeros((64, 64), bool)
        mask[:, 8 + offset : 12 + offset] = True
        grown = imaging.grow_to_cells(mask, 8)
        assert grown[mask].all()
        # One sample per latent, wherever in its cell the model takes it.
        assert grown[::8, ::8].any()
        assert grown.sum() <= 2 * 8 * 64


sizes = st.integers(1, 300)
natives = st.sampled_from([16, 64, 128])


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Up to four rectangles anywhere in a picture of any size, borders and single pixels included."""
    height, width = draw(sizes), draw(sizes)
    mask = np.zeros((height, width), bool)
    for _ in range(draw(st.integers(1, 4))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[top : draw(st.integers(top + 1, height)), left : draw(st.integers(left + 1, width))] = True
    return mask


class TestGeometry:
    @settings(deadline=None)
    @given(masks(), natives)
    def test_the_context_box_holds_the_mask_and_lies_inside(self, mask: np.ndarray, native: int) -> None:
        box, inner = geometry.context_box(mask, native), geometry.bounding_box(mask)
        height, width = mask.shape
        assert 0 <= box.left <= inner.left < inner.right <= box.right <= width
        assert 0 <= box.top <= inner.top < inner.bottom <= box.bottom <= height
        assert box.width >= min(width, native)
        assert box.height >= min(height, native)
        if max(inner.width, inner.height) * 1.25 <= native <= min(mask.shape):
            assert (box.width, box.height) == (native, native)

    @pytest.mark.slow
    @settings(deadline=None)
    @given(masks(), natives, st.sampled_from([1, 5, 16, 64]))
    def test_pieces_part_the_mask(self, mask: np.ndarray, native: int, context: int) -> None:
        context = min(context, native // 4)
        painted = np.zeros(mask.shape, int)
        height, width = mask.shape
        for piece in geometry.pieces(mask, native, context):
            box = piece.box
            assert 0 <= box.left < box.right <= width
            assert 0 <= box.top < box.bottom <= height
            assert piece.hole.any()
            box.of(painted)[:] += piece.hole
            inner = geometry.bounding_box(piece.hole).moved(box.left, box.top)
            around = inner.expanded(context, (width, height))
            assert box.left <= around.left < around.right <= box.right
            assert box.top <= around.top < around.bottom <= box.bottom
        assert np.array_equal(painted, mask.astype(int))

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(3))
    def test_a_thousand_specks_take_a_handful_of_runs(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        mask = np.zeros((3000, 4000), bool)
        mask[rng.integers(0, 3000, 1000), rng.integers(0, 4000, 1000)] = True
        pieces = geometry.pieces(mask, 2048, 128)
        assert len(pieces) <= 16
        assert sum(piece.box.width * piece.box.height for piece in pieces) < 2 * mask.size
        assert all(max(piece.box.width, piece.box.height) <= 2048 for piece in pieces)

    def test_a_wire_is_painted_along_its_length_and_a_boulder_at_once(self) -> None:
        wire = np.zeros((600, 1600), bool)
        wire[300:304, 10:1590] = True
        pieces = geometry.pieces(wire, 256, 32)
        assert len(pieces) > 4
        assert all(Fit.within(piece.box, 256).inner == (piece.box.width, piece.box.height) for piece in pieces)
        boulder = np.zeros((600, 1600), bool)
        boulder[100:500, 200:900] = True
        (piece,) = geometry.pieces(boulder, 256, 32)
        assert Fit.within(piece.box, 256).inner[0] == 256

    def test_a_blob_has_context_on_all_sides_and_no_more(self) -> None:
        mask = np.zeros((1000, 1500), bool)
        mask[400:500, 700:1000] = True
        (piece,) = geometry.pieces(mask, 2048, 128)
        assert piece.box == Box(700 - 128, 400 - 128, 1000 + 128, 500 + 128)

    @pytest.mark.slow
    @given(masks(), st.sampled_from([64, 128]))
    @settings(deadline=None)
    def test_runs_see_no_more_than_one_of_the_whole_would(self, mask: np.ndarray, native: int) -> None:
        context = native // 16
        seen = sum(piece.box.width * piece.box.height for piece in geometry.pieces(mask, native, context))
        box = geometry.bounding_box(mask)
        if max(box.width, box.height) <= native // 2:
            cell = native // 16
            whole = (box.width + 2 * (context + cell)) * (box.height + 2 * (context + cell))
            assert seen <= whole + (2 * context) ** 2

    def test_blobs_far_apart_are_seen_alone_and_near_ones_together(self) -> None:
        mask = np.zeros((1000, 1500), bool)
        mask[100:200, 100:200] = mask[800:900, 1300:1400] = True
        assert len(geometry.pieces(mask, 2048, 128)) == 2
        mask[:] = False
        mask[100:200, 100:200] = mask[100:200, 260:360] = True
        assert len(geometry.pieces(mask, 2048, 128)) == 1

    @given(sizes, sizes, natives)
    @settings(deadline=None)
    def test_fits_are_exact_where_nothing_is_scaled(self, height: int, width: int, native: int) -> None:
        picture, mask = noise(height, width), noise(height, width, 1)[..., 0] > 250
        box = Box(0, 0, width, height)
        for fit in (Fit.within(box, native), Fit.square(box, native)):
            shown = fit.put(picture)
            assert shown.shape[:2][::-1] == fit.canvas
            assert fit.put_mask(mask).any() == mask.any()
            assert fit.take(shown).shape == picture.shape
            assert fit.take_mask(fit.put_mask(mask))[mask].all()
            if fit.inner == fit.crop:
                assert np.array_equal(fit.take(shown), picture)
                assert np.array_equal(fit.take_mask(fit.put_mask(mask)), mask)

    @pytest.mark.parametrize("side", [100, 173, 256, 401])
    def test_scaling_shifts_nothing(self, side: int) -> None:
        ramp = np.broadcast_to(np.linspace(0, 255, 300)[None, :, None], (200, 300, 3)).round().astype(np.uint8)
        fit = Fit.square(Box(0, 0, 300, 200), side)
        difference = fit.take(fit.put(ramp)).astype(float) - ramp
        # One pixel of shift would be 0.85 grey levels.
        assert abs(difference[:, 10:-10].mean()) < 0.1


class TestSamples:
    def test_grey_and_depth_survive_the_models_view(self) -> None:
        grey = np.arange(256, dtype=np.uint8)[None]
        assert np.array_equal(from_rgb(to_rgb(grey), grey), grey)
        assert from_rgb(np.full((1, 1, 3), 255, np.uint8), np.zeros((1, 1), np.uint16)).item() == 65535


def camera_exif(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Palimpsest", orientation
    exif.get_ifd(0x8769)[0x9003] = "2020:02:02 02:02:02"
    exif.get_ifd(0x8825)[1] = "N"
    return exif


class TestEncoding:
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("kind", ["image/png", "image/webp", "image/tiff"])
    def test_lossless_formats_are_lossless(self, kind: str, channels: int) -> None:
        array = noise(33, 21, channels).squeeze()
        picture = Picture(array[..., :3], array[..., 3]) if channels == 4 else Picture(array)
        back = decoding.decode_picture(encoding.encode_picture(picture, kind))
        assert np.array_equal(back.rgb, picture.rgb)
        if channels == 4:
            assert back.alpha is not None
            assert np.array_equal(back.alpha, array[..., 3])

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_our_png_is_every_readers_png(self, channels: int, dtype: Any) -> None:
        array = noise(50, 31, channels, dtype)
        array = array[..., 0] if channels == 1 else array
        back = cv2.imdecode(np.frombuffer(write_png(array), np.uint8), cv2.IMREAD_UNCHANGED)
        expected = array[..., 0] if channels == 2 else array[..., [2, 1, 0, 3][:channels]] if channels > 2 else array
        assert np.array_equal(back[..., 0] if channels == 2 else back, expected)
        Image.open(io.BytesIO(write_png(array))).verify()

    @pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/webp", "image/tiff"])
    def test_metadata_travel_along(self, kind: str) -> None:
        options: dict[str, Any] = {"icc_profile": SRGB, "exif": camera_exif(6), "dpi": (300, 300)}
        picture = decoding.decode_picture(encoded(noise(16, 24), "JPEG", **options))
        assert picture.size == (16, 24)
        image = Image.open(io.BytesIO(encoding.encode_picture(picture, kind)))
        assert image.info["icc_profile"] == SRGB
        exif = image.getexif()
        assert exif[0x010F] == "Palimpsest"
        assert exif.get(0x0112, 1) == 1
        assert exif.get_ifd(0x8769)[0x9003] == "2020:02:02 02:02:02"
        assert exif.get_ifd(0x8825)[1] == "N"
        if kind != "image/webp":  # which has no such field
            assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)

    def test_a_stale_thumbnail_is_dropped(self) -> None:
        secret = b"what was erased" * 20
        # Little-endian EXIF: an empty first directory, and a second one that points at a thumbnail.
        entries = struct.pack("<HHII", 0x0201, 4, 1, 44) + struct.pack("<HHII", 0x0202, 4, 1, len(secret))
        first = struct.pack("<H", 1) + struct.pack("<HHI4s", 0x010F, 2, 3, b"Me\0\0") + struct.pack("<I", 26)
        block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + first + struct.pack("<H", 2) + entries + bytes(4) + secret
        picture = decoding.decode_picture(encoded(noise(8, 8), "JPEG", exif=block))
        assert [entry.value for entry in picture.metadata.exif.image] == [b"Me\0"]
        assert b"erased" not in encoding.encode_picture(picture, "image/jpeg")

    def test_a_profile_past_the_limit_is_left_out_with_a_note(self) -> None:
        picture = decoding.decode_picture(encoded(noise(8, 8), "JPEG", icc_profile=bytes(LIMITS.max_icc_bytes + 1)))
        assert picture.metadata.icc is None
        (note,) = picture.notes
        assert "4,000,001 bytes of colour profile" in note

    @pytest.mark.parametrize("data", [b"", b"garbage" * 10, b"/etc/passwd"])
    def test_what_is_no_picture_is_said_to_be_none(self, data: bytes) -> None:
        with pytest.raises(decoding.NotAPicture, match="not a picture in a known format"):
            decoding.decode_picture(data)

    def test_a_broken_exif_block_is_left_out(self) -> None:
        picture = decoding.decode_picture(
            encoded(noise(8, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + bytes(9))
        )
        assert not picture.metadata.exif

    @pytest.mark.parametrize("quality", [30, 75, 95])
    @pytest.mark.parametrize("subsampling", [0, 1, 2])
    def test_jpeg_leaves_at_the_inputs_own_quality(self, quality: int, subsampling: int) -> None:
        photo = cv2.GaussianBlur(noise(64, 80), (0, 0), 3)
        data = encoded(photo, "JPEG", quality=quality, subsampling=subsampling)
        picture = decoding.decode_picture(data)
        again = encoding.encode_picture(picture, "image/jpeg")
        old, new = (Image.open(io.BytesIO(each)) for each in (data, again))
        assert new.quantization == old.quantization  # type: ignore[attr-defined]
        assert new.layer == old.layer  # type: ignore[attr-defined]
        assert np.abs(pixels(again).astype(int) - pixels(data)).mean() < 1

    def test_other_pictures_become_jpeg_of_95(self) -> None:
        smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
        back = pixels(encoding.encode_picture(Picture(smooth, np.full((64, 64), 7, np.uint8)), "image/jpeg"))
        assert back.shape == (64, 64, 3)
        assert np.abs(back.astype(int) - smooth).max() <= 12

    def test_text_goes_into_png(self) -> None:
        metadata = Metadata(text={"parameters": '{"prompt": "Fläche"}'})
        data = encoding.encode_picture(Picture(noise(4, 4), metadata=metadata), "image/png")
        assert Image.open(io.BytesIO(data)).text == {"parameters": '{"prompt": "Fläche"}'}  # type: ignore[attr-defined]

    def test_what_a_format_cannot_hold_is_known(self) -> None:
        assert not encoding.can_write(Picture(np.zeros((1, 20_000, 3), np.uint8)), "image/webp")
        assert encoding.can_write(Picture(np.zeros((1, 20_000, 3), np.uint16)), "image/tiff")


FILES = {
    format: encoded(cv2.GaussianBlur(noise(24, 32), (0, 0), 2), format, **options)
    for format, options in {
        "PNG": {"icc_profile": SRGB, "dpi": (72, 72)},
        "JPEG": {"exif": camera_exif(6), "icc_profile": SRGB},
        "WEBP": {"lossless": True, "exif": camera_exif()},
        "TIFF": {"compression": "tiff_lzw"},
        "GIF": {},
        "BMP": {},
        "AVIF": {},
    }.items()
}
if pillow_heif:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(noise(24, 32))).save(buffer)
    FILES["HEIC"] = buffer.getvalue()
changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
@settings(deadline=None, max_examples=150)
@given(changes, st.floats(0.5, 1))
def test_damaged_files_end_in_one_exception_only(format: str, changes: list[tuple[float, int]], part: float) -> None:
    data = bytearray(FILES[format])
    for where, value in changes:
        # Most of what can go wrong is in the header: the square brings changes there.
        data[int(where**2 * (len(data) - 1))] = value
    data = data[: max(1, int(len(data) * part))] if part < 0.7 else data
    try:
        picture = decoding.decode_picture(bytes(data))
    except decoding.NotAPicture:
        return
    assert decoding.decode_picture(encoding.encode_picture(picture, picture.metadata.content_type)).size == picture.size
