"""Hashes of what archives hold."""

import hashlib
import threading
from typing import BinaryIO

from serve.store.locks import Stopped

_CHUNK = 1 << 20


def sha256(file: BinaryIO, stopped: threading.Event) -> str:
    """Of all that is left to read, in hexadecimal digits. Raises Stopped once the event is set, and OSError."""
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        if stopped.is_set():
            raise Stopped
        digest.update(chunk)
    return digest.hexdigest()
