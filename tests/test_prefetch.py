"""Reading ahead: what is used most comes first, within the host budget, and never in a request's way."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.store import prefetch as module
from serve.store.catalog import Archive, Catalog
from serve.store.prefetch import Prefetch, Usage

pytestmark = pytest.mark.anyio
SIZE = 1000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / name / "MAR-INF").mkdir(parents=True)
        (tmp_path / name / "MAR-INF" / "MANIFEST.json").write_text("{}")
        (tmp_path / name / "weights").write_bytes(bytes(SIZE - 2))
    return tmp_path


class Recorded(Prefetch):
    """Puts down what it reads."""

    def __init__(self, store: Path, usage: Usage, room: int, idle: Callable[[], bool] = lambda: True) -> None:
        super().__init__(Catalog(store, store / ".cache", demo=False), usage, lambda: room, idle)
        self.read: list[str] = []

    async def warm(self, archive: Archive, only_while: Callable[[], bool] = lambda: True) -> int:
        self.read.append(archive.name)
        return await super().warm(archive, only_while)


class Looks:
    """Whether the server is idle, and how often that was asked."""

    def __init__(self, idle: bool) -> None:
        self._idle, self.count = idle, 0

    def __call__(self) -> bool:
        self.count += 1
        return self._idle


async def run_briefly(prefetch: Prefetch, until: Callable[[], bool]) -> None:
    task = asyncio.create_task(prefetch.run())
    async with asyncio.timeout(10):
        while not until():
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def usage_of(folder: Path, *names: str) -> Usage:
    usage = Usage(folder / "usage.json")
    for name in names:
        usage.count(name)
    return usage


async def test_the_most_used_are_read_first_and_then_the_others(store: Path, tmp_path: Path) -> None:
    prefetch = Recorded(store, usage_of(tmp_path, "b", "b", "c", "gone"), 10 * SIZE)
    await run_briefly(prefetch, lambda: prefetch.bytes_read >= 3 * SIZE)
    assert prefetch.read == ["b", "c", "a"]
    assert prefetch.bytes_read == 3 * SIZE


async def test_the_budget_bounds_what_is_read(store: Path, tmp_path: Path) -> None:
    (store / "b" / "weights").write_bytes(bytes(5 * SIZE))
    prefetch = Recorded(store, usage_of(tmp_path, "b", "b"), 2 * SIZE)
    await run_briefly(prefetch, lambda: prefetch.bytes_read >= 2 * SIZE)
    assert prefetch.read == ["a", "c"]  # b alone is too large


async def test_nothing_is_read_while_requests_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.0)
    looks = Looks(idle=False)
    prefetch = Recorded(store, usage_of(tmp_path, "a"), 10 * SIZE, looks)
    await run_briefly(prefetch, lambda: looks.count > 3)
    assert prefetch.read == []


async def test_a_request_stops_the_reading(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 100)
    prefetch = Recorded(store, usage_of(tmp_path), 10 * SIZE)
    chunks = iter([True, True, False])
    assert await prefetch.warm(prefetch._catalog.find("a"), lambda: next(chunks)) < SIZE


async def test_it_reads_again_only_after_use(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.0)
    prefetch = Recorded(store, usage_of(tmp_path), 10 * SIZE)
    await run_briefly(prefetch, lambda: prefetch.bytes_read >= 3 * SIZE)
    assert len(prefetch.read) == 3
    prefetch.on_use(prefetch._catalog.find("c"))
    await run_briefly(prefetch, lambda: prefetch.bytes_read >= 6 * SIZE)
    assert prefetch.read[3:] == ["c", "a", "b"]


async def test_usage_is_kept_and_fades(tmp_path: Path) -> None:
    usage_of(tmp_path, *"aaab").save()
    again = usage_of(tmp_path, *"bb")
    assert again.by_count() == ["b", "a"]  # 2.5 and 1.5
    (tmp_path / "usage.json").write_text("nonsense")
    assert Usage(tmp_path / "usage.json").by_count() == []


async def test_a_packed_archive_is_read_as_it_lies(tmp_path: Path) -> None:
    (tmp_path / "p.tar.gz").write_bytes(bytes(SIZE))
    prefetch = Recorded(tmp_path, usage_of(tmp_path), 10 * SIZE)
    assert await prefetch.warm(prefetch._catalog.find("p")) == SIZE


async def test_an_archive_that_goes_meanwhile_ends_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = Archive.size

    def size_unless_gone(archive: Archive) -> int:
        if archive.name == "a":
            raise FileNotFoundError(archive.path)
        return size(archive)

    monkeypatch.setattr(Archive, "size", size_unless_gone)
    prefetch = Recorded(store, usage_of(tmp_path), 10 * SIZE)
    await run_briefly(prefetch, lambda: prefetch.bytes_read >= 2 * SIZE)
    assert prefetch.read == ["b", "c"]
