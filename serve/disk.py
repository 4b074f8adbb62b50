"""Disks that cannot be written to any more: noticed, and said once."""

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

FEW_BYTES = 64 * 1024
FEW_FILES = 8


def trouble(folder: Path) -> str:
    """Why nothing more can be written in the folder: "full", "read-only", or "" where it can. Writes nothing."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return ""
    if disk.f_flag & os.ST_RDONLY:
        return "read-only"
    # Some file systems, which have files without end, say that they have none.
    full = disk.f_bavail * disk.f_frsize < FEW_BYTES or (disk.f_files > 0 and disk.f_favail < FEW_FILES)
    return "full" if full else ""


class Watch:
    """Says in the log when a disk cannot be written to any more, and when it can again."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """folders: on the disks in question; some may be on the same one, and some not there yet."""
        self._folders = tuple(folders)
        self._troubled: set[int] = set()  # disks, by their device

    def look(self) -> None:
        """Takes microseconds."""
        for device, folder in self._disks().items():
            now = trouble(folder)
            if now and device not in self._troubled:
                self._troubled.add(device)
                logger.error("the disk of %s is %s: until it is not, nothing is kept or logged there", folder, now)
            elif not now and device in self._troubled:
                self._troubled.remove(device)
                logger.warning("the disk of %s can be written to again", folder)

    def _disks(self) -> dict[int, Path]:
        disks: dict[int, Path] = {}
        for folder in self._folders:
            with contextlib.suppress(OSError):
                disks.setdefault(folder.stat().st_dev, folder)
        return disks
