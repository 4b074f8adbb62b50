"""Several servers share one cache of unpacked archives: processes of their own, some of which are killed."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from serving import ROOT, until
from test_unpack import LIMITS, names, put, tar_gz

from serve.errors import EngineUnavailable
from serve.store import cache as caching
from serve.store import catalog as catalogs
from serve.store import locks
from serve.store.cache import Cache, CacheFull
from serve.store.catalog import Catalog
from serve.store.unpack import MANIFEST

# Does what it is told, a line each, and answers each with a line.
SERVER = """if True:
    import sys
    from pathlib import Path
    from serve.store.cache import Cache
    from serve.store.unpack import UnpackLimits
    cache, staged = Cache(Path(sys.argv[1]), int(sys.argv[2]), UnpackLimits()), None
    print("ready", flush=True)
    for line in sys.stdin:
        what, _, path = line.rstrip("\\n").partition(" ")
        if what == "hold":
            print(cache.hold(Path(path)), flush=True)
        elif what == "stage":
            staged = cache.stage(Path(path))
            print(staged.unpacked is not None, flush=True)
        elif what == "admit":
            print(cache.admit(staged, ()), flush=True)
            staged.cleanup.close()
"""


class Other:
    """Another server."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def __call__(self, what: str, path: object = "") -> str:
        self.tell(what, path)
        return self.hear()

    def tell(self, what: str, path: object = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {path}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    command = [sys.executable, "-c", SERVER, str(tmp_path / "cache"), "1000"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        server = Other(process)
        assert server.hear() == "ready"
        yield server
        process.kill()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1000, LIMITS)


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[str, int], Path]:
    """Makes an archive file in the store of which the unpacked files have the given size."""
    (tmp_path / "store").mkdir()

    def make(name: str, size: int) -> Path:
        path = tmp_path / "store" / f"{name}.tar.gz"
        path.write_bytes(tar_gz([(MANIFEST, b"{}"), ("weights", os.urandom(size - 2))]))
        return path

    return make


