"""Which archives the store holds, and where each can be registered from.

STORE/<name>/        a folder in TorchServe's no-archive layout, served as it lies
STORE/<name>.tar.gz  unpacked once into CACHE/<start of the file's sha256>/ and served from there
STORE/<name>.mar     (a folder wins over a file, .tar.gz over .mar)

Archives come, go and are replaced while the server runs: every look-up asks the disk.
"""

import asyncio
import errno
import hashlib
import json
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from serve.errors import BadRequest, DiskFull, EngineUnavailable, ModelLoadFailed, ModelNotFound
from serve.store.cache import Cache, CacheFull
from serve.store.listing import Listing
from serve.store.locks import Stalled, Stopped
from serve.store.unpack import MANIFEST, SUFFIXES, InvalidArchive, UnpackLimits

logger = logging.getLogger(__name__)

DEMO = "demo"
RELEASE_EVERY = 30.0  # seconds
MAX_DEPTH = 4  # folders, the archive's own included
_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(f"{_PART}(/{_PART}){{0,{MAX_DEPTH - 1}}}", re.ASCII)
_SUFFIX = re.compile("(" + "|".join(map(re.escape, SUFFIXES)) + ")$")
_LISTED = 20  # names in an error message
_MAX_NAME = 200
# Not the folder's own time: Python writes __pycache__ into it when a worker starts.
_VERSIONED = (MANIFEST, "MAR-INF/palimpsest.json", "model-config.yaml", "handler.py")
_ENGINE_NAME = 80
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

Identity = tuple[int, int, int]  # inode, bytes, nanoseconds of the last change
_VERSION = 12  # hexadecimal digits


@dataclass(frozen=True)
class Archive:
    """One version of one archive.

    name: its path in the store. path: the folder to register; of a packed archive, before Catalog.prepare, the file.
    version: changes when the archive's content is replaced, and only then; empty before Catalog.prepare. file: where
    path is unpacked from, if it is.
    """

    name: str
    path: Path
    version: str = ""
    file: Path | None = None

    def is_there(self) -> bool:
        return self.path.is_file() or (self.path / MANIFEST).is_file()

    def is_replaced(self) -> bool:
        """Whether another version lies in its folder; what a file was unpacked into never changes."""
        return self.file is None and _folder_version(self.path) != self.version

    def files(self) -> list[Path]:
        """All files of its folder; of a packed one the file."""
        return [self.path] if self.path.is_file() else sorted(file for file in self.path.rglob("*") if file.is_file())

    def size(self) -> int:
        """Bytes of these."""
        return sum(file.stat().st_size for file in self.files())

    def model_version(self) -> str:
        """The one that its maker gave it (torch-model-archiver --version); `version` is what tells contents apart."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_bytes())
            return str(manifest["model"]["modelVersion"])
        except (OSError, ValueError, LookupError, TypeError):
            return "1.0"  # as the archiver's own default

    @property
    def engine_name(self) -> str:
        """Name and version as TorchServe can carry them in a URL, metrics and logs: [A-Za-z0-9_.-], 120 at most."""
        flat = self.name.replace("/", "--")
        if len(flat) > _ENGINE_NAME:
            flat = f"{flat[:_ENGINE_NAME]}.{hashlib.sha256(flat.encode()).hexdigest()[:16]}"
        # The prefix keeps "/token" out of TorchServe's management paths, which it takes for its token API.
        return ".".join(filter(None, ["p", flat, self.version]))


@dataclass(frozen=True)
class _Seen:
    """What is known of one version of a packed file: its sha256, or why it can't be unpacked."""

    identity: Identity
    digest: str = ""
    error: str = ""


