"""Every TIFF is read to the very samples that an independent decoder finds, or refused by name."""

import io
from itertools import product
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from handlers.pictures import decoding
from handlers.pictures.limits import LIMITS

HEIGHT, WIDTH = 21, 35
WEAK = ("none", "adobe_deflate", "lzw", "packbits")


def samples(bits: int, channels: int, seed: int = 0) -> np.ndarray:
    """HxWxC of values that use all bits."""
    values = np.random.default_rng(seed).integers(0, 2**bits, (HEIGHT, WIDTH, channels))
    return values.astype(np.uint16 if bits > 8 else np.uint8)


def written(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, metadata=None, **options)
    return buffer.getvalue()


def spread(values: np.ndarray, bits: int) -> np.ndarray:
    return values if bits >= 8 else (values.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)


GREY = list(
    product((1, 2, 4, 8, 16), ("minisblack", "miniswhite"), WEAK, "<>", (False, True), (None, 8), (False, True))
)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey(bits: int) -> None:
    for depth, photometric, compression, order, big, rows, predicted in GREY:
        if depth != bits or (predicted and (bits < 8 or compression in ("none", "packbits"))):
            continue
        values = samples(bits, 1)[..., 0]
        options: dict[str, Any] = {"photometric": photometric, "byteorder": order, "bigtiff": big, "rowsperstrip": rows}
        if compression != "none":
            options["compression"] = compression
        if predicted:
            options["predictor"] = 2
        data = packed(values, bits, **options) if bits < 8 else written(values, **options)
        expected = spread(values, bits)
        if photometric == "miniswhite":
            expected = np.iinfo(expected.dtype).max - expected
        picture = decoding.decode_picture(data)
        np.testing.assert_array_equal(picture.samples, expected, err_msg=str(options))
        assert picture.alpha is None


def packed(values: np.ndarray, bits: int, **options: Any) -> bytes:
    """Below 8 bits tifffile writes one bit only: the rest goes through rows of bytes and a directory of our own."""
    rows = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(len(values), -1)
    bytes_ = np.packbits(rows, axis=1)
    data = bytearray(written(bytes_, **options))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        tags = file.pages[0].tags
        for name, value in (("ImageWidth", values.shape[1]), ("BitsPerSample", bits)):
            tag = tags[name]
            size = {3: 2, 4: 4}[int(tag.dtype)]
            at = tag.valueoffset
            data[at : at + size] = value.to_bytes(size, "little" if options["byteorder"] == "<" else "big")
    return bytes(data)


COLOUR = list(
    product((8, 16), ("contig", "separate"), WEAK, "<>", (False, True), (None, (16, 16)), (False, True), range(5))
)
EXTRA: list[tuple[str, ...]] = [(), ("unspecified",), ("assocalpha",), ("unassalpha",), ("unassalpha", "unspecified")]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colours(bits: int, planar: str) -> None:
    for depth, layout, compression, order, big, tile, predicted, kind in COLOUR:
        if (depth, layout) != (bits, planar) or (predicted and compression in ("none", "packbits")):
            continue
        extra = EXTRA[kind]
        values = samples(bits, 3 + len(extra))
        if extra[:1] == ("assocalpha",):
            values[..., :3] = np.minimum(values[..., :3], values[..., 3:4])
        options: dict[str, Any] = {
            "photometric": "rgb", "planarconfig": planar, "byteorder": order, "bigtiff": big, "tile": tile,
            "extrasamples": extra or None,
        }  # fmt: skip
        if compression != "none":
            options["compression"] = compression
        if predicted:
            options["predictor"] = 2
        stored = values if planar == "contig" else np.ascontiguousarray(values.transpose(2, 0, 1))
        data = written(stored, **options)
        independent = tifffile.imread(io.BytesIO(data))
        independent = independent if planar == "contig" else independent.transpose(1, 2, 0)
        picture = decoding.decode_picture(data)
        expected, alpha = independent[..., :3], None
        if extra[:1] == ("unassalpha",):
            alpha = independent[..., 3]
        elif extra == ("assocalpha",):
            alpha = independent[..., 3]
            most = np.iinfo(alpha.dtype).max
            with np.errstate(all="ignore"):
                plain = np.floor(independent[..., :3].astype(np.float64) * most / alpha[..., None] + 0.5)
            expected = np.where(alpha[..., None] > 0, np.minimum(plain, most), independent[..., :3])
        np.testing.assert_array_equal(picture.samples, expected, err_msg=str(options))
        assert (picture.alpha is None) == (alpha is None), options
        if alpha is not None:
            np.testing.assert_array_equal(picture.alpha, alpha, err_msg=str(options))