@contextmanager
def in_a_thread(do: Callable[[], object]) -> Iterator[list[object]]:
    """What it returned, once the block is left."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(do()))
    thread.start()
    try:
        yield results
    finally:
        thread.join(60)


def test_what_another_server_uses_stays_until_it_ends_however_it_ends(
    cache: Cache, other: Other, packed: Callable[[str, int], Path]
) -> None:
    first, second = (put(cache, packed(name, 400)) for name in ("first", "second"))
    assert other("hold", first) == "True"
    assert cache.hold(second), "so that the first is the one unused longest"
    third = put(cache, packed("third", 400))
    assert names(cache.folder) == {first.name, third.name}
    cache.hold(third)
    with pytest.raises(CacheFull, match="needs 700 bytes, and 400 of the cache's 1,000 are in use"):
        put(cache, packed("large", 700))
    assert names(cache.folder) == {first.name, third.name}, "what was refused cost nobody a place"
    other.kill()
    large = put(cache, packed("large", 700))
    assert names(cache.folder) == {large.name}
    assert cache.used() == 700


def test_an_entry_that_another_server_removed_is_not_taken_for_there(
    cache: Cache, other: Other, packed: Callable[[str, int], Path]
) -> None:
    entry = put(cache, packed("one", 600))
    cache.hold_only(())
    other("stage", packed("two", 600))
    other("admit")
    assert not cache.hold(entry)
    assert cache.used() == 600, "of what the other has put there"


def test_the_same_content_is_unpacked_by_one_of_two_servers(
    cache: Cache,
    other: Other,
    packed: Callable[[str, int], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = packed("one", 300)
    assert other("stage", path) == "True"
    monkeypatch.setattr(caching, "unpack", lambda *arguments: pytest.fail("unpacked twice"))
    caplog.set_level(logging.INFO)
    with in_a_thread(lambda: put(cache, path)) as entries:
        until(lambda: "one.tar.gz: another server unpacks it" in caplog.text)
        entry = other("admit")
    assert [str(each) for each in entries] == [entry]


def test_what_a_killed_server_left_half_unpacked_is_unpacked_by_who_waited(
    cache: Cache, other: Other, packed: Callable[[str, int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = packed("one", 300)
    other("stage", path)
    caplog.set_level(logging.INFO)
    with in_a_thread(lambda: put(cache, path)) as entries:
        until(lambda: "another server" in caplog.text)
        other.kill()
    (entry,) = entries
    assert isinstance(entry, Path)
    assert (entry / "weights").stat().st_size == 298
    assert names(cache.folder) == {entry.name}


def test_a_server_that_gets_on_with_nothing_is_waited_for_no_longer_than_a_bound(
    tmp_path: Path, other: Other, packed: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other("stage", packed("one", 300))
    other.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(locks, "STALLED", 0.2)
    catalog = Catalog(tmp_path / "store", tmp_path / "cache", demo=False)
    with pytest.raises(EngineUnavailable, match=r"one.tar.gz is not unpacked yet: another process .* did not get on"):
        asyncio.run(catalog.prepare(catalog.find("one")))
    other.process.send_signal(signal.SIGCONT)
    other("admit")
    assert asyncio.run(catalog.prepare(catalog.find("one"))).version


@pytest.mark.slow
def test_many_servers_at_once_never_lose_what_they_hold(tmp_path: Path, packed: Callable[[str, int], Path]) -> None:
    """With room for three of six archives, each of four processes finds what it holds whole, and the bound is kept."""
    for number in range(6):
        packed(f"m{number}", 300)
    script = """if True:
        import random, sys
        from pathlib import Path
        from serve.store.cache import Cache, CacheFull
        from serve.store.unpack import UnpackLimits
        folder, seed = Path(sys.argv[1]), int(sys.argv[2])
        cache, chosen = Cache(folder / "cache", 1000, UnpackLimits()), random.Random(seed)
        done = 0
        while done < 25:
            staged = cache.stage(folder / "store" / f"m{chosen.randrange(6)}.tar.gz")
            try:
                entry = cache.admit(staged, ())
            except CacheFull:
                cache.hold_only(())
                continue
            finally:
                staged.cleanup.close()
            assert (entry / "weights").stat().st_size == 298
            assert cache.used() <= 1000, cache.used()
            done += 1
    """
    processes = [
        subprocess.Popen([sys.executable, "-c", script, tmp_path, str(seed)], cwd=ROOT, stderr=subprocess.PIPE)
        for seed in range(4)
    ]
    told = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert len(names(tmp_path / "cache")) <= 3
    assert not any(name.startswith(".") for name in names(tmp_path / "cache"))


def test_what_is_no_longer_in_use_is_let_go_by_itself(
    tmp_path: Path, other: Other, packed: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "RELEASE_EVERY", 0.01)
    packed("one", 600)
    two = packed("two", 600)
    catalog, in_use = Catalog(tmp_path / "store", tmp_path / "cache", demo=False, cache_bytes=1000), set[Path]()
    catalog.in_use = lambda: in_use

    async def scenario() -> None:
        archive = await catalog.prepare(catalog.find("one"))
        in_use.add(archive.path)
        mine = Cache(tmp_path / "cache", 1000, LIMITS)  # another's view of it
        with pytest.raises(CacheFull):
            await asyncio.to_thread(put, mine, two)
        in_use.clear()
        while archive.path.exists():
            with suppress(CacheFull):
                await asyncio.to_thread(put, mine, two)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_an_earlier_version_unpacked_into_the_store_is_taken_over(
    tmp_path: Path, packed: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed("one", 300)
    old = tmp_path / "store" / ".cache"
    entry = put(Cache(old, 1000, LIMITS), path)
    (old / ".unpack-abc").mkdir()
    catalog = Catalog(tmp_path / "store", tmp_path / "cache", demo=False)
    catalog.open()
    assert not old.exists()
    assert names(tmp_path / "cache") == {entry.name}
    monkeypatch.setattr(caching, "unpack", lambda *arguments: pytest.fail("unpacked again"))
    assert asyncio.run(catalog.prepare(catalog.find("one"))).path == tmp_path / "cache" / entry.name
    catalog.open()  # there is nothing to do any more


def test_what_cannot_be_moved_from_there_is_removed(
    tmp_path: Path, packed: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "store" / ".cache"
    put(Cache(old, 1000, LIMITS), packed("one", 300))

    def on_another_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", on_another_disk)
    Catalog(tmp_path / "store", tmp_path / "cache", demo=False).open()
    assert not old.exists()
    assert names(tmp_path / "cache") == set()


def test_a_cache_in_the_store_by_choice_stays(tmp_path: Path, packed: Callable[[str, int], Path]) -> None:
    catalog = Catalog(tmp_path / "store", tmp_path / "store" / ".cache", demo=False)
    packed("one", 300)
    archive = asyncio.run(catalog.prepare(catalog.find("one")))
    catalog.open()
    assert archive.is_there()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give folders away")
def test_a_folder_that_another_user_put_there_is_not_served(cache: Cache, packed: Callable[[str, int], Path]) -> None:
    path = packed("one", 300)
    entry = put(cache, path)
    cache.hold_only(())
    os.chown(entry, 12345, -1)
    assert not cache.hold(entry)
    with pytest.raises(OSError, match="not empty"):
        put(cache, path)
