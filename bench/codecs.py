"""Which codec for pictures: decode and encode of a photograph, milliseconds of one core's time per megapixel.

    python -m bench.codecs [--megapixels 1 4 12] [--rounds 7]

The codecs take turns on the sample photograph, scaled; what is shown are medians of the process's CPU time, which other
programs disturb less than the clock's. Codecs that aren't installed are left out (`pip install simplejpeg zlib-ng` for
those that the server doesn't need). At the end, the server's own path: bytes -> Picture -> bytes of the same format,
metadata included, masks, and the compositing between them.
"""

import argparse
import importlib.util
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import kornia_rs.image
import numpy as np
from PIL import Image

from handlers.editing.edit import Edit
from handlers.editing.geometry import Box, Fit, Piece
from handlers.pictures import decoding, encoding, png
from handlers.pictures.picture import Picture

PHOTO = Path(__file__).parents[1] / "tests" / "data" / "dog-on-bench.png"
JPEG_QUALITY = 90  # with chroma at half size, as cameras and most programs write

Timed = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 4, 12])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    for megapixels in arguments.megapixels:
        rgb = photograph(megapixels)
        jpeg = pillow_save(rgb, "JPEG", quality=JPEG_QUALITY)
        # As other programs write it: the filter chosen row by row, zlib's default level.
        png_file = pillow_save(rgb, "PNG")
        for title, timed in {
            "decode JPEG": jpeg_decoders(jpeg),
            "encode JPEG": jpeg_encoders(rgb),
            "decode PNG": png_decoders(png_file),
            "encode PNG": png_encoders(rgb),
            "the server": the_server(files(rgb), rgb),
            "the server's masks": masks(rgb),
        }.items():
            report(f"{title}, {rgb.shape[0] * rgb.shape[1] / 1e6:.1f} MP", timed, arguments.rounds, rgb)


def photograph(megapixels: float) -> np.ndarray:
    image = Image.open(PHOTO).convert("RGB")
    factor = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    return np.asarray(
        image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    )


def report(title: str, timed: Timed, rounds: int, rgb: np.ndarray) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    results = {name: function() for name, function in timed.items()}  # warm up
    for _ in range(rounds):
        for name, function in timed.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    print(title)
    pixels = rgb.shape[0] * rgb.shape[1] / 1e6
    for name, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
        result = results[name]
        size = f"{len(result) / 1e6:8.2f} MB" if isinstance(result, bytes) else ""
        print(f"  {name:28} {statistics.median(times) * 1000 / pixels:7.2f} ms/MP {size}")


def pillow_save(rgb: np.ndarray, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format, **options)
    return buffer.getvalue()


def pillow_load(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def opencv_load(data: bytes) -> np.ndarray:
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGR2RGB)


def opencv_save(rgb: np.ndarray, extension: str, *options: int) -> bytes:
    return bytes(cv2.imencode(extension, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)[1])


def jpeg_decoders(data: bytes) -> Timed:
    timed: Timed = {"Pillow": lambda: pillow_load(data), "OpenCV": lambda: opencv_load(data)}
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        timed["simplejpeg"] = lambda: simplejpeg.decode_jpeg(data)
    return timed