class Catalog:
    """The archives of one store. With `demo`, a bare name means the demo archive where there is one.

    cache: the folder for what is unpacked, which other servers may share; cache_bytes: its bound.
    in_use: asked for the paths of loaded archives, which the cache must keep.
    on_unpacked: told the seconds that hashing and unpacking a file took.
    """

    def __init__(
        self,
        store: Path,
        cache: Path,
        demo: bool,
        cache_bytes: int = 64 * 2**30,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - frozen
    ) -> None:
        self._store, self._demo = store.absolute(), demo
        self._cache = Cache(cache.absolute(), cache_bytes, limits)
        self._listing = Listing(self._store, _is_name)
        self._seen: dict[Path, _Seen] = {}
        self._flights: dict[tuple[Path, Identity], asyncio.Task[Archive]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._releasing: asyncio.TimerHandle | None = None
        self.in_use: Callable[[], Collection[Path]] = lambda: ()
        self.on_unpacked: Callable[[Archive, float], None] = lambda archive, seconds: None

    def find(self, name: str) -> Archive:
        """Some ten stat calls. Accepts what SageMaker clients send, too: a leading slash and the suffix .tar.gz.

        Raises BadRequest for a name that cannot be one, ModelNotFound where the store holds no such archive.
        """
        plain = _SUFFIX.sub("", name.lstrip("/"))
        if not _is_name(plain):
            raise BadRequest(
                f"{name[:80]!r} is not a model name: letters, digits, . _ - and / for folders, {MAX_DEPTH} at most",
                "model",
            )
        for candidate in [f"{DEMO}/{plain}", plain] if self._demo else [plain]:
            archive = self._folder(candidate) or self._packed(candidate)
            if archive:
                return archive
        raise self._not_found(plain)

    def names(self) -> list[str]:
        """Every archive in the store, by its path in it, sorted; read only. Asks all folders: not in the event loop."""
        return self._listing.names()

    def cached_bytes(self) -> int:
        """Disk that unpacked archives take. Reads their folder when it is asked first: not in the event loop."""
        return self._cache.used()

    async def prepare(self, archive: Archive) -> Archive:
        """The archive with a folder to register; at once where it has one. Concurrent calls share one unpacking.

        Lease it before anything else is awaited: once in_use names the folder, it stays. Raises ModelLoadFailed for a
        file that can't be unpacked, DiskFull, ModelNotFound where the file has gone, and EngineUnavailable where the
        server stops, or another one is stuck in the unpacking of the same file.
        """
        if archive.file is None:
            return archive
        if archive.version and self._cache.hold(archive.path):
            self._release_later()
            return archive
        identity = _file_identity(archive.file)
        if identity is None:
            raise self._not_found(archive.name)
        seen = self._seen.get(archive.file)
        if seen and seen.identity == identity and seen.error:
            raise ModelLoadFailed(seen.error)
        # Whoever leaves does not end it for the others.
        return await asyncio.shield(self._flight(archive.name, archive.file, identity))

    def open(self) -> None:
        """Lists the store, so that later look-ups need not, and empties the cache that earlier versions had in it.

        Not for the event loop.
        """
        self._listing.names()
        old = self._store / ".cache"
        try:
            self._cache.take_over(old)
        except OSError as error:
            logger.warning("%s is no longer used and can be removed; that failed here: %s", old, error)

    def close(self) -> None:
        """Ends every unpacking under way: its prepare() raises EngineUnavailable."""
        self._cache.stop()

    def release(self) -> None:
        """Lets other servers remove what is not in use; done every now and then, too, while anything is held."""
        self._releasing = None
        if self._cache.hold_only(self.in_use()):
            self._release_later()

    def _release_later(self) -> None:
        if self._releasing is None:
            self._releasing = asyncio.get_running_loop().call_later(RELEASE_EVERY, self.release)

    def _folder(self, name: str) -> Archive | None:
        path = self._store / name
        version = _folder_version(path)
        return Archive(name, path, version) if version else None

    def _packed(self, name: str) -> Archive | None:
        for suffix in SUFFIXES:
            file = self._store / f"{name}{suffix}"
            identity = _file_identity(file)
            if identity is None:
                continue
            seen = self._seen.get(file)
            if seen and seen.identity == identity and seen.digest and self._cache.entry(seen.digest).exists():
                return self._unpacked(name, file, seen.digest)
            return Archive(name, file, file=file)
        return None

    def _unpacked(self, name: str, file: Path, digest: str) -> Archive:
        return Archive(name, self._cache.entry(digest), digest[:_VERSION], file)

    def _flight(self, name: str, file: Path, identity: Identity) -> asyncio.Task[Archive]:
        """The unpacking of this version of the file: the one under way, or a new one."""
        key = file, identity

        def end(task: asyncio.Task[Archive]) -> None:
            del self._flights[key]
            if not task.cancelled():
                task.exception()  # else asyncio complains where nobody is left to be told

        if key not in self._flights:
            self._flights[key] = asyncio.create_task(self._unpack(name, file, identity))
            self._flights[key].add_done_callback(end)
        return self._flights[key]

    async def _unpack(self, name: str, file: Path, identity: Identity) -> Archive:
        try:
            async with self._one_at_a_time:
                began = time.perf_counter()
                digest = await self._add_to_cache(file)
                seconds = time.perf_counter() - began
        except InvalidArchive as error:
            message = f"{file.name} cannot be unpacked: {error}"
            self._remember(file, _Seen(identity, error=message))
            raise ModelLoadFailed(message) from None
        except CacheFull as error:
            raise ModelLoadFailed(f"{file.name} cannot be unpacked: {error}; try again later") from None
        except OSError as error:
            message = f"{file.name} cannot be unpacked into {self._cache.folder}: {error.strerror}"
            if error.errno in _DISK_FULL:
                raise DiskFull(f"{message}: make room there, or lower the cache's bound") from error
            raise ModelLoadFailed(message) from error
        except Stalled as error:
            raise EngineUnavailable(f"{file.name} is not unpacked yet: {error}; try again later") from None
        except Stopped:
            raise EngineUnavailable("the server is stopping: try again in a few seconds") from None
        self._remember(file, _Seen(identity, digest))
        archive = self._unpacked(name, file, digest)
        self.on_unpacked(archive, seconds)
        return archive

    def _remember(self, file: Path, seen: _Seen) -> None:
        if _file_identity(file) == seen.identity:  # else what was read may have been another version
            self._seen[file] = seen

    async def _add_to_cache(self, file: Path) -> str:
        staged = await asyncio.to_thread(self._cache.stage, file)
        try:
            self._cache.admit(staged, self.in_use())
            self._release_later()
        finally:
            await asyncio.to_thread(staged.cleanup.close)
        return staged.digest

    def _not_found(self, name: str) -> ModelNotFound:
        names = self._listing.glance()
        known = ", ".join(names[:_LISTED]) + (" and more" if len(names) > _LISTED else "")
        known = known or f"none; build them with: palimpsest archives build --store {self._store}"
        return ModelNotFound(f"there is no model {name!r}; the store holds {known}", "model")


def _is_name(name: str) -> bool:
    """Whether it can be an archive's: no other spelling of the same archive, and the same one in engine_name."""
    if ".." in name or "--" in name or len(name) > _MAX_NAME or _SUFFIX.search(name):
        return False
    return _NAME.fullmatch(name) is not None


def _folder_version(path: Path) -> str | None:
    """Hashes the identity of the folder and of the files that say what it is; None where it is no archive."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        # By the descriptor: the path may name another folder a moment later.
        files = [_file_identity(name, folder) for name in _VERSIONED]
        inode = os.fstat(folder).st_ino
    finally:
        os.close(folder)
    return hashlib.sha256(repr((inode, files)).encode()).hexdigest()[:_VERSION] if files[0] else None


def _file_identity(path: Path | str, folder: int | None = None) -> Identity | None:
    """Returns the identity of a regular file; None where there is none."""
    try:
        status = os.stat(path, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None
