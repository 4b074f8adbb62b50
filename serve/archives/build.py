"""Builds archives: directories in TorchServe's no-archive layout, each put into the store in one step.

STORE/<name>/        full-size        MAR-INF/MANIFEST.json  handler.py  model-config.yaml
STORE/demo/<name>/   tiny             handlers/ (only what this model runs)  contract/  checkpoint files
"""

import hashlib
import json
import os
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from py_compile import PycInvalidationMode
from typing import Any

from handlers.building.files import ProgressBar, copy
from serve.archives.weights import File, Published, SearchFolders, default_names, obtain, read_weights
from serve.descriptions import HANDLERS, descriptions
from serve.store.digests import RECORD, recorded, to_record
from serve.store.publish import Report, replace_directory, staging_folder

CONTRACT = HANDLERS.parent / "contract"
# Of a model's own files, and what they share: they make checkpoints, and run in no archive.
BUILD_TIME_CODE = {"convert.py", "random_weights.py"}
BUILDING = "building"
CHECKPOINT_SUFFIXES = {".yaml", ".json", ".txt", ".safetensors"}
MODEL_CONFIG = "model-config.yaml"
MODEL_VERSION = "1.0"
# Raise it when a converter writes something else than before: archives in stores are then converted anew.
CHECKPOINT_FORMAT = 1
RANDOM_WEIGHTS_SEED = 0
TOOL_TIMEOUT = 600.0  # seconds for the archiver (tiny files) or for drawing the demo weights


Converter = Callable[[Mapping[str, Path], Path, ProgressBar], None]


class BuildError(Exception):
    """An archive that can't be built; what was in the store is as it was."""


@dataclass(frozen=True)
class BuildPlan:
    """What to build. code_key, checkpoint_key: hashes of what the two halves of the archive are made from."""

    name: str
    store: Path
    target: Path
    code: Mapping[str, Path]  # path in the archive -> source file
    code_key: str
    checkpoint_key: str


def build_full(
    weights: Published,
    store: Path,
    folders: SearchFolders,
    progress: ProgressBar,
    report: Report,
    handlers: Path = HANDLERS,
) -> bool:
    """Builds STORE/<name>; False where it is up to date. Raises BuildError and what obtain and converters raise."""
    convert = _converter(weights, handlers)
    folder = handlers / weights.handler
    configs = {path: folder / source for path, source in weights.configs.items()}
    code = _code(weights.handler, folder / MODEL_CONFIG, handlers)
    archive = BuildPlan(
        name=weights.name,
        store=store,
        target=store / weights.name,
        code=code,
        code_key=_key(code.items()),
        checkpoint_key=_key(configs.items(), repr((CHECKPOINT_FORMAT, weights.sources))),
    )
    record = _read_record(archive.target)
    if _is_current(archive, record):
        return False
    if _has_checkpoint(archive, record):
        # Only code changed: no need for the published files, which may be long gone from this machine.
        old = archive.target
        _build(archive, lambda out: _link(old, record["checkpoint"], out, progress), report, recorded(old))
    else:
        files = obtain(weights, folders, progress)
        _build(archive, lambda out: _convert(convert, files, configs, out, progress), report)
    return True


def build_demo(name: str, store: Path, report: Report, handlers: Path = HANDLERS) -> bool:
    """Builds STORE/demo/<name> from the handler's demo folder; False where it is up to date. Raises BuildError."""
    demo = handlers / name / (descriptions(handlers)[name].demo or "")
    config = demo / MODEL_CONFIG if (demo / MODEL_CONFIG).exists() else handlers / name / MODEL_CONFIG
    checkpoint = _demo_checkpoint(demo)
    trained = any(path.endswith(".safetensors") for path in checkpoint)
    code = _code(name, config, handlers)
    # Random weights also depend on the code that draws them.
    drawn_by = {} if trained else {f"{name}/{path.name}": path for path in _random_weights_code(name, handlers)}
    archive = BuildPlan(
        name=name,
        store=store,
        target=store / "demo" / name,
        code=code,
        code_key=_key(code.items()),
        checkpoint_key=_key([*checkpoint.items(), *drawn_by.items()]),
    )
    if _is_current(archive, _read_record(archive.target)):
        return False

    def fill(out: Path) -> None:
        for path, source in checkpoint.items():
            _copy_small(source, out / path)
        if not trained:
            _draw_weights(name, demo, out, handlers)

    _build(archive, fill, report)
    return True


def ensure_demo(store: Path, report: Report) -> None:
    """Builds the demo archives that are missing or out of date; milliseconds where there is none. Raises BuildError."""
    for name in demo_names():
        build_demo(name, store, report)


def demo_names() -> list[str]:
    """The default archives of weights.toml whose handler has a tiny version."""
    known = descriptions()
    return [name for name in default_names(read_weights()) if name in known and known[name].demo]


def _build(
    archive: BuildPlan, fill: Callable[[Path], None], report: Report, digests: Mapping[str, str] | None = None
) -> None:
    """Fills an empty folder with the checkpoint files, adds the code, and swaps the result in.

    digests: of checkpoint files, by path, which need not be read for that.
    """
    with staging_folder(archive.store, archive.name, report) as staging:
        if _is_current(archive, _read_record(archive.target)):
            return  # built by the one whose lock we waited for
        report(f"{archive.name}: building {archive.target}")
        checkpoint = staging / "checkpoint"
        checkpoint.mkdir()
        fill(checkpoint)
        built = _package(archive, staging)
        _compile(built)
        sizes = _move_in(checkpoint, built)
        known = {path: digest for path, digest in (digests or {}).items() if path in sizes}
        record = {"code": archive.code_key, "weights": archive.checkpoint_key, "checkpoint": sizes}
        record["files"] = to_record(built, known)
        (built / RECORD).write_text(json.dumps(record, indent=2))
        replace_directory(built, archive.target, staging, archive.store)
        report(f"{archive.name}: ready in {archive.target}")


