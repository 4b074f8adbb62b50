"""Archives come, go and are replaced in the store while the catalog is asked; packed ones are unpacked once."""

import asyncio
import gzip
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.archives.export import Format, export
from serve.errors import BadRequest, EngineUnavailable, ModelLoadFailed, ModelNotFound
from serve.store import cache as caching
from serve.store import catalog as catalogs
from serve.store import digests, known_versions
from serve.store.catalog import MAX_DEPTH, Archive, Catalog
from serve.store.known_versions import KnownVersions
from serve.store.publish import replace_directory
from serve.store.unpack import MANIFEST, UnpackLimits

WEIGHTS = 1000  # bytes in each archive


def make_folder(folder: Path, weights: bytes | None = None) -> Path:
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    (folder / "requirements.txt").touch()  # its own, so that packing it adds none
    (folder / "weights").write_bytes(os.urandom(WEIGHTS - 2) if weights is None else weights)
    return folder


def put_file(file: Path, weights: bytes | None = None) -> None:
    """Packs an archive and puts it into the store, in place of what is there, in one step."""

    @contextmanager
    def no_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda size: None

    with tempfile.TemporaryDirectory() as folder:
        made = make_folder(Path(folder) / "made", weights)
        export(made, Format.MAR if file.suffix == ".mar" else Format.TAR_GZ, file, no_progress)


def prepare(catalog: Catalog, name: str) -> Archive:
    return asyncio.run(catalog.prepare(catalog.find(name)))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    make_folder(store / "sam")
    make_folder(store / "demo" / "sam")
    make_folder(store / "team" / "own")
    put_file(store / "team" / "lama.tar.gz")
    put_file(store / "sd.mar")
    return store


# Names


@pytest.mark.parametrize("name", ["sam", "/sam", "sam.tar.gz", "/sam.tar.gz", "sam.mar"])
def test_every_spelling_of_a_name_is_the_same_archive(store: Path, name: str) -> None:
    archive = Catalog(store, store / ".cache", demo=False).find(name)
    assert (archive.name, archive.path) == ("sam", store / "sam")


def test_the_demo_set_stands_behind_the_bare_names(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=True)
    assert [catalog.find(name).name for name in ("sam", "demo/sam", "team/own", "sd")] == [
        "demo/sam",
        "demo/sam",
        "team/own",
        "sd",
    ]


@pytest.mark.parametrize(
    "name",
    ["", "/", ".tar.gz", "..", "../store/sam", "sam/../sam", "team//own", "team/", ".cache", "team/.own", "a--b",
     "sam\\x", "sam\n", "sam\0", "s am", "säm", "-sam", "a" * 201, "a" * 100_000, "a/b/c/d/e", "sam.mar.tar.gz",
     "sam.tar.gz.mar"],
)  # fmt: skip
def test_what_cannot_be_a_name_is_a_bad_request(store: Path, name: str) -> None:
    with pytest.raises(BadRequest) as raised:
        Catalog(store, store / ".cache", demo=False).find(name)
    assert (raised.value.status, raised.value.field) == (400, "model")
    assert len(raised.value.message) < 1000


def test_a_model_that_is_not_there_is_named_beside_those_that_are(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"'x'; the store holds demo/sam, sam, sd, team/lama, team/own$") as raised:
        Catalog(store, store / ".cache", demo=False).find("x")
    assert raised.value.field == "model"
    with pytest.raises(ModelNotFound, match="archives build"):
        Catalog(tmp_path / "nowhere", tmp_path / "nowhere" / ".cache", demo=False).find("x")
    for number in range(30):
        make_folder(store / f"a{number:02}")
    with pytest.raises(ModelNotFound, match=r"holds a00, .*, a19 and more$"):
        Catalog(store, store / ".cache", demo=False).find("x")


def test_names_lists_archives_and_nothing_else(store: Path) -> None:
    make_folder(store / ".build-1-sam" / "sam")
    make_folder(store / "sam" / "inner")
    make_folder(store / "un--sayable")
    make_folder(store / "x.mar")
    make_folder(store.joinpath(*"12345"))
    (store / "empty").mkdir()
    (store / "notes.txt").write_text("")
    (store / "folder.tar.gz").mkdir()
    (store / "sam.tar.gz").write_bytes(b"")
    (store / "loop").symlink_to(store)
    catalog = Catalog(store, store / ".cache", demo=False)
    names = catalog.names()
    assert [name for name in names if not name.startswith("loop/")] == [
        "demo/sam",
        "sam",
        "sd",
        "team/lama",
        "team/own",
    ]
    assert [catalog.find(name).name for name in names] == names


