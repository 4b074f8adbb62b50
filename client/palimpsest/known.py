"""Which files the server has."""

import threading
from collections import OrderedDict

MOST = 500
"""As many as the server keeps."""


class Known:
    """Ids of uploads by their files' digests, the newest last; threads may share it."""

    def __init__(self) -> None:
        self._ids: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: bytes) -> str | None:
        with self._lock:
            return self._ids.get(digest)

    def add(self, digest: bytes, id: str) -> None:
        with self._lock:
            self._ids[digest] = id
            if len(self._ids) > MOST:
                self._ids.popitem(last=False)

    def forget(self, id: str) -> None:
        with self._lock:
            for digest in [digest for digest, each in self._ids.items() if each == id]:
                del self._ids[digest]
