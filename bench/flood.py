"""Many large pictures at once: what the gateway's event loop and memory suffer, beside the same server idle.

    python -m bench.flood [--pictures 100] [--megapixels 20]

Every client sends one JPEG to /v1/erase at the same moment, while another process-wide thread asks for /ping all the
time. Reports the answers, the longest /ping of both phases, and the gateway's peak memory: its own, and what it holds
in memory files (the machine's shared memory, less what was there before).
"""

import argparse
import asyncio
import io
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from bench.residency import quantiles
from serve.archives import build
from tests.serving import Server, serving

IDLE = 10.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--megapixels", type=float, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(Path(folder), arguments.pictures, arguments.megapixels), indent=2))


def run(folder: Path, pictures: int, megapixels: float) -> dict[str, Any]:
    """Starts a server of its own in the folder."""
    store = folder / "store"
    build.ensure_demo(store, lambda message: None)
    picture, mask = photograph(megapixels)
    with serving(folder, store, "demo") as server:
        erase(server, picture, mask).raise_for_status()
        with watching(server) as idle:
            time.sleep(IDLE)
        with watching(server) as flooded:
            answers, seconds = asyncio.run(flood(server, picture, mask, pictures))
        return {
            "pictures": pictures,
            "bytes each": len(picture),
            "seconds": round(seconds, 1),
            "answers": {str(status): count for status, count in answers.items()},
            "idle": idle,
            "flooded": flooded,
        }


def photograph(megapixels: float) -> tuple[bytes, bytes]:
    """A JPEG of so many pixels, about as hard to compress as one, and a mask of a small hole in it."""
    side = round((megapixels * 1e6) ** 0.5)
    coarse = np.random.default_rng(0).integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    hole = Image.new("L", (side, side))
    hole.paste(255, (side // 2, side // 2, side // 2 + 200, side // 2 + 200))
    return encoded(image, "JPEG"), encoded(hole, "PNG")


def encoded(image: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def erase(server: Server, picture: bytes, mask: bytes) -> httpx.Response:
    return server.http.post("/v1/erase", files={"image": picture, "mask": mask})


async def flood(server: Server, picture: bytes, mask: bytes, count: int) -> tuple[Counter[int | str], float]:
    """All at once; one that is told to come back does so after as long as it is told."""
    statuses: Counter[int | str] = Counter()

    async def client() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=600) as http:
            while True:
                try:
                    answer = await http.post("/v1/erase", files={"image": picture, "mask": mask})
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1
                    return
                statuses[answer.status_code] += 1
                if answer.status_code not in (429, 503):
                    return
                await asyncio.sleep(float(answer.headers["retry-after"]))

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(count)))
    return statuses, time.monotonic() - began


@contextmanager
def watching(server: Server) -> Iterator[dict[str, Any]]:
    """Yields what is filled in at the end: /ping's times, and the gateway's peak memory."""
    seen: dict[str, Any] = {}
    ended = threading.Event()
    gateway = psutil.Process(server.process.pid)
    shared_before = psutil.virtual_memory().shared
    times: list[float] = []
    sizes: list[tuple[int, int]] = []

    def watch() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
            while not ended.wait(0.01):
                began = time.perf_counter()
                http.get("/ping").raise_for_status()
                times.append(time.perf_counter() - began)
                sizes.append((gateway.memory_info().rss, psutil.virtual_memory().shared - shared_before))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen["ping ms"] = quantiles(times, 1000) | {"longest": round(max(times) * 1000, 1)}
        seen["gateway MiB at most"] = max(rss for rss, _ in sizes) >> 20
        seen["memory files MiB at most"] = max(shared for _, shared in sizes) >> 20


if __name__ == "__main__":
    main()
