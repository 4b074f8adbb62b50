"""Which HTTP client between gateway and TorchServe: a 3 MB body there, a small or a 3 MB answer back.

    python -m bench.http_clients [--rounds 200]

The clients take turns against one echo server in a process of its own; medians and ratios to the fastest are what
counts, the absolute times are this machine's.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import httpx

Call = Callable[[bytes, int], Awaitable[bytes]]
BODY = os.urandom(3_000_000)
SIZES = {"small answer": 1000, "3 MB answer": 3_000_000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    listener = socket.create_server(("127.0.0.1", 0))
    server = multiprocessing.get_context("fork").Process(target=_serve, args=(listener,), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        for name, size in SIZES.items():
            medians = asyncio.run(_compare(url, size, rounds))
            fastest = min(medians.values())
            for client, median in medians.items():
                print(f"{name}: {client:8} {median * 1000:6.2f} ms  {median / fastest:.2f}x")
    finally:
        server.terminate()
        server.join()


async def _compare(url: str, size: int, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"httpx": [], "aiohttp": []}
    async with _httpx(url) as first, _aiohttp(url) as second:
        for _ in range(rounds):
            for name, call in (("httpx", first), ("aiohttp", second)):
                began = time.perf_counter()
                assert len(await call(BODY, size)) == size
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.asynccontextmanager
async def _httpx(url: str) -> AsyncIterator[Call]:
    async with httpx.AsyncClient(trust_env=False) as client:

        async def call(body: bytes, size: int) -> bytes:
            return (await client.post(url, content=body, headers={"x-size": str(size)})).content

        yield call


@contextlib.asynccontextmanager
async def _aiohttp(url: str) -> AsyncIterator[Call]:
    async with aiohttp.ClientSession(auto_decompress=False) as client:

        async def call(body: bytes, size: int) -> bytes:
            async with client.post(url, data=body, headers={"x-size": str(size)}) as response:
                return await response.read()

        yield call


def _serve(listener: socket.socket) -> None:
    """Reads a request to its end and answers with as many bytes as its X-Size asks for."""

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                await reader.readexactly(int(fields["content-length"]))
                size = int(fields["x-size"])
                writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n".encode() + bytes(size))
                await writer.drain()

    async def run() -> None:
        server = await asyncio.start_server(on_connect, sock=listener, limit=2**22)
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
