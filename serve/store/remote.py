"""What a store on a URL holds, and the bytes of its archives.

http(s)  INDEX beside the archives says what there is; `palimpsest archives index` writes it
s3, gs   the bucket's own listing, by fsspec

All of it runs in an event loop of a thread's own (`run`), so that a silent store can be left at any moment.
"""

import asyncio
import hashlib
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp
from pydantic import BaseModel, Field, ValidationError

from serve.store.locks import Stopped
from serve.store.unpack import SUFFIXES
from serve.store_url import BUCKETS, StoreUrl, shown

INDEX = "palimpsest-store.json"
MOST_ARCHIVES, LONGEST_NAME = 50_000, 300
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 30.0
_MOST_INDEX = 32 << 20  # bytes
_CHUNK = 1 << 20
_BUCKET_CHUNK = 8 << 20  # of a bucket each is a request
_LOOK_EVERY = 0.2  # seconds until a stop is noticed

T = TypeVar("T")


class RemoteError(Exception):
    """The store does not answer, or not as a store does; the message says why, and has nothing secret."""


class Packed(NamedTuple):
    """A packed archive. name: its path in the store, suffix included. tag: another one where its content is another.

    sha256: empty where the store does not say it.
    """

    name: str
    size: int
    tag: str
    sha256: str = ""


class Holding(NamedTuple):
    """All packed archives. tag: another one where anything has changed; empty where the store has none."""

    tag: str
    archives: list[Packed]


class Remote(Protocol):
    """All raise RemoteError."""

    async def holding(self, tag: str) -> Holding | None:
        """None where it is still what had that tag."""

    def read(self, archive: Packed, start: int) -> AsyncGenerator[bytes, None]:
        """Its bytes from there on, to the end or until the line drops. To be closed."""

    async def is_current(self, archive: Packed) -> bool:
        """Whether what was read is what is meant, as far as its sha256 will not tell."""


def remote(url: StoreUrl) -> Remote:
    return _Bucket(url) if url.scheme in BUCKETS else _Http(url)


def run(work: Coroutine[Any, Any, T], stopped: threading.Event, seconds: float) -> T:
    """Does it in this thread. Raises what it raises, RemoteError where it takes longer, and Stopped."""
    return asyncio.run(_until(work, stopped, seconds))


async def _until(work: Coroutine[Any, Any, T], stopped: threading.Event, seconds: float) -> T:
    task = asyncio.create_task(work)
    try:
        async with asyncio.timeout(seconds):
            while not task.done():
                if stopped.is_set():
                    raise Stopped
                await asyncio.wait({task}, timeout=_LOOK_EVERY)
    except TimeoutError:
        raise RemoteError(f"it did not answer completely within {seconds:g} s") from None
    finally:
        task.cancel()
        await asyncio.wait({task})
    return task.result()


class Entry(BaseModel):
    """One archive in INDEX."""

    name: str = Field(max_length=LONGEST_NAME)
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Index(BaseModel):
    archives: list[Entry] = Field(max_length=MOST_ARCHIVES)


class _Http:
    def __init__(self, url: StoreUrl) -> None:
        parts = urlsplit(url.full)
        self._folder = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/"
        self._query = f"?{parts.query}" if parts.query else ""

    async def holding(self, tag: str) -> Holding | None:
        async with self._get(INDEX, {"If-None-Match": tag} if tag else {}) as response:
            if response.status == 304:
                return None
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > _MOST_INDEX:
                    raise RemoteError(f"its {INDEX} has more than {_MOST_INDEX:,} bytes")
            new = response.headers.get("ETag", "")
        try:
            index = Index.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RemoteError(f"its {INDEX} cannot be used ({where}: {first['msg']})") from None
        return Holding(new, [Packed(each.name, each.size, each.sha256, each.sha256) for each in index.archives])

    async def read(self, archive: Packed, start: int) -> AsyncGenerator[bytes, None]:
        async with self._get(archive.name, {"Range": f"bytes={start}-"} if start else {}) as response:
            if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise RemoteError("it sends another range than was asked for")
            passed = start if response.status == 206 else 0  # a server without ranges sends all of it again
            async for piece in response.content.iter_chunked(_CHUNK):
                if passed + len(piece) > start:
                    yield piece[max(0, start - passed) :]
                passed += len(piece)

    async def is_current(self, archive: Packed) -> bool:
        return True

    @asynccontextmanager
    async def _get(self, name: str, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        allowed = {200} | ({206} if "Range" in headers else set()) | ({304} if "If-None-Match" in headers else set())
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        headers["Accept-Encoding"] = "identity"  # else sizes and ranges would be of something else
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=True, auto_decompress=False) as session,
                session.get(f"{self._folder}{name}{self._query}", headers=headers, max_redirects=5) as response,
            ):
                if response.status not in allowed:
                    raise RemoteError(f"it answers HTTP {response.status} for {name}")
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RemoteError(_reason(error)) from None


class _Bucket:
    def __init__(self, url: StoreUrl) -> None:
        parts = urlsplit(url.full)
        self._scheme, self._root = parts.scheme, f"{parts.netloc}{parts.path.rstrip('/')}"
        self._made: Any = None

    async def holding(self, tag: str) -> Holding | None:
        found = await self._ask("_find", self._root, detail=True)
        if not found:  # of a bucket that is not there, too
            await self._ask("_ls", self._root.partition("/")[0])
        archives = [
            Packed(path.removeprefix(f"{self._root}/"), info["size"], _tag(info))
            for path, info in sorted(found.items())
            if path.endswith(SUFFIXES)
        ]
        if len(archives) > MOST_ARCHIVES:
            raise RemoteError(f"it holds more than {MOST_ARCHIVES:,} archives")
        new = hashlib.sha256(repr(archives).encode()).hexdigest()
        return None if new == tag else Holding(new, archives)

    async def read(self, archive: Packed, start: int) -> AsyncGenerator[bytes, None]:
        path = f"{self._root}/{archive.name}"
        while start < archive.size:
            piece = await self._ask("_cat_file", path, start=start, end=min(start + _BUCKET_CHUNK, archive.size))
            if not piece:
                return
            yield piece
            start += len(piece)

    async def is_current(self, archive: Packed) -> bool:
        info = await self._ask("_info", f"{self._root}/{archive.name}")
        return (info["size"], _tag(info)) == (archive.size, archive.tag)

    async def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            system = self._system()
            call = asyncio.run_coroutine_threadsafe(getattr(system, method)(*arguments, **options), system.loop)
            async with asyncio.timeout(SILENT_SECONDS):
                return await asyncio.wrap_future(call)
        except Exception as error:  # of the three libraries below, each with its own
            raise RemoteError(_reason(error)) from None

    def _system(self) -> Any:
        if self._made is None:
            import fsspec  # a tenth of a second, and more with what it imports

            self._made = fsspec.filesystem(self._scheme, use_listings_cache=False, skip_instance_cache=True)
        return self._made


def _tag(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in ("ETag", "etag", "LastModified", "updated") if info.get(key)), "")


def _reason(error: BaseException) -> str:
    """In words that hold no URL: it may have a password or a signature."""
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLError):
        return "its certificate is not trusted"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"it cannot be connected to ({error.os_error.strerror or type(error.os_error).__name__})"
    if isinstance(error, aiohttp.ClientError):
        return f"the line to it dropped ({type(error).__name__})"
    return f"{type(error).__name__}: {shown(str(error))[:300]}"