@pytest.mark.parametrize(("bits", "big", "order"), list(product((8, 16), (False, True), "<>")))
def test_palette(bits: int, big: bool, order: str) -> None:
    values = samples(bits, 1)[..., 0]
    colours = np.random.default_rng(1).integers(0, 2**16, (3, 2**bits)).astype(np.uint16)
    data = written(values, photometric="palette", colormap=colours, bigtiff=big, byteorder=order)
    expected = (colours >> 8).astype(np.uint8).T[values]
    np.testing.assert_array_equal(decoding.decode_picture(data).samples, expected)


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_cmyk_is_what_its_separations_say(planar: str) -> None:
    values = samples(8, 4)
    stored = values if planar == "contig" else np.ascontiguousarray(values.transpose(2, 0, 1))
    data = written(stored, photometric="separated", planarconfig=planar, compression="lzw")
    inks, black = values[..., :3].astype(int), values[..., 3:].astype(int)
    expected = (255 - inks) * (255 - black) / 255
    picture = decoding.decode_picture(data)
    assert np.abs(picture.samples - expected).max() <= 1
    assert "was converted from CMYK to sRGB" in picture.notes


@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize(("photometric", "channels"), [("minisblack", 1), ("rgb", 3), ("ycbcr", 3)])
def test_jpeg_inside(photometric: str, channels: int, tile: Any) -> None:
    smooth = np.linspace(0, 255, HEIGHT * WIDTH * channels).reshape(HEIGHT, WIDTH, channels).astype(np.uint8)
    data = written(smooth if channels > 1 else smooth[..., 0], photometric=photometric, compression="jpeg", tile=tile)
    independent = tifffile.imread(io.BytesIO(data)).astype(int)
    assert np.abs(decoding.decode_picture(data).samples - independent).max() <= 2