def _code(handler: str, config: Path, handlers: Path) -> dict[str, Path]:
    """What the archive runs: no other model's code, no caches."""
    folder = handlers / handler
    models = {handlers / name for name in descriptions(handlers)}
    rooms = [
        path for path in sorted(handlers.iterdir()) if path.is_dir() and path not in {*models, handlers / BUILDING}
    ]
    own = (path for path in folder.glob("*.py") if path.name not in BUILD_TIME_CODE)
    package = [*handlers.glob("*.py"), *own, *(path for room in rooms for path in room.glob("*.py"))]
    code = {f"handlers/{path.relative_to(handlers)}": path for path in sorted(package)}
    code |= {f"contract/{path.name}": path for path in sorted(CONTRACT.glob("*.py"))}
    return code | {"handler.py": folder / "handler.py", MODEL_CONFIG: config}


def _key(files: Iterable[tuple[str, Path]], extra: str = "") -> str:
    digest = hashlib.sha256(extra.encode())
    for path, source in files:
        digest.update(f"{path}\0{source.stat().st_size}\0".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _read_record(target: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((target / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record


def _is_current(archive: BuildPlan, record: Mapping[str, Any]) -> bool:
    return record.get("code") == archive.code_key and _has_checkpoint(archive, record)


def _has_checkpoint(archive: BuildPlan, record: Mapping[str, Any]) -> bool:
    return record.get("weights") == archive.checkpoint_key and not _lost_files(archive.target, record)


def lost_files(target: Path) -> list[str]:
    """The checkpoint's files that an archive of ours no longer has as they were built; of other archives none."""
    return _lost_files(target, _read_record(target))


def _lost_files(target: Path, record: Mapping[str, Any]) -> list[str]:
    return [
        path
        for path, size in record.get("checkpoint", {}).items()
        if not (target / path).is_file() or (target / path).stat().st_size != size
    ]


def _package(archive: BuildPlan, staging: Path) -> Path:
    """Has torch-model-archiver lay out the code and the manifest; it gets relative paths, as it splits at commas."""
    source, temporary, result = staging / "code", staging / "tmp", staging / "archive"
    for path, file in archive.code.items():
        _copy_small(file, source / ("extra" if "/" in path else "") / path)
    temporary.mkdir()
    result.mkdir()
    command = [sys.executable, "-P", "-m", "model_archiver.model_packaging", "--model-name", archive.name]
    command += ["--version", MODEL_VERSION, "--handler", "handler.py", "--config-file", MODEL_CONFIG]
    command += ["--extra-files", "extra", "--archive-format", "no-archive", "--export-path", str(result.absolute())]
    # It removes $TMPDIR/<model name> before it starts: give it one where nothing is lost.
    _run(command, source, {"TMPDIR": str(temporary.absolute())})
    return result / archive.name


def _compile(built: Path) -> None:
    """Saves every cold start 30 ms. A compiled file holds its source's hash: an edited source is not passed over."""
    for source in built.rglob("*.py"):
        py_compile.compile(str(source), doraise=True, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


def _move_in(checkpoint: Path, built: Path) -> dict[str, int]:
    """Moves the checkpoint files by rename, so that gigabytes are not copied again; their sizes by path."""
    sizes = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        path = file.relative_to(checkpoint)
        sizes[path.as_posix()] = file.stat().st_size
        (built / path).parent.mkdir(parents=True, exist_ok=True)
        os.rename(file, built / path)
    return sizes


def _link(old: Path, checkpoint: Iterable[str], out: Path, progress: ProgressBar) -> None:
    """The checkpoint files of an archive once more, without a second copy on disk where hard links exist."""
    for path in checkpoint:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / path, out / path)
        except OSError:
            copy(old / path, out / path, progress)


def _demo_checkpoint(demo: Path) -> dict[str, Path]:
    files = sorted(path for path in demo.rglob("*") if path.suffix in CHECKPOINT_SUFFIXES)
    return {path.relative_to(demo).as_posix(): path for path in files if path != demo / MODEL_CONFIG}


def _random_weights_code(name: str, handlers: Path) -> list[Path]:
    return [*sorted((handlers / BUILDING).glob("*.py")), *sorted((handlers / name).glob("*.py"))]


def _draw_weights(name: str, demo: Path, out: Path, handlers: Path) -> None:
    command = [sys.executable, "-m", f"{handlers.name}.{BUILDING}.random_weights", name, str(demo), str(out.absolute())]
    _run([*command, "--seed", str(RANDOM_WEIGHTS_SEED)], handlers.parent, {})


def _run(command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=TOOL_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{' '.join(command)} took longer than {TOOL_TIMEOUT:.0f} s") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")


def _copy_small(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _converter(weights: Published, handlers: Path) -> Converter:
    """Finds the converter before gigabytes are fetched. Raises BuildError if there is no such handler or converter."""
    models = descriptions(handlers)
    if weights.handler not in models:
        raise BuildError(f"{weights.name}: there is no handler {weights.handler!r}; there are {', '.join(models)}")
    known = {name: function for model in models.values() for name, function in model.converters.items()}
    if weights.convert not in known:
        raise BuildError(f"{weights.name}: there is no converter {weights.convert!r}; there are {', '.join(known)}")
    function: Converter = resolve_name(known[weights.convert])
    return function


def _convert(
    convert: Converter, files: Mapping[File, Path], configs: Mapping[str, Path], out: Path, progress: ProgressBar
) -> None:
    for path, source in configs.items():
        _copy_small(source, out / path)
    convert({file.save_as: path for file, path in files.items()}, out, progress)