PART = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}", fullmatch=True)
NAME = st.lists(PART, min_size=1, max_size=MAX_DEPTH).map("/".join)


@pytest.mark.slow
@settings(deadline=None)
@given(name=st.text(max_size=30) | st.text("./\\a\0%", max_size=12) | NAME)
@example("../secret").via("outside the store")
def test_whatever_the_name_only_the_store_is_looked_at(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "secret")
        store = make_folder(Path(folder) / "store" / "a").parent
        try:
            found = Catalog(store, store / ".cache", demo=False).find(name).path
        except BadRequest:
            return
        assert found == store / "a"


@pytest.mark.slow
@settings(deadline=None)
@given(names=st.lists(NAME.filter(lambda name: "--" not in name), min_size=2, max_size=5, unique=True))
@example(["token", "t/oken"])
@example(["a/" + "b" * 150, "a/" + "b" * 151])
@example(["a-/b", "a/b"])
def test_engine_names_are_short_plain_and_unique(names: list[str]) -> None:
    archives = [Archive(name, Path("/x"), version) for name in names for version in ("0a1b2c3d4e5f", "ffffffffffff")]
    engine_names = [archive.engine_name for archive in archives]
    assert len(set(engine_names)) == len(archives)
    for name in engine_names:
        assert re.fullmatch(r"p\.[A-Za-z0-9_.-]{1,118}", name)
        assert "/token" not in f"/models/{name}"


# Folders