@pytest.mark.parametrize("compression", ["ccitt_t4", "ccitt_t6", "ccittrle"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_fax(compression: str, photometric: int) -> None:
    """Written by libtiff, for tifffile has no encoder: Pillow's own reading is another way through it."""
    values = samples(1, 1)[..., 0] > 0
    buffer = io.BytesIO()
    names = {"ccitt_t4": "group3", "ccitt_t6": "group4", "ccittrle": "tiff_ccitt"}
    Image.fromarray(values).save(buffer, "TIFF", compression=names[compression], tiffinfo={262: photometric})
    picture = decoding.decode_picture(buffer.getvalue())
    np.testing.assert_array_equal(picture.samples, values.astype(np.uint8) * 255)


def test_a_chain_of_pages_that_bites_its_own_tail_ends() -> None:
    pages = np.stack([samples(8, 3, seed) for seed in range(2)])
    data = written(pages, photometric="rgb")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first, last = (page.offset for page in file.pages)
    link = last + 2 + 12 * int.from_bytes(data[last : last + 2], "little")
    assert data[link : link + 4] == bytes(4)
    picture = decoding.decode_picture(data[:link] + first.to_bytes(4, "little") + data[link + 4 :])
    np.testing.assert_array_equal(picture.samples, pages[0])
    assert "holds 2 pages; only the first was used" in picture.notes


def test_the_whole_page_is_shown_and_not_its_thumbnail() -> None:
    buffer = io.BytesIO()
    whole, small, other = samples(8, 3, 1), samples(8, 3, 2)[:4, :4], samples(8, 3, 3)
    with tifffile.TiffWriter(buffer) as file:
        file.write(small, photometric="rgb", subfiletype=1, metadata=None)
        file.write(whole, photometric="rgb", subifds=1, metadata=None)
        file.write(small, photometric="rgb", subfiletype=1, metadata=None)
        file.write(other, photometric="rgb", metadata=None)
    picture = decoding.decode_picture(buffer.getvalue())
    np.testing.assert_array_equal(picture.samples, whole)
    assert any("holds 2 pages; only the first was used" in note for note in picture.notes)


UNSUPPORTED: list[tuple[str, np.ndarray, dict[str, Any]]] = [
    ("32-bit floating-point", np.zeros((4, 4), np.float32), {}),
    ("16-bit floating-point", np.zeros((4, 4, 3), np.float16), {"photometric": "rgb"}),
    ("16-bit signed", np.zeros((4, 4), np.int16), {}),
    ("32 bits a sample", np.zeros((4, 4), np.uint32), {}),
    ("JPEG 2000", np.zeros((16, 16), np.uint8), {"compression": "jpeg2000"}),
    ("Zstandard", np.zeros((16, 16), np.uint8), {"compression": "zstd"}),
    ("LZMA", np.zeros((16, 16), np.uint8), {"compression": "lzma"}),
    ("16 bits in CMYK", np.zeros((4, 4, 4), np.uint16), {"photometric": "separated"}),
]


@pytest.mark.parametrize(("words", "pixels", "options"), UNSUPPORTED, ids=[case[0] for case in UNSUPPORTED])
def test_what_is_not_read_is_refused_by_name(words: str, pixels: np.ndarray, options: dict[str, Any]) -> None:
    with pytest.raises(decoding.NotAPicture, match=f"{words}.*unsupported"):
        decoding.decode_picture(written(pixels, **options))


@pytest.mark.parametrize("compression", ["none", "lzw", "adobe_deflate", "packbits"])
def test_nothing_of_the_process_memory_is_handed_on(compression: str) -> None:
    """Strips that are missing, cut or empty: damaged, and never rows of what lay in memory before."""
    values = np.zeros((3, 64, 64), np.uint16)
    options = {} if compression == "none" else {"compression": compression}
    data = written(values, photometric="rgb", planarconfig="separate", rowsperstrip=16, **options)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        sizes = page.tags["StripByteCounts"]
        size = {3: 2, 4: 4}[int(sizes.dtype)]
        last = sizes.valueoffset + (sizes.count - 1) * size
    for claimed in (0, 1, 5):
        broken = bytearray(data)
        broken[last : last + size] = claimed.to_bytes(size, "little")
        poison = [np.full(64 * 64 * 6, 0x53, np.uint8) for _ in range(8)]
        del poison
        with pytest.raises(decoding.NotAPicture, match="damaged"):
            decoding.decode_picture(bytes(broken))
    assert not decoding.decode_picture(data).samples.any()


def test_samples_beside_the_colours_count_towards_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handlers.pictures.tiff_layout.LIMITS", LIMITS._replace(max_pixels=HEIGHT * WIDTH))
    for channels in (4, 5):
        values = samples(16, channels)
        data = written(values, photometric="rgb", planarconfig="contig", extrasamples=["unspecified"] * (channels - 3))
        if channels == 4:
            np.testing.assert_array_equal(decoding.decode_picture(data).samples, values[..., :3])
        else:
            with pytest.raises(decoding.TooLarge, match="has 5 samples of 16 bits in each of 35x21 pixels"):
                decoding.decode_picture(data)


def test_a_refusal_lists_no_more_than_there_can_be() -> None:
    channels = 100
    data = bytearray(written(samples(8, channels), photometric="minisblack", planarconfig="contig"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        at = file.pages[0].tags["BitsPerSample"].valueoffset
    data[at : at + 2 * channels] = np.arange(1, channels + 1, dtype="<u2").tobytes()
    with pytest.raises(decoding.NotAPicture, match="100 samples a pixel, which is unsupported"):
        decoding.decode_picture(bytes(data))
