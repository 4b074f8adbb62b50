"""Which archives the store holds, and where each can be registered from.

STORE/<name>/        a folder in TorchServe's no-archive layout, served as it lies
STORE/<name>.tar.gz  unpacked once into CACHE/<start of the file's sha256>/ and served from there
STORE/<name>.mar     (a folder wins over a file, .tar.gz over .mar)

A store on a URL is looked at through a folder of the cache (serve/store/mirror.py), and holds packed archives only.

Archives come, go and are replaced while the server runs: every look-up asks the disk.
"""

import asyncio
import errno
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Collection, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.errors import BadRequest, DiskFull, EngineUnavailable, ModelLoadFailed, ModelNotFound, ModelNotReady
from serve.store.cache import Cache, CacheFull, Staged
from serve.store.digests import content, is_settled
from serve.store.identity import file_identity, folder_identity
from serve.store.known_versions import KnownVersions
from serve.store.listing import Listing
from serve.store.locks import Stalled, Stopped
from serve.store.mirror import Mirror
from serve.store.remote import RemoteError
from serve.store.unpack import MANIFEST, SUFFIXES, InvalidArchive, UnpackLimits
from serve.store_url import StoreUrl

logger = logging.getLogger(__name__)

DEMO = "demo"
RELEASE_EVERY = 30.0  # seconds
MAX_DEPTH = 4  # folders, the archive's own included
_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(f"{_PART}(/{_PART}){{0,{MAX_DEPTH - 1}}}", re.ASCII)
_SUFFIX = re.compile("(" + "|".join(map(re.escape, SUFFIXES)) + ")$")
_LISTED = 20  # names in an error message
_MAX_NAME = 200
_ENGINE_NAME = 80
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_VERSION = 12  # hexadecimal digits
_TRIES = 3  # for what is replaced while it is read
_FETCHES = 2  # archives of a store on a URL at a time: a large one does not hold up all others


@dataclass(frozen=True)
class Archive:
    """One version of one archive.

    name: its path in the store. path: the folder to register; of a packed archive, before Catalog.prepare, the file.
    version: a hash of its content, of the file's bytes where it is packed, the same on every machine; empty before
    Catalog.prepare found it. file: where path is unpacked from, if it is. identity: of a folder, which changes whenever
    something else lies there.
    """

    name: str
    path: Path
    version: str = ""
    file: Path | None = None
    identity: str = ""

    def is_there(self) -> bool:
        return self.path.is_file() or (self.path / MANIFEST).is_file()

    def is_replaced(self) -> bool:
        """Whether something else lies in its folder; what a file was unpacked into never changes."""
        return self.file is None and folder_identity(self.path) != self.identity

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


