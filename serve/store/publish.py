"""Changes to the archive store that a kill or a full disk can't leave half done.

A build works in STORE/.build-<pid>-<name>/, on the store's file system, and exchanges its result with the archive in
the store. Builds of one store take turns, so what lies in such folders when a build starts is a dead one's.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

Report = Callable[[str], None]


@contextmanager
def staging_folder(store: Path, name: str, report: Report) -> Iterator[Path]:
    """A folder to build in, removed afterwards, while no other build touches the store."""
    store.mkdir(parents=True, exist_ok=True)
    # The kernel drops the lock with the process, however that ends.
    with open(store / ".build.lock", "w") as lock:
        _wait_for(lock, report)
        for dead in store.glob(".build-*"):
            _sweep(dead, store)
        staging = store / f".build-{os.getpid()}-{name}"
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def replace_directory(new: Path, target: Path, staging: Path, store: Path) -> None:
    """Puts `new`, which lies in staging, where `target` is in the store; what target was ends in staging.

    One step where the file system can exchange two names, else two, which the next build completes or takes back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        try:
            _exchange(new, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
                raise
        aside = staging / "replaced" / target.relative_to(store)
        aside.parent.mkdir(parents=True)
        os.rename(target, aside)
    os.rename(new, target)


def _wait_for(lock: IO[str], report: Report) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report("waiting for another build in this store to end")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _sweep(dead: Path, store: Path) -> None:
    # Killed between two renames, a build leaves the old archive aside and nothing in its place.
    for manifest in list(dead.glob("replaced/**/MAR-INF")):
        target = store / manifest.parent.relative_to(dead / "replaced")
        if not target.exists():
            os.rename(manifest.parent, target)
    shutil.rmtree(dead, ignore_errors=True)


def _exchange(first: Path, second: Path) -> None:
    """renameat2(2) with RENAME_EXCHANGE; OSError where the C library, the kernel or the file system has none."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "this C library has no renameat2")
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(second))