def jpeg_encoders(rgb: np.ndarray) -> Timed:
    timed: Timed = {
        "Pillow": lambda: pillow_save(rgb, "JPEG", quality=JPEG_QUALITY),
        "OpenCV": lambda: opencv_save(rgb, ".jpg", cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY),
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        timed["simplejpeg"] = lambda: simplejpeg.encode_jpeg(rgb, JPEG_QUALITY, colorsubsampling="420")
    return timed


def png_decoders(data: bytes) -> Timed:
    return {
        "Pillow": lambda: pillow_load(data),
        "OpenCV": lambda: opencv_load(data),
        "kornia-rs": lambda: kornia_rs.image.Image.decode(data),
    }


def png_encoders(rgb: np.ndarray) -> Timed:
    rows = b"".join(block.tobytes() for block in png._filtered(rgb.reshape(rgb.shape[0], -1)))
    timed: Timed = {
        "Pillow, level 6 (its default)": lambda: pillow_save(rgb, "PNG"),
        "Pillow, level 1": lambda: pillow_save(rgb, "PNG", compress_level=1),
        "OpenCV, level 1": lambda: opencv_save(rgb, ".png", cv2.IMWRITE_PNG_COMPRESSION, 1),
        "kornia-rs, level 1": lambda: kornia_rs.image.Image.fromarray(rgb).encode("png", compress_level=1),
        "ours (Up + ISA-L, level 1)": lambda: png.write_png(rgb),
    }
    if importlib.util.find_spec("isal"):
        from isal import isal_zlib

        timed |= {f"ISA-L alone, level {n}": lambda n=n: isal_zlib.compress(rows, n) for n in (0, 1, 2)}  # type: ignore[misc]
    if importlib.util.find_spec("zlib_ng"):
        from zlib_ng import zlib_ng

        timed |= {f"zlib-ng alone, level {n}": lambda n=n: zlib_ng.compress(rows, n) for n in (1, 2)}  # type: ignore[misc]
    return timed


def files(rgb: np.ndarray) -> dict[str, bytes]:
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    indexed = io.BytesIO()
    Image.fromarray(rgb).convert("P").save(indexed, "PNG")
    return {
        "JPEG": pillow_save(rgb, "JPEG", quality=JPEG_QUALITY),
        "JPEG 4:4:4": pillow_save(rgb, "JPEG", quality=95, subsampling=0),
        "JPEG grey": pillow_save(grey, "JPEG", quality=JPEG_QUALITY),
        # As other programs write it: the filter chosen row by row, zlib's default level; and one filter for all rows.
        "PNG by Pillow": pillow_save(rgb, "PNG"),
        "PNG by OpenCV": opencv_save(rgb, ".png"),
        "PNG, alpha": pillow_save(np.dstack([rgb, grey]), "PNG"),
        "PNG grey": pillow_save(grey, "PNG"),
        "PNG palette": indexed.getvalue(),
        "PNG 16 bits": png.write_png(rgb.astype(np.uint16) * 257),
        "WebP": pillow_save(rgb, "WEBP", lossless=True),
        "TIFF": pillow_save(rgb, "TIFF"),
    }


def the_server(files: dict[str, bytes], rgb: np.ndarray) -> Timed:
    mask = np.zeros(rgb.shape[:2], bool)
    mask[: rgb.shape[0] // 3, : rgb.shape[1] // 3] = True
    box = Box(0, 0, rgb.shape[1], rgb.shape[0])
    painted = 255 - rgb

    def composite() -> Picture:
        edit = Edit(Picture(rgb), mask)
        edit.repaint(Piece(box, mask), Fit.within(box, max(rgb.shape)), lambda *_: painted)
        return edit.picture

    timed: Timed = {"composite": composite}
    for name, data in files.items():
        picture = decoding.decode_picture(data)
        timed[f"{name}: decode"] = lambda data=data: decoding.decode_picture(data)  # type: ignore[misc]
        timed[f"{name}: encode"] = lambda each=picture: encoding.encode_picture(each, each.metadata.content_type)  # type: ignore[misc]
    return timed


def masks(rgb: np.ndarray) -> Timed:
    height, width = rgb.shape[:2]
    grey = cv2.circle(np.zeros((height, width), np.uint8), (width // 2, height // 2), height // 3, 255, -1)
    soft = np.dstack([cv2.GaussianBlur(grey, (9, 9), 3)] * 3)
    bits = io.BytesIO()
    Image.fromarray(grey).convert("1").save(bits, "PNG")
    files = {
        "PNG grey": pillow_save(grey, "PNG"),
        "PNG of 1 bit": bits.getvalue(),
        "PNG in RGB": pillow_save(soft, "PNG"),
        "PNG in RGBA": pillow_save(np.dstack([soft, np.full_like(grey, 255)]), "PNG"),
        "JPEG in colours": pillow_save(soft, "JPEG"),
        "the picture with a hole": pillow_save(np.dstack([rgb, 255 - grey]), "PNG"),
    }
    picture = Picture(rgb)
    return {name: lambda data=data: decoding.decode_mask(data, picture) for name, data in files.items()}  # type: ignore[misc]


if __name__ == "__main__":
    main()
