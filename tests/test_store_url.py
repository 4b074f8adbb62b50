"""A store on a URL: what it holds is known here, each archive is fetched once, and nothing that it does is an error of
the server's."""

import asyncio
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fakes import FakeDevice, FakeHost, FakeTorchServe
from fastapi.testclient import TestClient
from serving import free_port, until
from test_unpack import tar_gz
from typer.testing import CliRunner
from web_store import WebStore

from serve import preflight, startup
from serve.archives import index as indexing
from serve.archives.commands import archives_app
from serve.cluster import node
from serve.doctor import store as doctor
from serve.doctor.finding import Status
from serve.engine import supervisor
from serve.errors import DiskFull, EngineUnavailable, ModelLoadFailed, ModelNotFound, ModelNotReady, StoreUnreachable
from serve.gateway.app import create_app
from serve.residency.memory import Memory
from serve.settings import Settings
from serve.store import identity, mirror, remote
from serve.store.catalog import Archive, Catalog
from serve.store.remote import INDEX
from serve.store.unpack import MANIFEST
from serve.store_url import StoreUrl, shown

SIZE = 3 << 20  # of an archive's weights


def packed(weights: bytes | None = None) -> bytes:
    return tar_gz([(MANIFEST, b"{}"), ("weights", os.urandom(SIZE) if weights is None else weights)])


@pytest.fixture
def web() -> Iterator[WebStore]:
    store = WebStore()
    store.put("sam.tar.gz", packed())
    yield store
    store.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "ASK_AGAIN", 0.0)
    monkeypatch.setattr(mirror, "FIRST_PAUSE", 0.001)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def catalog_of(web: WebStore | str, cache: Path) -> Catalog:
    return Catalog(StoreUrl.read(web if isinstance(web, str) else web.url), cache, demo=False)


def synced(web: WebStore | str, cache: Path) -> Catalog:
    catalog = catalog_of(web, cache)
    assert catalog.mirror
    catalog.mirror.sync()
    return catalog


def prepare(catalog: Catalog, name: str = "sam") -> Archive:
    return asyncio.run(catalog.prepare(catalog.find(name)))


def parts(cache: Path) -> list[Path]:
    return list(cache.glob(".stores/*/.copies/*/part"))


# What there is


def test_what_the_store_holds_is_looked_up_here(web: WebStore, cache: Path) -> None:
    web.put("team/own.mar", b"never asked for")
    web.put("notes.txt", b"")
    web.put("un--sayable.tar.gz", b"")
    web.put("../escape.tar.gz", b"")
    web.put("demo/sam.tar.gz", b"the demo archives are the server's own")
    web.put("x.tar.gz/y.tar.gz", b"a folder called as a file")
    catalog = synced(web, cache)
    assert catalog.names() == ["sam", "team/own"]
    assert {name for name, _ in web.asked} == {INDEX}
    del web.files["team/own.mar"]
    web.publish()
    assert catalog.mirror
    catalog.mirror.sync()
    assert catalog.names() == ["sam"]
    with pytest.raises(ModelNotFound, match=r"the store holds sam$"):
        catalog.find("team/own")
    assert not list(cache.rglob("team"))


def test_an_archive_is_fetched_once_and_its_version_is_that_of_its_file(web: WebStore, cache: Path) -> None:
    archive = prepare(synced(web, cache))
    assert (archive.path / "weights").stat().st_size == SIZE
    assert archive.version == hashlib.sha256(web.files["sam.tar.gz"]).hexdigest()[:12]
    assert prepare(synced(web, cache)) == archive
    shutil.rmtree(next(cache.glob(".stores/*")))
    (cache / ".versions").unlink(missing_ok=True)
    assert prepare(synced(web, cache)) == archive
    assert web.ranges_of("sam.tar.gz") == [""]
    assert not parts(cache)


def test_the_same_content_under_another_name_is_not_fetched_again(web: WebStore, cache: Path) -> None:
    catalog = synced(web, cache)
    first = prepare(catalog)
    web.put("copy.tar.gz", web.files["sam.tar.gz"])
    assert catalog.mirror
    catalog.mirror.sync()
    assert prepare(catalog, "copy").path == first.path
    assert web.ranges_of("copy.tar.gz") == []


