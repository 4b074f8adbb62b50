"""Takes this process off its GPU, context and all, and puts it back: the process checkpoint of NVIDIA's driver.

What was on the GPU then lies in main memory that belongs to this process. It is done by the process to itself, which
needs no rights over another and no second process that has started CUDA. Between `suspend` and `resume` it may call
nothing of CUDA: most calls would wait for ever, a synchronisation would crash. Whatever fails leaves a process that may
never use its GPU again: it is to be ended. https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__CHECKPOINT.html
"""

import ctypes
import functools
import gc
import os

LOCK_TIMEOUT = 10_000  # milliseconds that work on the GPU gets to end; the other calls have no limit of their own


class Failed(Exception):
    """Says in words what failed, with the driver's number (CUresult in cuda.h)."""


class _LockArguments(ctypes.Structure):
    """CUcheckpointLockArgs."""

    _fields_ = (("timeoutMs", ctypes.c_uint), ("reserved0", ctypes.c_uint), ("reserved1", ctypes.c_uint64 * 7))


def suspend() -> None:
    """Raises Failed."""
    # What a later collection frees might be CUDA's.
    gc.collect()
    _call("cuCheckpointProcessLock", ctypes.byref(_LockArguments(timeoutMs=LOCK_TIMEOUT)))
    _call("cuCheckpointProcessCheckpoint", None)


def resume() -> None:
    """Raises Failed: the GPU must have room for all that was there."""
    _call("cuCheckpointProcessRestore", None)
    _call("cuCheckpointProcessUnlock", None)


def _call(name: str, arguments: object) -> None:
    try:
        result = getattr(_driver(), name)(os.getpid(), arguments)
    except (OSError, AttributeError):
        raise Failed("the GPU's driver has no process checkpoint") from None
    if result:
        raise Failed(f"{name} failed with {result}")


@functools.cache
def _driver() -> ctypes.CDLL:
    """A call lets Python's other threads run."""
    return ctypes.CDLL("libcuda.so.1")
