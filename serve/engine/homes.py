"""The folders that TorchServes and Rays live in: made, removed, and those of dead servers swept away.

A home is `palimpsest-XXXXXXXX` in the temporary folder, which others may write to as well. Its file .lock is locked by
the gateway for as long as that lives: the kernel drops the lock with the process, however that ends.
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from serve.engine import processes

PREFIX = "palimpsest-"
_NAME = re.compile(PREFIX + "[a-z0-9_]{8}")  # as tempfile makes it
_LOCK = ".lock"
SOCKET_PATH = 107  # bytes, at most
_SOCKET = "/palimpsest-12345678/.ts.sock.65535"


class Home:
    """A folder of its own, which only this user may enter. Raises OSError where none can be made.

    socket: the longest path in it, the folder's name included, that a socket will have; by default TorchServe's.
    """

    def __init__(self, socket: str = _SOCKET) -> None:
        self.path, self._lock = _locked_folder(Path(temporary_folder(socket)))

    def remove(self) -> None:
        """Ends what still belongs to it, and removes it; a second call does nothing."""
        if self._lock >= 0:
            processes.kill_all(self.path)
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def sweep(socket: str = _SOCKET) -> None:
    """Removes the homes of this user whose gateway has died, and ends what still runs there. socket: as Home's.

    The temporary folder may be everybody's: a link, a folder of another user or one without a lock file is left alone.
    """
    for folder in Path(temporary_folder(socket)).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if not _NAME.fullmatch(folder.name) or not _is_own_folder(folder):
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                processes.kill_all(folder)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def temporary_folder(socket: str = _SOCKET) -> str:
    """The user's, unless the path of a socket there would be longer than Linux takes; by default TorchServe's."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder + socket)) <= SOCKET_PATH else "/tmp"  # noqa: S108 - mkdtemp makes a folder of our own in it


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another server that starts now may have taken it for a dead one's before it was locked.
            if os.path.samestat(os.stat(folder / _LOCK), os.fstat(lock)):
                return folder, lock
        os.close(lock)


def _is_own_folder(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