def test_a_replaced_archive_is_another_version(web: WebStore, cache: Path) -> None:
    catalog = synced(web, cache)
    before = prepare(catalog)
    web.put("sam.tar.gz", packed())
    assert catalog.mirror
    catalog.mirror.sync()
    after = prepare(catalog)
    assert after.version == hashlib.sha256(web.files["sam.tar.gz"]).hexdigest()[:12] != before.version
    assert (before.path / MANIFEST).is_file()
    assert len(list(cache.glob(".stores/*/.copies/*"))) == 1  # what was known of the one before has gone


@pytest.mark.slow
def test_a_store_of_ten_thousand_costs_a_look_up_no_more_and_is_listed_once(
    web: WebStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[object] = []
    status = identity._status
    monkeypatch.setattr(identity, "_status", lambda *told: looks.append(told) or status(*told))
    few = synced(web, cache)
    few.find("sam")
    for_one = len(looks)
    web.publish(
        **{f"m{n:05}": {"name": f"team{n % 7}/m{n:05}.tar.gz", "size": 5, "sha256": f"{n:064x}"} for n in range(10_000)}
    )
    assert few.mirror
    few.mirror.sync()
    assert len(few.names()) == 10_001
    looks.clear()
    few.find("sam")
    assert len(looks) == for_one
    took: list[object] = []
    monkeypatch.setattr(few.mirror, "_take", took.append)
    few.mirror.sync()
    assert not took  # 304: nothing is read or written
    assert {name for name, _ in web.asked} == {INDEX}


def test_a_store_that_holds_too_much_or_makes_no_sense_changes_nothing(
    web: WebStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = synced(web, cache)
    assert catalog.mirror
    for content, reason in [
        (b"{", "JSON"),
        (b'{"archives": [{"name": 5}]}', "archives.0.name"),
        (json.dumps({"archives": [{"name": "a", "size": -1, "sha256": "0" * 64}]}).encode(), "archives.0.size"),
        (json.dumps({"archives": [{"name": "a", "size": 1}] * (remote.MOST_ARCHIVES + 1)}).encode(), "50000 items"),
        (b" " * (33 << 20), "33,554,432 bytes"),
    ]:
        web.files[INDEX] = content
        with pytest.raises(StoreUnreachable, match=reason):
            catalog.mirror.sync()
    assert catalog.names() == ["sam"]


# Fetching


def test_after_a_drop_only_the_rest_is_asked_for(web: WebStore, cache: Path) -> None:
    web.drop_after = [1 << 20, 1000]
    archive = prepare(synced(web, cache))
    assert (archive.path / "weights").stat().st_size == SIZE
    assert web.ranges_of("sam.tar.gz") == ["", f"bytes={1 << 20}-", f"bytes={(1 << 20) + 1000}-"]


def test_a_server_without_ranges_sends_all_of_it_again(web: WebStore, cache: Path) -> None:
    web.ranges, web.drop_after = False, [1 << 20, (1 << 20) + 5]
    assert (prepare(synced(web, cache)).path / "weights").stat().st_size == SIZE


def test_the_servers_end_ends_a_fetch_and_the_next_one_goes_on(web: WebStore, cache: Path) -> None:
    web.drop_after, web.stall = [1 << 20], True
    catalog = synced(web, cache)

    async def stopped() -> None:
        fetching = asyncio.create_task(catalog.prepare(catalog.find("sam")))
        await asyncio.to_thread(until, lambda: web.stalled.is_set() and parts(cache)[0].stat().st_size == 1 << 20)
        catalog.close()
        with pytest.raises(EngineUnavailable, match="stopping"):
            await fetching

    asyncio.run(stopped())
    web.stall = False
    assert (prepare(synced(web, cache)).path / "weights").stat().st_size == SIZE
    assert web.ranges_of("sam.tar.gz") == ["", f"bytes={1 << 20}-"]


def test_servers_that_share_the_cache_fetch_once(web: WebStore, cache: Path) -> None:
    servers = [synced(web, cache) for _ in range(3)]

    async def together() -> list[Archive]:
        return await asyncio.gather(*(each.prepare(each.find("sam")) for each in servers for _ in range(2)))

    assert len({archive.path for archive in asyncio.run(together())}) == 1
    assert web.ranges_of("sam.tar.gz") == [""]


def test_what_is_not_what_the_index_says_is_refused_and_not_fetched_again(web: WebStore, cache: Path) -> None:
    web.publish(**{"sam.tar.gz": {"sha256": "0" * 64}})
    catalog = synced(web, cache)
    for _ in range(2):
        with pytest.raises(ModelLoadFailed, match="should be 0000"):
            prepare(catalog)
    assert web.ranges_of("sam.tar.gz") == [""]
    assert not parts(cache)
    web.publish()  # put right, it is served
    assert catalog.mirror
    catalog.mirror.sync()
    prepare(catalog)


def test_a_beginning_of_something_else_is_fetched_anew(web: WebStore, cache: Path) -> None:
    catalog = synced(web, cache)
    assert catalog.mirror
    with catalog.mirror.copy(catalog.mirror.folder / "sam.tar.gz") as copy:
        copy.part.write_bytes(bytes(1000))
    prepare(catalog)
    assert web.ranges_of("sam.tar.gz") == ["bytes=1000-", ""]


def test_more_than_was_promised_is_not_taken(web: WebStore, cache: Path) -> None:
    web.excess = 100 << 20
    with pytest.raises(ModelLoadFailed, match="more than"):
        prepare(synced(web, cache))
    assert not parts(cache)


def test_less_than_was_promised_is_no_archive(web: WebStore, cache: Path) -> None:
    size = len(web.files["sam.tar.gz"])
    web.publish(**{"sam.tar.gz": {"size": size + 1}})
    with pytest.raises(StoreUnreachable, match=r"HTTP 416|ends too early"):
        prepare(synced(web, cache))
    assert len(web.ranges_of("sam.tar.gz")) <= 2 * mirror.TRIES


def test_what_cannot_fit_is_not_fetched(web: WebStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Catalog(StoreUrl.read(web.url), cache, demo=False, cache_bytes=1000)
    assert small.mirror
    small.mirror.sync()
    with pytest.raises(ModelLoadFailed, match="PALIMPSEST_CACHE_MIB"):
        prepare(small)
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskFull):
        prepare(synced(web, cache))
    assert web.ranges_of("sam.tar.gz") == []


def test_a_disk_that_fills_up_meanwhile_gets_its_room_back(
    web: WebStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(mirror.Mirror, "_receive", full)
    with pytest.raises(DiskFull):
        prepare(synced(web, cache))
    assert not parts(cache)


def test_few_unfinished_copies_are_kept(web: WebStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "TRIES", 1)
    for number in range(6):
        web.put(f"m{number}.tar.gz", packed())
    catalog = synced(web, cache)
    for number in range(6):
        web.drop_after = [1000, 0]
        with pytest.raises(StoreUnreachable):
            prepare(catalog, f"m{number}")
    assert len(parts(cache)) == mirror._PARTS + 1


def test_nobody_waits_for_longer_than_for_a_turn(web: WebStore, cache: Path) -> None:
    web.drop_after, web.stall = [1000], True
    catalog = synced(web, cache)
    catalog.patience = 0.05

    async def asked() -> None:
        with pytest.raises(ModelNotReady, match="fetched") as raised:
            await catalog.prepare(catalog.find("sam"))
        assert raised.value.retry_after
        catalog.close()

    asyncio.run(asked())


# Not reached


def test_what_is_here_is_served_while_the_store_is_away(web: WebStore, cache: Path) -> None:
    web.put("lama.tar.gz", packed())
    archive = prepare(synced(web, cache))
    web.status = 500
    catalog = catalog_of(web, cache)

    async def asked() -> None:
        assert await catalog.prepare(await catalog.look_up("sam")) == archive
        with pytest.raises(StoreUnreachable, match="HTTP 500 for lama") as raised:
            await catalog.prepare(await catalog.look_up("lama"))
        assert (raised.value.status, raised.value.headers()) == (503, {"Retry-After": "5"})
        with pytest.raises(StoreUnreachable, match="HTTP 500"):
            await catalog.look_up("new")
        web.status = 0
        assert await catalog.prepare(await catalog.look_up("lama"))
        with pytest.raises(ModelNotFound):
            await catalog.look_up("new")

    asyncio.run(asked())


def test_nobody_makes_the_server_ask_all_the_time(web: WebStore, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "ASK_AGAIN", 60.0)
    catalog = catalog_of(web, cache)

    async def asked() -> None:
        for _ in range(10):
            results = await asyncio.gather(*(catalog.look_up(f"x{n}") for n in range(20)), return_exceptions=True)
            assert all(isinstance(each, ModelNotFound) for each in results)

    asyncio.run(asked())
    assert web.asked == [(INDEX, "")]


def test_the_server_keeps_up_with_the_store(
    web: WebStore, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(mirror, "LOOK_AT_LEAST_EVERY", 0.02)
    caplog.set_level(logging.INFO)
    catalog = catalog_of(web, cache)

    async def followed() -> None:
        following = asyncio.create_task(catalog.follow())
        for change, seen in [
            (lambda: None, lambda: catalog.names() == ["sam"]),
            (lambda: web.put("new.tar.gz", b""), lambda: catalog.names() == ["new", "sam"]),
            (lambda: setattr(web, "status", 503), lambda: "HTTP 503" in caplog.text),
            (lambda: setattr(web, "status", 0), lambda: "reached again" in caplog.text),
        ]:
            change()
            await asyncio.to_thread(until, seen)
        following.cancel()

    asyncio.run(followed())
    assert caplog.text.count("HTTP 503") == 1


# The whole server


@contextmanager
def serving(web: WebStore | str, tmp_path: Path) -> Iterator[tuple[TestClient, FakeTorchServe]]:
    fake, url = FakeTorchServe(), StoreUrl.read(web if isinstance(web, str) else web.url)
    settings = Settings(store=url, state=tmp_path / "state", cache=tmp_path / "cache", models="full")
    memory = Memory(FakeDevice(), 2**40, tmp_path / "footprints.json", 0)
    application = create_app(settings, startup.catalog_of(settings, lambda text: None), FakeHost(fake), memory)
    with TestClient(application, raise_server_exceptions=False) as client:
        yield client, fake


def test_a_request_has_its_model_fetched_and_loaded(web: WebStore, tmp_path: Path) -> None:
    with serving(web, tmp_path) as (client, fake):
        assert client.post("/predictions/sam", content=b"x").content == b"png"
        assert client.post("/predictions/sam/1.0", content=b"x").content == b"png"
        assert client.get("/v1/models").json()["models"][0]["name"] == "sam"
        assert client.post("/predictions/new", content=b"x").status_code == 404
        web.put("new.tar.gz", packed())
        assert client.post("/predictions/new", content=b"x").content == b"png"
        loaded = client.post("/models", json={"model_name": "hash", "url": "sam"})
        assert loaded.status_code == 200, loaded.text
        web.put("sam.tar.gz", b"no archive")
        web.put("other.tar.gz", b"")
        assert client.get("/v1/models/other").status_code == 200  # the look-up has noticed both
        answer = client.post("/predictions/sam", content=b"x")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "load_failed")
    assert sum("POST /models" in path for path in fake.paths()) == 2


def test_a_store_that_was_never_reached_is_a_503_that_says_when_to_try_again(tmp_path: Path) -> None:
    with serving(f"http://127.0.0.1:{free_port()}/store", tmp_path) as (client, _):
        answer = client.post("/predictions/sam", content=b"x")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert answer.json()["error"]["code"] == "store_unreachable"
        assert client.get("/v1/models").json()["models"] == []


def test_nothing_secret_is_ever_shown(
    web: WebStore, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    url = f"http://me:hunter2@127.0.0.1:{web.port}/store?X-Amz-Signature=c0ffee"
    said: list[str] = []
    with serving(url, tmp_path) as (client, _):
        assert client.post("/predictions/sam", content=b"x").status_code == 200
        web.put("lama.tar.gz", b"")
        assert client.get("/v1/models/lama").status_code == 200
        web.status = 403
        for path in ("/v1/models/lama/load", "/v1/models/gone/load"):
            said.append(client.post(path).text)
        said += [client.get(path).text for path in ("/v1/state", "/v1/models", "/metrics", "/models")]
        said.append(client.post("/models", json={"model_name": "x", "url": "/etc/passwd"}).text)
    settings = Settings(store=url, cache=tmp_path / "cache")
    said += [repr(settings), str(settings.store), repr(list(doctor.archives(settings)))]
    monkeypatch.setenv("PALIMPSEST_STORE", url.replace("http", "ftp"))
    with pytest.raises(preflight.Unusable) as raised:
        preflight.read_settings()
    said += [
        str(raised.value),
        CliRunner().invoke(archives_app, ["list"]).output,
        caplog.text,
        str(list(tmp_path.rglob("*"))),
    ]
    for secret in ("hunter2", "c0ffee"):
        assert not [text for text in said if secret in text]
    assert any("HTTP 403" in text for text in said)
    assert web.queries == {"X-Amz-Signature=c0ffee"}
    assert web.credentials == {"Basic bWU6aHVudGVyMg=="}


def test_workers_do_not_inherit_the_stores_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_STORE", "https://u:hunter2@h/x")
    assert "hunter2" not in str(supervisor.inherited())


def test_boxes_of_a_cluster_get_all_of_the_address(tmp_path: Path) -> None:
    settings = Settings(store="https://u:hunter2@h/x?s=1", state=tmp_path)
    assert node.environment(settings, tmp_path / "token")["PALIMPSEST_STORE"] == "https://u:hunter2@h/x?s=1"
    assert "hunter2" not in settings.model_dump_json()


# Settings


@pytest.mark.parametrize(
    "text", ["ftp://h/x", "file:///x", "https://", "https:///x", "http://h:99999/", "http://[/", "https://h/a b",
             "https://h/x#y", "s3://key:secret@bucket/x", "gs://b/x?y=1", "https://h/\n"],
)  # fmt: skip
def test_what_is_no_address_of_a_store_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_STORE", text)
    with pytest.raises(preflight.Unusable, match="PALIMPSEST_STORE: ") as raised:
        preflight.read_settings()
    assert "secret" not in str(raised.value)


def test_what_is_secret_in_a_url_is_not_shown() -> None:
    assert shown("https://u:p@h:1/a?b#c") == "https://h:1/a"
    assert shown("https://u:p@ss/w@h/a") == "https://h/a"
    assert shown("plain?text@x") == "plain?text@x"


def test_a_bucket_needs_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(preflight.Unusable, match="PALIMPSEST_STORE=s3://b/x needs s3fs: pip install s3fs"):
        preflight.require_store(Settings(store="s3://b/x", cache=tmp_path))


def test_the_demo_set_is_built_where_the_store_has_no_full_one(
    web: WebStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    monkeypatch.setattr(startup.build, "ensure_demo", lambda folder, say: built.append(folder))
    settings = Settings(store=web.url, cache=tmp_path / "cache", models="auto")
    said: list[str] = []
    catalog = startup.catalog_of(settings, said.append)
    assert built == [catalog.folder]
    assert f"{web.url} has no lama, sd" in said[-1]
    for name in ("lama", "sd"):
        web.put(f"{name}.tar.gz", b"")
    startup.catalog_of(settings, said.append)
    assert "full" in said[-1]
    startup.catalog_of(settings.model_copy(update={"models": "demo"}), said.append)
    assert built == [catalog.folder] * 2


def test_a_store_that_is_away_at_the_start_is_said(tmp_path: Path) -> None:
    settings = Settings(store=f"http://127.0.0.1:{free_port()}/x", cache=tmp_path / "cache", models="auto")
    said: list[str] = []
    startup.catalog_of(settings, said.append)
    assert "cannot be connected to" in said[0]
    assert "503" in said[0]
    (finding, *_) = doctor.archives(settings)
    assert finding.status is Status.PROBLEM


# The index


def test_a_folder_with_an_index_is_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = tmp_path / "folder", []
    (folder / "team").mkdir(parents=True)
    (folder / ".build-1").mkdir()
    for name in ("sam.tar.gz", "team/own.mar", "notes.txt", ".build-1/x.tar.gz"):
        (folder / name).write_bytes(name.encode())
    sha256_of = indexing.sha256_of
    monkeypatch.setattr(
        indexing, "sha256_of", lambda file, progress: read.append(file.name) or sha256_of(file, progress)
    )

    def index() -> dict[str, Any]:
        result = CliRunner().invoke(archives_app, ["index", str(folder)])
        assert result.exit_code == 0, result.output
        return {each["name"]: each for each in json.loads((folder / INDEX).read_text())["archives"]}

    assert index()["sam.tar.gz"] == {
        "name": "sam.tar.gz", "size": 10, "sha256": hashlib.sha256(b"sam.tar.gz").hexdigest()
    }  # fmt: skip
    assert index().keys() == {"sam.tar.gz", "team/own.mar"}
    assert read == ["sam.tar.gz", "own.mar"]
    stat = (folder / "sam.tar.gz").stat()
    (folder / "sam.tar.gz").write_bytes(b"SAM.tar.gz")
    os.utime(folder / "sam.tar.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert index()["sam.tar.gz"]["sha256"] == hashlib.sha256(b"SAM.tar.gz").hexdigest()
    assert list(folder.glob(f".{INDEX}*")) == []


@pytest.mark.parametrize("command", [["build"], ["list"], ["export", "sam", "--format", "mar"]])
def test_nothing_is_built_or_exported_on_a_url(command: list[str]) -> None:
    result = CliRunner().invoke(archives_app, [*command, "--store", "https://u:hunter2@host/x"])
    assert result.exit_code == 2
    assert "https://host/x is on a URL" in " ".join(result.output.replace("│", " ").split())


# Buckets


class Bucket:
    """What fsspec's file systems of buckets have in common, on a loop of their own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.objects: dict[str, bytes] = {}
        self.reads: list[tuple[int, int]] = []
        self.fails: list[Exception] = []
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    async def _find(self, path: str, detail: bool) -> dict[str, dict[str, Any]]:
        self._fail()
        return {key: await self._info(key) for key in self.objects if key.startswith(f"{path}/")}

    async def _ls(self, path: str) -> list[str]:
        if not any(key.startswith(f"{path}/") for key in self.objects):
            raise FileNotFoundError(path)
        return []

    async def _info(self, path: str) -> dict[str, Any]:
        content = self.objects[path]
        return {"size": len(content), "ETag": hashlib.md5(content).hexdigest()}

    async def _cat_file(self, path: str, start: int, end: int) -> bytes:
        self._fail()
        self.reads.append((start, end))
        return self.objects[path][start:end]

    def _fail(self) -> None:
        if self.fails:
            raise self.fails.pop(0)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    made = Bucket()
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: made)
    monkeypatch.setattr(remote, "_BUCKET_CHUNK", 1 << 20)
    yield made
    made.close()


def test_a_bucket_is_a_store(bucket: Bucket, cache: Path) -> None:
    content = packed()
    bucket.objects = {"b/folder/team/sam.tar.gz": content, "b/folder/notes": b"", "b/other.tar.gz": b""}
    catalog = synced("s3://b/folder/", cache)
    assert catalog.names() == ["team/sam"]
    archive = prepare(catalog, "team/sam")
    assert archive.version == hashlib.sha256(content).hexdigest()[:12]
    reads = list(bucket.reads)
    assert [end for _, end in reads] == [start for start, _ in reads[1:]] + [len(content)]
    servers = [catalog_of("s3://b/folder", cache) for _ in range(2)]
    (cache / ".versions").unlink(missing_ok=True)
    assert [prepare(each, "team/sam") for each in servers] == [archive] * 2
    assert bucket.reads == reads
    bucket.objects["b/folder/team/sam.tar.gz"] = packed()
    assert catalog.mirror
    catalog.mirror.sync()
    assert prepare(catalog, "team/sam").version != archive.version


def test_a_bucket_that_fails_for_a_moment_is_asked_again(bucket: Bucket, cache: Path) -> None:
    bucket.objects = {"b/sam.tar.gz": packed()}
    catalog = synced("gs://b", cache)
    bucket.fails = [PermissionError("Slow down")] * (mirror.TRIES - 1)
    prepare(catalog)
    assert bucket.reads[0][0] == 0


def test_a_bucket_that_is_not_there_is_no_empty_store(bucket: Bucket, cache: Path) -> None:
    bucket.objects = {"b/sam.tar.gz": packed()}
    catalog = synced("s3://b", cache)
    bucket.objects = {}
    assert catalog.mirror
    with pytest.raises(StoreUnreachable, match="FileNotFoundError"):
        catalog.mirror.sync()
    assert catalog.names() == ["sam"]


def test_an_object_that_is_replaced_while_it_is_fetched_is_not_served(bucket: Bucket, cache: Path) -> None:
    old, new = packed(), packed()
    bucket.objects = {"b/sam.tar.gz": old}
    catalog = synced("s3://b", cache)
    read = bucket._cat_file

    async def replaced(path: str, start: int, end: int) -> bytes:
        bucket.objects[path] = old if end < len(old) else new
        return await read(path, start, end)

    bucket._cat_file = replaced  # type: ignore[method-assign]
    with pytest.raises(StoreUnreachable, match=r"replaced while|ends too early"):
        prepare(catalog)
    bucket._cat_file = read  # type: ignore[method-assign]
    assert catalog.mirror
    catalog.mirror.sync()
    assert prepare(catalog).version == hashlib.sha256(new).hexdigest()[:12]
