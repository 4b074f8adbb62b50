"""Resumable downloads and checksums of files of gigabytes."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import httpx

from handlers.building.files import CHUNK, ProgressBar

CONNECT_TIMEOUT = 10.0  # seconds
STALL_TIMEOUT = 30.0  # seconds without a byte; a slow line may take as long as it needs
RETRIES = 5  # in a row that bring no new byte


class DownloadFailed(Exception):
    """No (complete) answer from the server; `status` is its HTTP status where there was one."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def download(url: str, target: Path, size: int | None, limit: int | None, progress: ProgressBar) -> None:
    """Brings url to target; what an earlier try left in `<target>.part` is kept and continued.

    size: of the whole file in bytes, None where unknown. limit: bytes after which it can't be the right file.
    Raises DownloadFailed, and OSError where the disk is full; in both cases the part stays for the next try.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        _lock(file)
        file.seek(0, os.SEEK_END)
        with progress(f"download {target.name}", size) as advance:
            advance(file.tell())
            _receive_all(url, file, size, limit, advance)
        os.replace(part, target)


def sha256_of(path: Path, progress: ProgressBar) -> str:
    """The file's sha256 as lower-case hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, progress(f"verify {path.name}", path.stat().st_size) as advance:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _lock(file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DownloadFailed("another build is downloading this file now") from None


def _receive_all(url: str, file: BinaryIO, size: int | None, limit: int | None, advance: Callable[[int], None]) -> None:
    """Goes on where the line dropped, as long as the server is there at all."""
    timeout = httpx.Timeout(STALL_TIMEOUT, connect=CONNECT_TIMEOUT)
    received_any, fruitless = False, 0
    with httpx.Client(follow_redirects=True, timeout=timeout) as client:
        while True:
            before = file.tell()
            try:
                whole = _receive(client, url, file, limit, advance)
                if whole and size in (None, file.tell()):
                    return
                reason = f"the server's file ends after {file.tell():,} bytes"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            received_any |= file.tell() != before
            fruitless = 0 if file.tell() > before else fruitless + 1
            # Where nothing ever came there is no network: say so at once.
            if not received_any or fruitless == RETRIES:
                raise DownloadFailed(reason)
            time.sleep(0.5 * fruitless)


def _receive(client: httpx.Client, url: str, file: BinaryIO, limit: int | None, advance: Callable[[int], None]) -> bool:
    """One request for what is missing after the file's end; True where the server sent it to its end."""
    offset = file.tell()
    # Compressed transfer would make offsets meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with client.stream("GET", url, headers=headers) as response:
        content_range = response.headers.get("Content-Range", "")
        if response.status_code == 416 and content_range == f"bytes */{offset}":
            return True
        if response.status_code not in (200, 206, 416):
            raise DownloadFailed(f"HTTP {response.status_code}", response.status_code)
        continues = response.status_code == 206 and content_range.startswith(f"bytes {offset}-")
        if not continues:
            _restart(file, advance)
            if response.status_code != 200:
                return False
        for chunk in response.iter_raw():
            file.write(chunk)
            advance(len(chunk))
            if limit is not None and file.tell() > limit:
                _restart(file, advance)
                raise DownloadFailed(f"the server sends more than the {limit:,} bytes of the right file")
    return True


def _restart(file: BinaryIO, advance: Callable[[int], None]) -> None:
    """Nothing in the part can be continued: not this file's bytes, or a server that can't resume."""
    advance(-file.tell())
    file.seek(0)
    file.truncate()
