"""Packed archives from anywhere become folders below one folder, or a clear refusal; and the cache of them."""

import errno
import gzip
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.archives.export import Format, export
from serve.store import cache as caching
from serve.store import unpack as module
from serve.store.cache import Cache, CacheFull
from serve.store.locks import Stopped
from serve.store.unpack import MANIFEST, InvalidArchive, UnpackLimits, unpack

ROOT = Path(__file__).parent.parent
LIMITS = UnpackLimits(entries=50, size=10_000_000, ratio=100, ratio_from=1_000_000)
FILES = {
    MANIFEST: b"{}",
    "handler.py": b"pass",
    "handlers/worker/base.py": b"",
    "weights.safetensors": os.urandom(100_000),
}


# Files to unpack. Entries are (name, content); a TarInfo or ZipInfo in place of the name says more.


def tar_gz(entries: list[tuple[Any, bytes]], **options: Any) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1, **options) as tar:
        for name, content in entries:
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def mar(entries: list[tuple[Any, bytes]]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def with_manifest(*entries: tuple[Any, bytes]) -> list[tuple[Any, bytes]]:
    return [(MANIFEST, b"{}"), *entries]


def special(kind: bytes, name: str = "extra", link: str = "handler.py") -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry, b""


def zip_special(mode: int) -> tuple[zipfile.ZipInfo, bytes]:
    entry = zipfile.ZipInfo("extra")
    entry.create_system, entry.external_attr = 3, mode << 16
    return entry, b"/etc/passwd"


def unpack_bytes(packed: bytes, out: Path, limits: UnpackLimits = LIMITS) -> Path:
    out.mkdir()
    return unpack(io.BytesIO(packed), out, limits).root


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An archive folder as the builder makes it."""
    folder = tmp_path / "built" / "sam"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@contextmanager
def no_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda size: None


# What is accepted


def by_export_tar(folder: Path, out: Path) -> None:
    export(folder, Format.TAR_GZ, out, no_progress)


def by_export_mar(folder: Path, out: Path) -> None:
    export(folder, Format.MAR, out, no_progress)


def by_tar_of_the_folder(folder: Path, out: Path) -> None:
    subprocess.run(["tar", "czf", out, "."], cwd=folder, check=True)


def by_tar_from_above(folder: Path, out: Path) -> None:
    subprocess.run(["tar", "czf", out, folder.name], cwd=folder.parent, check=True)


def by_tar_of_its_children(folder: Path, out: Path) -> None:
    subprocess.run(["tar", "czf", out, *os.listdir(folder)], cwd=folder, check=True)


def by_tar_on_macos(folder: Path, out: Path) -> None:
    (folder.parent / "._sam").write_bytes(b"resource fork")
    subprocess.run(["tar", "czf", out, "._sam", folder.name], cwd=folder.parent, check=True)


PACKERS = [
    by_export_tar,
    by_export_mar,
    by_tar_of_the_folder,
    by_tar_from_above,
    by_tar_of_its_children,
    by_tar_on_macos,
]


@pytest.mark.slow
@pytest.mark.parametrize("pack", PACKERS)
def test_every_way_to_pack_an_archive_gives_the_same_folder(
    archive: Path, tmp_path: Path, pack: Callable[[Path, Path], None]
) -> None:
    pack(archive, tmp_path / "packed")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "packed", "rb") as file:
        root, size = unpack(file, tmp_path / "out", LIMITS)
    found = content(root)
    if pack in (by_export_tar, by_export_mar):  # they say what their code needs elsewhere
        assert json.loads(found.pop(MANIFEST))["model"]["requirementsFile"] in found
        found |= {MANIFEST: FILES[MANIFEST]}
        del found["requirements.txt"]
    assert found == FILES
    assert size >= sum(map(len, FILES.values()))


@pytest.mark.parametrize(("file_format", "suffix"), [("tgz", ".tar.gz"), ("default", ".mar"), ("zip-store", ".mar")])
def test_what_torch_model_archiver_packs_is_unpacked(tmp_path: Path, file_format: str, suffix: str) -> None:
    (tmp_path / "handler.py").write_text("pass")
    command = [sys.executable, "-P", "-m", "model_archiver.model_packaging", "--model-name", "own", "--version", "1.0"]
    command += ["--handler", "handler.py", "--archive-format", file_format]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    root = unpack_bytes((tmp_path / f"own{suffix}").read_bytes(), tmp_path / "out")
    assert content(root).keys() == {MANIFEST, "handler.py"}


def test_modes_and_owners_are_ours(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("tool")
    entry.mode, entry.uid = 0o6777, 12345
    root = unpack_bytes(tar_gz(with_manifest((entry, b"#!/bin/sh"))), tmp_path / "out")
    status = (root / "tool").stat()
    assert status.st_uid == os.getuid()
    assert status.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX | 0o111) == 0


def test_long_and_foreign_names_are_kept(tmp_path: Path) -> None:
    name = "dossier/" + "é" * 100 + ".json"
    for number, packed in enumerate((tar_gz(with_manifest((name, b"1"))), mar(with_manifest((name, b"1"))))):
        assert content(unpack_bytes(packed, tmp_path / str(number)))[name] == b"1"


# What is refused

NAMES = ["/etc/x", "../x", "a/../../x", "..", "a\\..\\x", "a\nb", "a\x1bb", "n" * 256, "d/" * 33 + "x", "n/" * 600]


@pytest.mark.parametrize("pack", [tar_gz, mar])
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:10]))
def test_names_that_lead_elsewhere_are_refused(
    tmp_path: Path, pack: Callable[[list[tuple[Any, bytes]]], bytes], name: str
) -> None:
    with pytest.raises(InvalidArchive, match="it holds"):
        unpack_bytes(pack(with_manifest((name, b""))), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_name_that_hides_its_end_behind_a_nul_is_refused(tmp_path: Path) -> None:
    packed = mar(with_manifest(("handlerX.py", b"")))
    with pytest.raises(InvalidArchive, match="unprintable"):
        unpack_bytes(packed.replace(b"handlerX", b"handler\0"), tmp_path / "out")


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (special(tarfile.SYMTYPE), "symbolic link"),
        (special(tarfile.SYMTYPE, link="/etc"), "symbolic link"),
        (special(tarfile.LNKTYPE), "hard link"),
        (special(tarfile.CHRTYPE), "device"),
        (special(tarfile.BLKTYPE), "device"),
        (special(tarfile.FIFOTYPE), "pipe"),
        (special(b"Z"), "neither a file nor a folder"),
    ],
)
def test_a_tar_holds_only_files_and_folders(tmp_path: Path, entry: tuple[Any, bytes], kind: str) -> None:
    with pytest.raises(InvalidArchive, match=kind):
        unpack_bytes(tar_gz(with_manifest(entry)), tmp_path / "out")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_zip_holds_only_files_and_folders(tmp_path: Path, mode: int) -> None:
    with pytest.raises(InvalidArchive, match="a link, a device or a pipe"):
        unpack_bytes(mar(with_manifest(zip_special(mode | 0o777))), tmp_path / "out")


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", "czSf", tmp_path / "packed", "hole"], cwd=tmp_path, check=True)
    with pytest.raises(InvalidArchive, match="sparse"):
        unpack_bytes((tmp_path / "packed").read_bytes(), tmp_path / "out")


def test_an_encrypted_or_exotic_zip_entry_is_refused(tmp_path: Path) -> None:
    packed = bytearray(mar([(MANIFEST, b"{}")]))
    packed[packed.index(b"PK\x01\x02") + 8] |= 1  # general purpose flags in the central directory
    with pytest.raises(InvalidArchive, match="encrypted"):
        unpack_bytes(bytes(packed), tmp_path / "encrypted")
    exotic = io.BytesIO()
    with zipfile.ZipFile(exotic, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr(MANIFEST, b"{}")
    with pytest.raises(InvalidArchive, match="unusual"):
        unpack_bytes(exotic.getvalue(), tmp_path / "exotic")


@pytest.mark.parametrize(
    "names",
    [
        ("handler.py", "handler.py"),
        ("handler.py", "./handler.py"),
        ("handler.py", "Handler.py"),
        ("stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("a", "a/b"),
        ("a/b", "a"),
        ("lib/x", "LIB/y"),
        (MANIFEST, MANIFEST.lower()),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_nothing_is_written_twice_not_even_where_case_does_not_count(tmp_path: Path, names: tuple[str, str]) -> None:
    entries: list[tuple[Any, bytes]] = [(name, b"") for name in names]
    for number, packed in enumerate((tar_gz(entries), mar(entries))):
        with pytest.raises(InvalidArchive, match=r"twice|both"):
            unpack_bytes(packed, tmp_path / str(number))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_folder_may_be_named_again(tmp_path: Path) -> None:
    packed = mar([("lib/", b""), ("lib/x", b"1"), ("lib/", b""), (MANIFEST, b"{}")])
    assert content(unpack_bytes(packed, tmp_path / "out")) == {"lib/x": b"1", MANIFEST: b"{}"}


@pytest.mark.parametrize("pack", [tar_gz, mar])
class TestLimits:
    def test_entries(self, tmp_path: Path, pack: Callable[[list[tuple[Any, bytes]]], bytes]) -> None:
        for number, name in enumerate(("{}", "{}/", "{0}/{0}/{0}")):
            packed = pack(with_manifest(*((name.format(i), b"") for i in range(LIMITS.entries))))
            with pytest.raises(InvalidArchive, match="more than 50 files and folders"):
                unpack_bytes(packed, tmp_path / str(number))

    def test_size(self, tmp_path: Path, pack: Callable[[list[tuple[Any, bytes]]], bytes]) -> None:
        packed = pack(with_manifest(*((f"w{i}", os.urandom(1000)) for i in range(10))))
        with pytest.raises(InvalidArchive, match="unpacks to 9,002 bytes or more, and 9,000 are allowed"):
            unpack_bytes(packed, tmp_path / "out", UnpackLimits(size=9000))

    def test_ratio(self, tmp_path: Path, pack: Callable[[list[tuple[Any, bytes]]], bytes]) -> None:
        packed = pack(with_manifest(("bomb", bytes(5_000_000))))
        with pytest.raises(InvalidArchive, match="no weights do"):
            unpack_bytes(packed, tmp_path / "out")
        assert content(tmp_path / "out").keys() == {MANIFEST}
        unpack_bytes(packed, tmp_path / "small", UnpackLimits(ratio_from=6_000_000))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_header_that_fills_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    header, _ = special(kind)
    packed = tar_gz([(header, bytes(20_000_000)), (MANIFEST, b"{}")])
    with pytest.raises(InvalidArchive, match="absurd size"):
        unpack_bytes(packed, tmp_path / "out")


def test_headers_within_headers_end(tmp_path: Path) -> None:
    header = special(tarfile.GNUTYPE_LONGNAME)[0].tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(InvalidArchive):
        unpack_bytes(gzip.compress(header * 100_000), tmp_path / "out")


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (b"", "no gzipped tar or zip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no gzipped tar or zip"),
        (gzip.compress(b"not a tar" * 1000), "no gzipped tar or zip"),
        (gzip.compress(b""), "no gzipped tar or zip"),
        (tar_gz([]), "holds no MAR-INF/MANIFEST.json"),
        (tar_gz([("handler.py", b"")]), "holds no MAR-INF/MANIFEST.json"),
        (tar_gz([("a/" + MANIFEST, b"{}"), ("b/x", b"")]), "holds no MAR-INF/MANIFEST.json"),
        (tar_gz([("a/b/" + MANIFEST, b"{}")]), "holds no MAR-INF/MANIFEST.json"),
        (tar_gz([special(tarfile.DIRTYPE, MANIFEST)]), "holds no MAR-INF/MANIFEST.json"),
        (mar([("handler.py", b"")]), "holds no MAR-INF/MANIFEST.json"),
        (tar_gz([(".", b"")]), "top"),
    ],
    # The bytes have the time of day in them: workers of one run would not agree on the tests' names.
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_archive_says_so(tmp_path: Path, packed: bytes, why: str) -> None:
    with pytest.raises(InvalidArchive, match=why):
        unpack_bytes(packed, tmp_path / "out")


@pytest.mark.parametrize("pack", [tar_gz, mar])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, pack: Callable[[list[tuple[Any, bytes]]], bytes]) -> None:
    packed = pack(with_manifest(("weights", os.urandom(5000))))
    for end in [*range(0, len(packed) - 1, 97), len(packed) - 1]:
        with pytest.raises(InvalidArchive, match="copied"):
            unpack_bytes(packed[:end], tmp_path / str(end))


@pytest.mark.parametrize("pack", [tar_gz, mar])
def test_a_flipped_bit_in_the_weights_is_noticed(
    tmp_path: Path, pack: Callable[[list[tuple[Any, bytes]]], bytes]
) -> None:
    packed = bytearray(pack(with_manifest(("weights", os.urandom(5000)))))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(InvalidArchive):
        unpack_bytes(bytes(packed), tmp_path / "out")


def test_the_checksum_of_a_tar_counts_however_much_padding_comes_before_it(tmp_path: Path) -> None:
    tar = gzip.decompress(tar_gz(with_manifest())) + bytes(1_000_000)
    packed = bytearray(gzip.compress(tar))
    packed[-8] ^= 1
    with pytest.raises(InvalidArchive, match="CRC"):
        unpack_bytes(bytes(packed), tmp_path / "out")


# Names end at a NUL in both formats, and one that ends in a slash is a folder's.
FILE_NAME = (st.text(min_size=1, max_size=20) | st.text("./\\a", min_size=1, max_size=12)).filter(
    lambda name: "\0" not in name and not name.endswith("/")
)


@pytest.mark.slow
@settings(deadline=None)
@given(names=st.lists(FILE_NAME, max_size=4), zipped=st.booleans())
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_whatever_the_names_nothing_leaves_the_folder(names: list[str], zipped: bool) -> None:
    entries: list[tuple[Any, bytes]] = [(MANIFEST, b"{}"), *((name, b"x") for name in names)]
    try:
        packed = mar(entries) if zipped else tar_gz(entries, errors="surrogateescape")
    except ValueError:
        return  # surrogates, which no packer writes
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "in" / "out"
        out.parent.mkdir()
        try:
            unpack_bytes(packed, out)
        except InvalidArchive:
            pass
        else:
            assert len(content(out)) == len(names) + 1
        assert list(Path(folder).iterdir()) == [out.parent]
        assert list(out.parent.iterdir()) == [out]


SOUND = {
    "tar": gzip.decompress(tar_gz(with_manifest(("lib/x", b"1" * 600)), format=tarfile.PAX_FORMAT)),
    "zip": mar(with_manifest(("lib/x", b"1" * 600))),
}


@pytest.mark.slow
@settings(deadline=None)
@given(kind=st.sampled_from(sorted(SOUND)), flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), max_size=8))
def test_damage_of_any_kind_ends_in_a_refusal_or_a_whole_archive(kind: str, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(SOUND[kind])
    for position, value in flips:
        damaged[position % len(damaged)] ^= value
    with tempfile.TemporaryDirectory() as folder:
        try:
            packed = gzip.compress(damaged) if kind == "tar" else bytes(damaged)
            assert (unpack_bytes(packed, Path(folder) / "out") / MANIFEST).is_file()
        except InvalidArchive:
            pass
        assert [path.name for path in Path(folder).iterdir()] == ["out"]


# The cache


def put(cache: Cache, path: Path, in_use: set[Path] = frozenset()) -> Path:  # type: ignore[assignment]
    staged = cache.stage(path)
    try:
        cache.admit(staged, in_use)
    finally:
        staged.cleanup.close()
    return cache.entry(staged.digest)


@pytest.fixture
def packed(tmp_path: Path) -> Callable[[str, int], Path]:
    """Makes an archive file of which the unpacked files have the given size."""

    def make(name: str, size: int) -> Path:
        path = tmp_path / name
        path.write_bytes(tar_gz([(MANIFEST, b"{}"), ("weights", os.urandom(size - 2))]))
        return path

    return make


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_longest_unused_entries_make_room(tmp_path: Path, packed: Callable[[str, int], Path]) -> None:
    cache = Cache(tmp_path / "cache", 1000, LIMITS)
    first, second, third = (put(cache, packed(name, 300)) for name in ("first", "second", "third"))
    assert cache.hold(first)
    fourth = put(cache, packed("fourth", 400))
    assert names(tmp_path / "cache") == {path.name for path in (first, third, fourth)}
    assert not cache.hold(second)
    # Another process later knows the order, too.
    fifth = put(Cache(tmp_path / "cache", 1000, LIMITS), packed("fifth", 600))
    assert names(tmp_path / "cache") == {fourth.name, fifth.name}


def test_what_is_in_use_stays_and_is_counted(tmp_path: Path, packed: Callable[[str, int], Path]) -> None:
    cache = Cache(tmp_path / "cache", 1000, LIMITS)
    first = put(cache, packed("first", 400))
    second = put(cache, packed("second", 400), in_use={first})
    third = put(cache, packed("third", 400), in_use={first})
    assert names(tmp_path / "cache") == {first.name, third.name}
    with pytest.raises(CacheFull, match="needs 700 bytes, and 400 of the cache's 1,000 are in use"):
        put(cache, packed("fourth", 700), in_use={first})
    assert names(tmp_path / "cache") == {first.name, third.name}
    assert second.name not in names(tmp_path / "cache")


def test_an_archive_beyond_the_bound_is_refused_with_its_numbers_and_costs_no_other_its_place(
    tmp_path: Path, packed: Callable[[str, int], Path]
) -> None:
    cache = Cache(tmp_path / "cache", 1000, LIMITS)
    entry = put(cache, packed("small", 900))
    with pytest.raises(InvalidArchive, match="unpacks to 1,001 bytes or more, and 1,000 are allowed"):
        put(cache, packed("large", 1001))
    assert names(tmp_path / "cache") == {entry.name}


def test_the_same_content_is_unpacked_once_under_any_name(
    tmp_path: Path, packed: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", 1000, LIMITS)
    path = packed("one", 300)
    entry = put(cache, path)
    (tmp_path / "copy").write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "unpack", lambda *arguments: pytest.fail("unpacked again"))
    os.utime(entry, ns=(0, 0))
    assert put(cache, tmp_path / "copy") == entry
    assert entry.stat().st_mtime_ns > 0, "that was a use"


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, packed: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed("one", 300)
    real = caching.unpack

    def unpack_while_it_grows(*arguments: Any) -> Any:
        with open(path, "ab") as file:
            file.write(b"\0")
        return real(*arguments)

    monkeypatch.setattr(caching, "unpack", unpack_while_it_grows)
    with pytest.raises(InvalidArchive, match="changed while it was read"):
        put(Cache(tmp_path / "cache", 1000, LIMITS), path)
    assert names(tmp_path / "cache") == set()


def test_a_killed_unpacking_leaves_only_what_the_next_one_sweeps(
    tmp_path: Path, packed: Callable[[str, int], Path]
) -> None:
    path = packed("large", 3_000_000)
    # The kernel kills a process whose file grows beyond the limit: in the middle of writing the weights.
    script = """if True:
        import resource, signal, sys
        from pathlib import Path
        from serve.store.cache import Cache
        from serve.store.unpack import UnpackLimits
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        Cache(Path(sys.argv[1]), 10_000_000, UnpackLimits()).stage(Path(sys.argv[2]))
    """
    died = subprocess.run([sys.executable, "-c", script, tmp_path / "cache", path], cwd=ROOT, check=False)
    assert died.returncode == -signal.SIGXFSZ
    (left,) = names(tmp_path / "cache")
    assert left.startswith(".unpack-")
    entry = put(Cache(tmp_path / "cache", 10_000_000, LIMITS), path)
    assert names(tmp_path / "cache") == {entry.name}
    assert (entry / "weights").stat().st_size == 3_000_000 - 2


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk of 2 MB; where that can't be mounted, one to which a write of more fails."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs"]
    if os.getuid() == 0 and subprocess.run(["mount", *options, folder], capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", folder], check=True)  # its entry is held
        return

    def write(tree: Any, content: Any, file: Any, size: int) -> None:
        if size > 2_000_000:
            file.write(content.read(2_000_000))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(content.read(size))

    monkeypatch.setattr(module._Tree, "_copy", write)
    yield folder


def test_a_full_disk_disturbs_nothing(small_disk: Path, packed: Callable[[str, int], Path]) -> None:
    cache = Cache(small_disk / "cache", 10_000_000, LIMITS)
    entry = put(cache, packed("small", 100_000))
    with pytest.raises(OSError, match="No space left"):
        put(cache, packed("large", 3_000_000))
    assert names(small_disk / "cache") == {entry.name}
    put(cache, packed("other", 1_000_000))


def test_a_server_that_ends_need_not_wait_for_an_unpacking(tmp_path: Path, packed: Callable[[str, int], Path]) -> None:
    stopped = threading.Event()
    stopped.set()
    cache = Cache(tmp_path / "cache", 1000, LIMITS, stopped)
    with pytest.raises(Stopped):
        put(cache, packed("one", 300))
    with pytest.raises(Stopped):
        unpack(io.BytesIO(tar_gz(with_manifest())), tmp_path / "cache", LIMITS, lambda: True)
    assert not any(name.startswith(".unpack-") for name in names(tmp_path / "cache"))
