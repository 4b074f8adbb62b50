"""Containers are read to their end, believe no length, and never raise."""

import io
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from handlers.pictures import containers
from handlers.pictures.exif import TiffData

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 19, 3), dtype=np.uint8)


def saved(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_chunks_end_at_iend() -> None:
    data = saved("PNG", dpi=(72, 72))
    chunks = list(containers.png_chunks(memoryview(data + b"rubbish" * 9)))
    assert [chunk.kind for chunk in chunks] == [b"IHDR", b"pHYs", b"IDAT", b"IEND"]
    assert [chunk.crc for chunk in chunks] == [zlib.crc32(chunk.kind + chunk.body) for chunk in chunks]


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_segments_end_at_eoi(progressive: bool) -> None:
    data = saved("JPEG", progressive=progressive, comment=b"hello \xff\xd9 \xff\xda")
    found = containers.jpeg_segments(data + b"\xff\xda" * 1000)
    assert found.complete
    assert found.end == len(data)
    markers = [segment.marker for segment in found.segments]
    assert markers[0] == 0xE0
    assert markers.count(0xDA) == (10 if progressive else 1)
    assert bytes(next(s.body for s in found.segments if s.marker == 0xFE)) == b"hello \xff\xd9 \xff\xda"
    assert not containers.jpeg_segments(data[:-2]).complete


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_tiff_directories(byteorder: str, bigtiff: bool) -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, byteorder=byteorder, bigtiff=bigtiff) as writer:
        for page in range(3):
            writer.write(PIXELS, photometric="rgb", metadata=None, description=f"page {page}", subifds=1)
            writer.write(PIXELS[::2, ::2], photometric="rgb", metadata=None, subfiletype=1)
    assert TiffData.is_one(buffer.getvalue())
    tiff = TiffData(buffer.getvalue())
    assert (tiff.order, tiff.big) == (byteorder, bigtiff)
    pages = [tiff.directory(tiff.first)]
    while pages[-1].next:
        pages.append(tiff.directory(pages[-1].next))
    assert [page.value(270) for page in pages] == [b"page 0\0", b"page 1\0", b"page 2\0"]
    assert pages[0].whole(256) == 19
    assert np.frombuffer(pages[0].value(258), f"{byteorder}u2").tolist() == [8, 8, 8]
    assert tiff.directory(pages[2].whole(330)).whole(254) == 1


def test_webp_and_iso_boxes() -> None:
    webp = saved("WEBP", lossless=True, exif=b"Exif\0\0II*\0")
    assert {b"VP8X", b"VP8L", b"EXIF"} <= {kind for kind, _ in containers.riff_chunks(webp)}
    avif = saved("AVIF")
    assert b"avif" in containers.bmff_brands(avif)
    boxes = dict(containers.bmff_boxes(avif))
    assert {b"hdlr", b"iprp"} <= {kind for kind, _ in containers.bmff_boxes(boxes[b"meta"][4:])}


def test_no_walk_raises_or_lasts() -> None:
    random = np.random.default_rng(1)
    files = [saved(kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF")]
    for data in files:
        for _ in range(300):
            broken = np.frombuffer(data, np.uint8).copy()
            at = random.integers(0, min(len(data), 400), 6)
            broken[at] = random.choice([0, 1, 127, 255, 216, 218], 6)
            piece = broken[: random.integers(1, len(data) + 1)].tobytes()
            list(containers.png_chunks(piece))
            containers.jpeg_segments(piece)
            list(containers.riff_chunks(piece))
            list(containers.bmff_boxes(piece))
            containers.bmff_brands(piece)
            tiff = TiffData(piece)
            directory = tiff.directory(tiff.first)
            for tag in directory.entries:
                directory.value(tag)
                directory.whole(tag)
            tiff.directory(directory.next)
