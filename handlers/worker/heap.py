"""The C library's heap: what a request needs is asked of the kernel once, and given back when the request is over.

glibc maps every block of more than 32 MB anew, at first every one of more than 128 kB, and unmaps it when it is freed.
A network's activations are such blocks: for each of them the kernel finds, clears and maps its pages again. Kept on the
heap they are used again, and the server lets the heap grow by huge pages (serve/engine/computing.py).
"""

import ctypes
import mmap
from pathlib import Path

KEPT = 16 << 20
"""Bytes that requests may leave on the heap: a small one costs no trimming, a few milliseconds. With more, idle workers
would hold more than by glibc's own ways."""

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


class Heap:
    """The heap of this process. A C library without these calls (musl's, macOS's) keeps its own ways."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self._tuned = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
        if self._tuned:
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
            self._malloc_trim = libc.malloc_trim
            self._after_trimming = _anonymous()

    def trim(self) -> None:
        """Gives all free pages back to the kernel."""
        if self._tuned:
            self._malloc_trim(0)
            self._after_trimming = _anonymous()

    def trim_if_grown(self) -> None:
        """To be called after each request. The heap's own count of free bytes has those that it gave back in it."""
        if self._tuned and _anonymous() > self._after_trimming + KEPT:
            self.trim()


def _anonymous() -> int:
    """Bytes of memory that no file could give back."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * mmap.PAGESIZE