def test_a_folder_is_served_as_it_lies(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    found = catalog.find("team/own")
    assert (found.path, found.version) == (store / "team" / "own", "")
    archive = asyncio.run(catalog.prepare(found))
    assert archive.path == store / "team" / "own"
    assert re.fullmatch("[0-9a-f]{12}", archive.version)
    assert catalog.find("team/own") == archive
    assert asyncio.run(catalog.prepare(archive)) is archive


def test_a_relative_store_gives_absolute_paths(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store.parent)
    assert prepare(Catalog(Path("store"), Path("store") / ".cache", demo=False), "sam").path == store / "sam"
    assert prepare(Catalog(Path("store"), Path("store") / ".cache", demo=False), "sd").path.parent == store / ".cache"


def test_the_version_of_a_folder_changes_with_its_content_only(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    seen = [prepare(catalog, "sam").version]

    def changed() -> bool:
        seen.append(prepare(catalog, "sam").version)
        assert catalog.find("sam").version == seen[-1]
        return seen[-1] not in seen[:-1]

    (store / "sam" / "__pycache__").mkdir()  # a worker starts
    (store / "sam" / "__pycache__" / "handler.pyc").write_bytes(b"")
    assert not changed()
    (store / "sam" / "model-config.yaml").write_text("minWorkers: 1")
    assert changed()
    (store / "sam" / "model-config.yaml").write_text("minWorkers: 2")
    assert changed()
    (store / "sam" / MANIFEST).write_text("{ }")
    assert changed()
    os.rename(store / "sam", store / ".old")
    os.rename(make_folder(store / ".new"), store / "sam")
    assert changed()
    os.rename(store / "sam", store / ".newer")
    os.rename(store / ".old", store / "sam")
    assert not changed()


def test_copies_are_one_version_under_each_name_and_on_each_machine(store: Path, tmp_path: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    shutil.copytree(store / "sam", store / "copy", copy_function=shutil.copy)
    shutil.copytree(store, tmp_path / "elsewhere", ignore=lambda *_: [".cache"])
    first, second = prepare(catalog, "sam"), prepare(catalog, "copy")
    there = prepare(Catalog(tmp_path / "elsewhere", tmp_path / "cache", demo=False), "sam")
    assert first.version == second.version == there.version
    assert first.engine_name == there.engine_name != second.engine_name


@pytest.mark.parametrize("change", ["rename", "content"])
def test_any_file_makes_the_version(store: Path, change: str) -> None:
    first = prepare(Catalog(store, store / ".cache", demo=False), "sam").version
    if change == "rename":
        os.rename(store / "sam" / "weights", store / "sam" / "weight")
    else:
        weights = (store / "sam" / "weights").read_bytes()
        (store / "sam" / "weights").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert prepare(Catalog(store, store / ".cache", demo=False), "sam").version != first


@pytest.mark.parametrize("copy", [shutil.copy2, os.link])
def test_an_archive_that_is_put_there_anew_with_the_same_content_is_noticed_and_stays_the_same_version(
    store: Path, copy: Callable[[str, str], object]
) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    first = prepare(catalog, "sam")
    staging = store / ".build-1-sam"
    shutil.copytree(store / "sam", staging / "sam", copy_function=copy)
    assert not first.is_replaced()
    replace_directory(staging / "sam", store / "sam", staging, store)
    assert first.is_replaced()
    again = prepare(catalog, "sam")
    assert again.version == first.version
    assert not again.is_replaced()


def long_unchanged(*folders: Path) -> None:
    for file in [file for folder in folders for file in folder.rglob("*")]:
        os.utime(file, ns=(10**18, 10**18))


def test_what_was_read_once_is_not_read_again_not_even_after_a_restart(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("sam", "team/own", "sd", "team/lama")
    long_unchanged(store)
    first = Catalog(store, store / ".cache", demo=False)
    versions = [prepare(first, name).version for name in names]
    monkeypatch.setattr(digests, "sha256", lambda *arguments: pytest.fail("read again"))
    monkeypatch.setattr(caching, "sha256", lambda *arguments: pytest.fail("read again"))
    assert [prepare(first, name).version for name in names] == versions
    again = Catalog(store, store / ".cache", demo=False)
    assert [again.find(name).version for name in names] == versions


def test_what_is_still_being_copied_is_read_again_at_the_next_start(store: Path) -> None:
    """Its identity does not tell that the weights came later."""
    whole = (store / "sam" / "weights").read_bytes()
    (store / "sam" / "weights").write_bytes(whole[:10])
    first = prepare(Catalog(store, store / ".cache", demo=False), "sam")
    (store / "sam" / "weights").write_bytes(whole)
    again = prepare(Catalog(store, store / ".cache", demo=False), "sam")
    assert again.identity == first.identity
    assert again.version != first.version


def test_a_file_of_known_versions_that_is_damaged_or_cannot_be_written_says_nothing(store: Path) -> None:
    long_unchanged(store)
    known = store / ".cache" / ".versions"
    version = prepare(Catalog(store, store / ".cache", demo=False), "sam").version
    line = known.read_bytes()
    known.write_bytes(b"\xff\xfe nonsense\n\n" + line[:20] + b"\n" + line + line[:-10])
    assert prepare(Catalog(store, store / ".cache", demo=False), "sam").version == version
    known.unlink()
    known.mkdir()
    assert prepare(Catalog(store, store / ".cache", demo=False), "sam").version == version


def test_known_versions_are_bounded_and_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_versions, "MAX_ENTRIES", 10)
    for start in range(0, 100, 25):
        known = KnownVersions(tmp_path / "versions")
        for number in range(start, start + 25):
            known.add(Path(f"/store/{number}"), "ab12", f"{number:04x}", keep=True)
        kept = [number for number in range(100) if known.get(Path(f"/store/{number}"), "ab12")]
        assert kept == list(range(start + 15, start + 25))
        assert len((tmp_path / "versions").read_text().splitlines()) <= 20
    assert KnownVersions(tmp_path / "versions").get(Path("/store/99"), "ab12") == f"{99:04x}"
    assert KnownVersions(tmp_path / "versions").get(Path("/store/99"), "ab13") == ""


def test_a_folder_that_is_replaced_while_it_is_read_is_read_anew(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    make_folder(store / ".new")
    expected = digests.content(store / ".new", threading.Event()).digest
    real = catalogs.content

    def read_while_it_is_replaced(folder: Path, stopped: threading.Event) -> digests.Content:
        if (store / ".new").exists():
            replace_directory(store / ".new", store / "sam", store / ".staging", store)
            os.rename(store / ".new", store / ".old")
            (store / "sam" / "weights").read_bytes()
            raise FileNotFoundError(2, "No such file", "weights")
        return real(folder, stopped)

    monkeypatch.setattr(catalogs, "content", read_while_it_is_replaced)
    archive = prepare(catalog, "sam")
    assert expected.startswith(archive.version)
    assert not archive.is_replaced()


def test_a_folder_that_cannot_be_read_is_an_error_and_one_that_goes_is_not_found(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)

    def unreadable(folder: Path, stopped: threading.Event) -> digests.Content:
        raise PermissionError(13, "Permission denied", str(folder / "weights"))

    with monkeypatch.context() as patched:
        patched.setattr(catalogs, "content", unreadable)
        with pytest.raises(ModelLoadFailed, match=r"sam cannot be read: .*Permission denied.*weights"):
            prepare(catalog, "sam")
    found = catalog.find("sam")
    shutil.rmtree(store / "sam")
    with pytest.raises(ModelNotFound):
        asyncio.run(catalog.prepare(found))


def test_concurrent_requests_share_one_reading_of_a_folder(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    real, read = catalogs.content, list[Path]()
    monkeypatch.setattr(catalogs, "content", lambda folder, stopped: (read.append(folder), real(folder, stopped))[1])

    async def scenario() -> list[Archive]:
        return await asyncio.gather(*(catalog.prepare(catalog.find("sam")) for _ in range(20)))

    assert len(set(asyncio.run(scenario()))) == 1
    assert read == [store / "sam"]


def test_a_build_of_ours_says_what_its_files_hold_as_long_as_they_are_the_ones(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store / "sam"
    expected = digests.content(folder, threading.Event()).digest
    assert digests.recorded(folder) == {}
    (folder / digests.RECORD).write_text(json.dumps({"files": digests.to_record(folder, {})}))
    assert set(digests.recorded(folder)) == {MANIFEST, "requirements.txt", "weights"}
    with_record = digests.content(folder, threading.Event()).digest
    assert with_record != expected, "the record is one of the files"
    read = list[str]()
    real = digests.sha256
    monkeypatch.setattr(digests, "sha256", lambda file, stopped: (read.append(file.name), real(file, stopped))[1])
    assert digests.content(folder, threading.Event()).digest == with_record
    assert [Path(name).name for name in read] == ["palimpsest.json"]
    # Of the same size and changed since, or of another size.
    for weights in (os.urandom(WEIGHTS - 2), b"short"):
        (folder / "weights").write_bytes(weights)
        if len(weights) > 10:
            os.utime(folder / "weights", ns=(0, (folder / digests.RECORD).stat().st_mtime_ns + 1))
        assert digests.content(folder, threading.Event()).digest != with_record
        assert set(digests.recorded(folder)) == {MANIFEST, "requirements.txt"}


@pytest.mark.parametrize(
    "record", ["", "[]", "{}", '{"files": 1}', '{"files": {"weights": 1}}', '{"files": {"../x": {}}}']
)
def test_a_record_that_makes_no_sense_is_passed_over(store: Path, record: str) -> None:
    (store / "sam" / digests.RECORD).write_text(record)
    assert digests.recorded(store / "sam") == {}
    assert prepare(Catalog(store, store / ".cache", demo=False), "sam").version


def test_archives_come_and_go_between_two_looks(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    put_file(store / "new.tar.gz")
    assert prepare(catalog, "new").name == "new"
    make_folder(store / "new")
    assert catalog.find("new").path == store / "new", "a folder wins over a file"
    os.rename(store / "new", store / ".gone")
    assert catalog.find("new").file == store / "new.tar.gz"
    put_file(store / "new.mar")
    assert catalog.find("new").file == store / "new.tar.gz", ".tar.gz wins over .mar"
    (store / "new.tar.gz").unlink()
    assert catalog.find("new").file == store / "new.mar"
    (store / "new.mar").unlink()
    with pytest.raises(ModelNotFound):
        catalog.find("new")


def test_finding_what_is_there_never_lists_a_folder(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(store, store / ".cache", demo=True)
    prepare(catalog, "sd")
    prepare(catalog, "sam")
    for function in ("listdir", "scandir"):
        monkeypatch.setattr(os, function, lambda *arguments: pytest.fail("lists a folder"))
    assert catalog.find("sam").version
    assert catalog.find("sd").version


# Files


@pytest.mark.parametrize(("name", "file"), [("team/lama", "team/lama.tar.gz"), ("sd", "sd.mar")])
def test_a_file_is_unpacked_once_and_then_found_ready(store: Path, tmp_path: Path, name: str, file: str) -> None:
    catalog = Catalog(store, tmp_path / "cache", demo=False)
    told: list[tuple[Archive, float]] = []
    catalog.on_unpacked = lambda archive, seconds: told.append((archive, seconds))
    pending = catalog.find(name)
    assert not pending.version
    assert pending.file == store / file
    archive = asyncio.run(catalog.prepare(pending))
    assert archive.version
    assert archive.path.parent == tmp_path / "cache"
    assert (archive.path / "weights").stat().st_size == WEIGHTS - 2
    assert catalog.find(name) == archive
    assert asyncio.run(catalog.prepare(archive)) == archive
    assert [archive for archive, _ in told] == [archive]
    assert 0 < told[0][1] < 10
    assert prepare(Catalog(store, tmp_path / "cache", demo=False), name) == archive, "after a restart"


def test_the_version_of_a_file_is_its_content(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    first = prepare(catalog, "sd")
    os.utime(store / "sd.mar")
    assert not catalog.find("sd").version
    assert prepare(catalog, "sd") == first
    put_file(store / "sd.mar")
    second = prepare(catalog, "sd")
    assert second.version != first.version
    assert second.engine_name != first.engine_name
    assert first.path.exists(), "its requests are not yet finished"


def test_a_file_that_takes_the_place_of_another_is_noticed_though_size_and_time_are_the_same(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    first = prepare(catalog, "sd")
    before = (store / "sd.mar").stat()
    put_file(store / "sd.mar")
    os.utime(store / "sd.mar", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (store / "sd.mar").stat().st_size == before.st_size
    assert prepare(catalog, "sd") != first


def test_a_file_replaced_on_the_way_is_not_taken_for_the_one_before(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    real = caching.Cache.stage

    def replace_and_stage(cache: caching.Cache, path: Path) -> caching.Staged:
        os.rename(path, store / "aside")
        put_file(path)
        return real(cache, path)

    monkeypatch.setattr(caching.Cache, "stage", replace_and_stage)
    replacement = prepare(catalog, "sd")
    monkeypatch.undo()
    os.replace(store / "aside", store / "sd.mar")
    assert prepare(catalog, "sd") != replacement


def test_concurrent_requests_share_one_unpacking_and_a_leaver_does_not_end_it(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    unpackings: list[Archive] = []
    catalog.on_unpacked = lambda archive, seconds: unpackings.append(archive)

    async def scenario() -> list[Archive]:
        leaver, *others = (asyncio.create_task(catalog.prepare(catalog.find("sd"))) for _ in range(20))
        await asyncio.sleep(0)
        leaver.cancel()
        return await asyncio.gather(*others)

    assert set(asyncio.run(scenario())) == {unpackings[0]}
    assert len(unpackings) == 1


def test_an_unpacking_that_everybody_left_goes_on(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)

    async def scenario() -> Archive:
        done = asyncio.get_running_loop().create_future()
        catalog.on_unpacked = lambda archive, seconds: done.set_result(archive)
        leaver = asyncio.create_task(catalog.prepare(catalog.find("sd")))
        await asyncio.sleep(0)
        leaver.cancel()
        return await done

    assert asyncio.run(scenario()) == catalog.find("sd")


@pytest.mark.parametrize("suffix", [".tar.gz", ".mar"])
def test_a_file_that_is_still_being_copied_works_once_it_is_whole(store: Path, suffix: str) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    put_file(store / f".new{suffix}")
    whole = (store / f".new{suffix}").read_bytes()
    with open(store / f"new{suffix}", "wb") as file:
        for part in (whole[: len(whole) // 2], whole[len(whole) // 2 : -1]):
            file.write(part)
            file.flush()
            with pytest.raises(ModelLoadFailed, match=rf"new{re.escape(suffix)} cannot be unpacked: .*copied"):
                prepare(catalog, "new")
        file.write(whole[-1:])
    assert (prepare(catalog, "new").path / "weights").stat().st_size == WEIGHTS - 2
    assert len(list((store / ".cache").iterdir())) == 1


def test_a_bad_file_is_read_once_and_again_when_it_is_replaced(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    (store / "bad.tar.gz").write_bytes(gzip.compress(b"no tar" * 1000))
    for _ in range(2):
        with pytest.raises(ModelLoadFailed, match=r"bad\.tar\.gz cannot be unpacked: it is no gzipped tar"):
            prepare(catalog, "bad")
        assert catalog.find("bad") == Archive("bad", store / "bad.tar.gz", file=store / "bad.tar.gz")
        monkeypatch.setattr(caching, "unpack", lambda *arguments: pytest.fail("read again"))
    monkeypatch.undo()
    put_file(store / "bad.tar.gz")
    assert prepare(catalog, "bad").version


def test_a_file_that_goes_before_it_is_unpacked_is_not_found(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    archive = catalog.find("sd")
    (store / "sd.mar").unlink()
    with pytest.raises(ModelNotFound):
        asyncio.run(catalog.prepare(archive))


def test_a_cache_that_cannot_be_written_is_an_error_with_its_place(store: Path) -> None:
    (store / ".cache").write_text("")
    with pytest.raises(ModelLoadFailed, match=r"sd\.mar cannot be unpacked into .*/\.cache: File exists"):
        prepare(Catalog(store, store / ".cache", demo=False), "sd")


def test_an_archive_larger_than_the_cache_or_the_limit_is_refused_with_its_numbers(store: Path) -> None:
    for catalog in (
        Catalog(store, store / ".cache", demo=False, cache_bytes=WEIGHTS - 1),
        Catalog(store, store / ".cache", demo=False, limits=UnpackLimits(size=WEIGHTS - 1)),
    ):
        with pytest.raises(ModelLoadFailed, match="unpacks to 1,000 bytes or more, and 999 are allowed"):
            prepare(catalog, "sd")


def test_the_cache_keeps_what_is_loaded_and_brings_back_what_it_dropped(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False, cache_bytes=2 * WEIGHTS)
    loaded: set[Path] = set()
    catalog.in_use = lambda: loaded
    first, second = prepare(catalog, "sd"), prepare(catalog, "team/lama")
    loaded.add(first.path)
    put_file(store / "third.mar")
    third = prepare(catalog, "third")
    assert not second.path.exists()
    assert not catalog.find("team/lama").version
    loaded.add(third.path)
    with pytest.raises(ModelLoadFailed, match="2,000 of the cache's 2,000 are in use; try again later"):
        prepare(catalog, "team/lama")
    loaded.clear()
    assert prepare(catalog, "team/lama") == second
    assert not first.path.exists()


def test_an_archive_that_was_found_before_it_was_dropped_is_unpacked_again(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False, cache_bytes=WEIGHTS)
    found = prepare(catalog, "sd")
    prepare(catalog, "team/lama")
    assert not found.path.exists()
    assert asyncio.run(catalog.prepare(found)) == found
    assert found.path.exists()


def test_nobody_gets_a_folder_that_another_unpacking_took_away(store: Path) -> None:
    """With room for one, each of many concurrent callers finds its folder there when it is told of it."""
    catalog = Catalog(store, store / ".cache", demo=False, cache_bytes=WEIGHTS)
    names = [f"m{number}" for number in range(4)]
    for name in names:
        put_file(store / f"{name}.mar")

    async def use(name: str) -> bool:
        return (await catalog.prepare(catalog.find(name))).path.exists()

    async def scenario() -> list[bool]:
        return await asyncio.gather(*(use(name) for name in names * 5))

    assert all(asyncio.run(scenario()))


def test_closing_ends_an_unpacking(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    catalog.close()
    with pytest.raises(EngineUnavailable, match="stopping"):
        prepare(catalog, "sd")
    assert list((store / ".cache").iterdir()) == []


def in_the_past(*folders: Path) -> None:
    """Old enough for their times to be trusted."""
    for folder in folders:
        os.utime(folder, ns=(0, 10**9))


def test_only_what_has_changed_is_read_again(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    in_the_past(store, store / "team")
    before = catalog.names()
    read: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: (read.append(str(path)), listdir(path))[1])
    catalog.names()
    read.clear()
    assert catalog.names() == before
    assert not any(Path(path) in (store, store / "team") for path in read)
    make_folder(store / "team" / "new")
    assert catalog.names() == sorted([*before, "team/new"])
    shutil.rmtree(store / "team" / "new")
    assert catalog.names() == before


def test_a_folder_becomes_an_archive_and_two_changes_at_once_are_both_seen(store: Path) -> None:
    catalog = Catalog(store, store / ".cache", demo=False)
    (store / "growing" / "MAR-INF").mkdir(parents=True)
    before = catalog.names()
    in_the_past(store, store / "growing")
    assert catalog.names() == before
    (store / "growing" / "MAR-INF" / "MANIFEST.json").write_text("{}")
    assert "growing" in catalog.names()
    for number in range(20):
        make_folder(store / f"quick{number}")
        assert f"quick{number}" in catalog.names()


def test_an_unknown_name_in_a_large_store_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(250):
        make_folder(tmp_path / f"m{number:03}")
    catalog = Catalog(tmp_path, tmp_path / ".cache", demo=False)
    catalog.names()
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail("a folder was read"))
    with pytest.raises(ModelNotFound, match=r"m000, .* and more"):
        catalog.find("x")