class Catalog:
    """The archives of one store. With `demo`, a bare name means the demo archive where there is one.

    cache: the folder for what is unpacked, which other servers may share; cache_bytes: its bound.
    in_use: asked for the paths of loaded archives, which the cache must keep.
    on_unpacked: told the seconds that fetching, hashing and unpacking a file took.
    patience: seconds that anybody waits for what is fetched from a URL.
    """

    def __init__(
        self,
        store: Path | StoreUrl,
        cache: Path,
        demo: bool,
        cache_bytes: int = 64 * 2**30,
        limits: UnpackLimits = UnpackLimits(),  # noqa: B008 - frozen
    ) -> None:
        self._stopped = threading.Event()
        self._cache = Cache(cache.absolute(), cache_bytes, limits, self._stopped)
        self.mirror: Mirror | None = None
        if isinstance(store, StoreUrl):
            self.mirror = Mirror(store, cache.absolute(), _is_name_there, cache_bytes, self._stopped)
            store = self.mirror.folder
        self.folder, self._demo = store.absolute(), demo
        self._listing = Listing(self.folder, _is_name)
        self._unusable: dict[Path, tuple[str, str]] = {}  # packed files: identity, and why they can't be unpacked
        self._known = KnownVersions(cache.absolute() / ".versions")
        self._flights: dict[tuple[Path, str], asyncio.Task[Archive]] = {}
        # Of each kind; what reads gigabytes is not to hold up what is read in milliseconds, so not of both.
        self._files_at_a_time = asyncio.Semaphore(_FETCHES if self.mirror else 1)
        self._one_folder_at_a_time = asyncio.Lock()
        self.patience: float | None = None
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

    async def look_up(self, name: str) -> Archive:
        """As find(); where a store on a URL may have got it meanwhile, asks it. Raises StoreUnreachable, too."""
        try:
            return self.find(name)
        except ModelNotFound:
            if self.mirror is None:
                raise
        try:
            await self.mirror.refresh()
        except Stopped:
            raise _stopping() from None
        return self.find(name)

    def names(self) -> list[str]:
        """Every archive in the store, by its path in it, sorted; read only. Asks all folders: not in the event loop."""
        return self._listing.names()

    def cached_bytes(self) -> int:
        """Disk that unpacked archives take. Reads their folder when it is asked first: not in the event loop."""
        return self._cache.used()

    async def prepare(self, archive: Archive) -> Archive:
        """The archive with its version and a folder to register; at once where it has them.

        Else what it holds is hashed, and unpacked where it is a file; concurrent calls share that. Lease it before
        anything else is awaited: once in_use names the folder, it stays. Raises ModelLoadFailed for what can't be read
        or unpacked, DiskFull, ModelNotFound where it has gone, ModelNotReady where it is replaced all the time or
        fetched for longer than anybody waits, StoreUnreachable, and EngineUnavailable where the server stops, or
        another one is stuck in the unpacking of the same file.
        """
        if archive.file is None:
            if archive.version:
                return archive
            return await asyncio.shield(self._flight((archive.path, archive.identity), self._hash(archive)))
        if archive.version and self._cache.hold(archive.path):
            self._release_later()
            return archive
        identity = file_identity(archive.file)
        if identity is None:
            raise self._not_found(archive.name)
        before, error = self._unusable.get(archive.file, ("", ""))
        if before == identity:
            raise ModelLoadFailed(error)
        # Whoever leaves does not end it for the others.
        unpacking = self._flight((archive.file, identity), self._unpack(archive.name, archive.file, identity))
        try:
            async with asyncio.timeout(self.patience if self.mirror else None):
                return await asyncio.shield(unpacking)
        except TimeoutError:
            raise ModelNotReady(f"{archive.name!r} is still being fetched: try again", retry_after=10) from None

    def open(self) -> None:
        """Lists the store, so that later look-ups need not, and empties the cache that earlier versions had in it.

        Not for the event loop.
        """
        self._listing.names()
        self._known.get(self.folder, "")
        old = self.folder / ".cache"
        try:
            self._cache.take_over(old)
        except OSError as error:
            logger.warning("%s is no longer used and can be removed; that failed here: %s", old, error)

    async def follow(self) -> None:
        """Keeps up with a store on a URL until it is cancelled."""
        if self.mirror:
            await self.mirror.follow()

    def fetched(self, name: str) -> tuple[int, int]:
        """Of an archive that is fetched from a URL now: the bytes that are here, and all of them; else 0, 0."""
        return self.mirror.under_way(name) if self.mirror else (0, 0)

    def close(self) -> None:
        """Ends every unpacking and hashing under way: its prepare() raises EngineUnavailable."""
        self._stopped.set()

    def release(self) -> None:
        """Lets other servers remove what is not in use; done every now and then, too, while anything is held."""
        self._releasing = None
        if self._cache.hold_only(self.in_use(), RELEASE_EVERY):
            self._release_later()

    def _release_later(self) -> None:
        if self._releasing is None:
            self._releasing = asyncio.get_running_loop().call_later(RELEASE_EVERY, self.release)

    def _folder(self, name: str) -> Archive | None:
        path = self.folder / name
        identity = folder_identity(path)
        return Archive(name, path, self._known.get(path, identity), identity=identity) if identity else None

    def _packed(self, name: str) -> Archive | None:
        for suffix in SUFFIXES:
            file = self.folder / f"{name}{suffix}"
            identity = file_identity(file)
            if identity is None:
                continue
            digest = self._known.get(file, identity)
            if digest and self._cache.entry(digest).exists():
                return self._unpacked(name, file, digest)
            return Archive(name, file, file=file)
        return None

    def _unpacked(self, name: str, file: Path, digest: str) -> Archive:
        return Archive(name, self._cache.entry(digest), digest[:_VERSION], file)

    def _flight(self, key: tuple[Path, str], work: Coroutine[Any, Any, Archive]) -> asyncio.Task[Archive]:
        """What prepares this version of what lies there: the work that is under way, or this one."""

        def end(task: asyncio.Task[Archive]) -> None:
            del self._flights[key]
            if not task.cancelled():
                task.exception()  # else asyncio complains where nobody is left to be told

        if key in self._flights:
            work.close()
        else:
            self._flights[key] = asyncio.create_task(work)
            self._flights[key].add_done_callback(end)
        return self._flights[key]

    async def _hash(self, archive: Archive) -> Archive:
        for _ in range(_TRIES):
            try:
                async with self._one_folder_at_a_time:
                    version = await asyncio.to_thread(self._version_of, archive)
            except Stopped:
                raise _stopping() from None
            except OSError as error:
                if not archive.is_replaced():
                    raise ModelLoadFailed(f"{archive.name} cannot be read: {error}") from error
                version = ""
            if version:
                return replace(archive, version=version)
            found = self._folder(archive.name)
            if found is None:
                raise self._not_found(archive.name)
            archive = found
        raise ModelNotReady(f"{archive.name!r} is replaced while it is read: try again", retry_after=1)

    def _version_of(self, archive: Archive) -> str:
        """Of what its folder holds; empty where that was replaced meanwhile."""
        found = content(archive.path, self._stopped)
        if archive.is_replaced():
            return ""
        version = found.digest[:_VERSION]
        self._known.add(archive.path, archive.identity, version, keep=found.settled)
        return version

    async def _unpack(self, name: str, file: Path, identity: str) -> Archive:
        try:
            async with self._files_at_a_time:
                began = time.perf_counter()
                digest = await self._add_to_cache(file)
                await asyncio.to_thread(self._remember, file, identity, digest)
                seconds = time.perf_counter() - began
        except InvalidArchive as error:
            message = f"{file.name} cannot be unpacked: {error}"
            if file_identity(file) == identity:  # else what was read may have been another version
                self._unusable[file] = identity, message
            raise ModelLoadFailed(message) from None
        except CacheFull as error:
            raise ModelLoadFailed(f"{file.name} cannot be unpacked: {error}; try again later") from None
        except OSError as error:
            message = f"{file.name} cannot be unpacked into {self._cache.folder}: {error.strerror}"
            if error.errno in _DISK_FULL:
                raise DiskFull(f"{message}: make room there, or lower the cache's bound") from error
            raise ModelLoadFailed(message) from error
        except RemoteError as error:
            assert self.mirror is not None
            raise self.mirror.unreachable(str(error)) from None
        except Stalled as error:
            raise EngineUnavailable(f"{file.name} is not unpacked yet: {error}; try again later") from None
        except Stopped:
            raise _stopping() from None
        archive = self._unpacked(name, file, digest)
        self.on_unpacked(archive, seconds)
        return archive

    def _remember(self, file: Path, identity: str, digest: str) -> None:
        with suppress(FileNotFoundError):
            changed = file.stat().st_mtime_ns
            if file_identity(file) == identity:  # else what was read may have been another version
                self._known.add(file, identity, digest, keep=is_settled(changed))

    async def _add_to_cache(self, file: Path) -> str:
        staged = await asyncio.to_thread(self._stage, file)
        try:
            self._cache.admit(staged, self.in_use())
            self._release_later()
        finally:
            await asyncio.to_thread(staged.cleanup.close)
        return staged.digest

    def _stage(self, file: Path) -> Staged:
        """As Cache.stage, of what the file stands for."""
        if self.mirror is None:
            return self._cache.stage(file)
        with self.mirror.copy(file) as copy:
            while True:
                if copy.sha256 and (staged := self._cache.staged(copy.sha256)):
                    return staged
                begun = copy.begun()
                try:
                    copy.fetch()
                    staged = self._cache.stage(copy.part, copy.sha256)
                except InvalidArchive:
                    copy.drop()
                    if not begun:  # else its beginning, from an earlier try, may have been of something else
                        raise
                else:
                    copy.done(staged.digest)
                    return staged

    def _not_found(self, name: str) -> ModelNotFound:
        names = self._listing.glance()
        known = ", ".join(names[:_LISTED]) + (" and more" if len(names) > _LISTED else "")
        if not known:
            known = "none" if self.mirror else f"none; build them with: palimpsest archives build --store {self.folder}"
        return ModelNotFound(f"there is no model {name!r}; the store holds {known}", "model")


def _stopping() -> EngineUnavailable:
    return EngineUnavailable("the server is stopping: try again in a few seconds")


def _is_name_there(name: str) -> bool:
    """Whether an archive of a store on a URL can be called so: the demo archives are each server's own."""
    return _is_name(name) and not name.startswith(f"{DEMO}/")


def _is_name(name: str) -> bool:
    """Whether it can be an archive's: no other spelling of the same archive, and the same one in engine_name."""
    if ".." in name or "--" in name or len(name) > _MAX_NAME or _SUFFIX.search(name):
        return False
    return _NAME.fullmatch(name) is not None
