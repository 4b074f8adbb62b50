"""The checkpoints that weights.toml names: read its stanzas, find or fetch their files, say what is missing.

A file is looked for in the folder that the user names, then in the Hugging Face cache, then among earlier
downloads, and is downloaded last. Whatever has a sha256 on record is checked against it wherever it comes from.
"""

import json
import os
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import hf_hub_url, try_to_load_from_cache

from handlers.building.files import ProgressBar
from serve.archives import hub
from serve.archives.download import DownloadFailed, download, sha256_of

WEIGHTS_TOML = Path(__file__).with_name("weights.toml")
MAX_TEXT = 8 << 20  # bytes; the largest file without a hash, SD's vocabulary, has about one million


@dataclass(frozen=True)
class File:
    """One file of a source. path: in its repository. sha256: None for small text files."""

    path: str
    save_as: str  # in the archive, for the files that need no conversion
    url: str | None
    repo: str | None
    revision: str | None
    bytes: int | None = None
    sha256: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Published:
    """One stanza. sources: each a tuple of files that are needed together; any one of the sources will do."""

    name: str
    handler: str
    convert: str
    licence: str
    sources: tuple[tuple[File, ...], ...]
    configs: Mapping[str, str] = field(default_factory=dict)
    default: bool = False


@dataclass(frozen=True)
class SearchFolders:
    """The folders in which files are sought. given: the user's folder (--from). downloads: ours, beside the store."""

    downloads: Path
    given: Path | None = None


class WeightsError(Exception):
    """A checkpoint that can't be used.

    WeightsError
    ├── WrongFile     found, but not the file on record
    └── NotAvailable  not found, and not to be downloaded
    """


class WrongFile(WeightsError):
    pass


class NotAvailable(WeightsError):
    """missing: for each source the files that were not found, with the reason why the first was not downloaded."""

    def __init__(self, weights: Published, missing: Sequence[tuple[Sequence[File], str]]) -> None:
        super().__init__(f"{weights.name}: no source of its weights is at hand")
        self.weights, self.missing = weights, missing


def read_weights(path: Path = WEIGHTS_TOML) -> dict[str, Published]:
    """The stanzas by name, in the file's order; TypeError names a key that does not exist."""
    stanzas = tomllib.loads(path.read_text())
    return {name: _weights(name, stanza) for name, stanza in stanzas.items()}


def default_names(known: Mapping[str, Published]) -> list[str]:
    """The archives that make up a set: those that are built and served without being asked for by name."""
    return [name for name, weights in known.items() if weights.default]


def obtain(weights: Published, folders: SearchFolders, progress: ProgressBar) -> dict[File, Path]:
    """All files of one source, checked: of one that is here already, else of the first that can be downloaded.

    An optional file may be absent. Raises NotAvailable or WrongFile.
    """
    missing = []
    for source in sorted(weights.sources, key=lambda source: not _is_here(source, folders)):
        obtained: dict[File, Path] = {}
        try:
            for file in source:
                if path := _obtain(file, source, folders, progress):
                    obtained[file] = path
            return obtained
        except DownloadFailed as failure:
            absent = [file for file in source if file not in obtained and not _find(file, source, folders)]
            missing.append((absent, str(failure)))
    raise NotAvailable(weights, missing)


def missing_report(failures: Iterable[NotAvailable], directory: Path, build: Sequence[str]) -> str:
    """What to fetch, and how, on any machine that can; `build` is the command that then takes it from directory."""
    lines = ["These files are neither on this machine nor to be downloaded from here:"]
    commands, names = [], []
    for failure in failures:
        names.append(failure.weights.name)
        for number, (files, reason) in enumerate(failure.missing):
            instead = ", or instead" if number else ""
            lines += ["", f"{failure.weights.name}{instead} ({failure.weights.licence}; {reason})"]
            lines += [f"  {_described(file)}" for file in files]
            if all(map(_url, files)):
                commands += [("# or instead: " if number else "") + _fetch_command(file, directory) for file in files]
    lines += ["", "Fetch them where there is a connection:", "", *(f"  {command}" for command in commands)]
    lines += ["", f"then, with the folder {directory} on this machine, build from it:", ""]
    lines += [f"  {shlex.join([*build, '--from', str(directory), *names])}"]
    return "\n".join(lines)


def _weights(name: str, stanza: dict[str, Any]) -> Published:
    sources = tuple(_source(**source) for source in stanza.pop("sources"))
    return Published(name=name, sources=sources, **stanza)


def _source(
    files: list[dict[str, Any]], repo: str | None = None, revision: str | None = None, into: str = ""
) -> tuple[File, ...]:
    def build(path: str, save_as: str | None = None, url: str | None = None, **rest: Any) -> File:
        return File(path, str(PurePosixPath(into, save_as or path)), url, repo, revision, **rest)

    return tuple(build(**file) for file in files)


def _is_here(source: Sequence[File], folders: SearchFolders) -> bool:
    return all(file.optional or _find(file, source, folders) for file in source)


def _find(file: File, source: Sequence[File], folders: SearchFolders) -> Path | None:
    candidates = list(_given_candidates(file, source, folders.given)) if folders.given else []
    if file.repo:
        cached = try_to_load_from_cache(file.repo, file.path, revision=file.revision)
        candidates += [Path(cached)] if isinstance(cached, str) else []
    candidates.append(_download_path(file, folders))
    return next((path for path in candidates if path.is_file()), None)


def _given_candidates(file: File, source: Sequence[File], given: Path) -> Iterable[Path]:
    """Looks in a clone of the repository; else for the file's path or an end of it that no other file shares."""
    if file.repo:
        yield given / PurePosixPath(file.repo).name / file.path
    parts = PurePosixPath(file.path).parts
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if [f"/{other.path}".endswith(f"/{tail}") for other in source].count(True) == 1:
            yield given / tail


def _obtain(file: File, source: Sequence[File], folders: SearchFolders, progress: ProgressBar) -> Path | None:
    """The checked file, None for an optional one that can't be had; DownloadFailed or WrongFile for another."""
    path = _find(file, source, folders)
    if path and not path.is_relative_to(folders.downloads):
        _check(file, path, progress)
        return path
    target = _download_path(file, folders)
    try:
        if path is None:
            _download(file, target, progress)
        _check(file, target, progress)
    except WrongFile as wrong:
        aside = target.with_name(f"{target.name}.corrupt")
        os.replace(target, aside)
        raise WrongFile(f"{wrong}\nIt is kept as {aside}; the next try downloads it afresh.") from None
    except DownloadFailed:
        if file.optional:
            return None
        raise
    return target


def _download(file: File, target: Path, progress: ProgressBar) -> None:
    limit = file.bytes if file.sha256 else MAX_TEXT
    if file.url:
        download(file.url, target, file.bytes, limit, progress)
    elif file.repo:
        folder = Path(str(target).removesuffix(f"/{file.path}"))
        hub.download(file.repo, file.path, file.revision, folder, limit, progress)
    else:
        raise DownloadFailed("it has no address of its own")


def _check(file: File, path: Path, progress: ProgressBar) -> None:
    if file.sha256 is None:
        _check_text(path)
        return
    actual = sha256_of(path, progress)
    if actual != file.sha256:
        raise WrongFile(
            f"{path} is not the file on record:\n  expected sha256 {file.sha256}\n  actual   sha256 {actual}"
        )


def _check_text(path: Path) -> None:
    """No hash is on record for these, so at least nothing but text may pass."""
    try:
        if path.stat().st_size > MAX_TEXT:
            raise ValueError(f"it is larger than {MAX_TEXT:,} bytes")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            json.loads(text)
    except ValueError as error:
        raise WrongFile(f"{path} is not a {path.suffix} text file: {error}") from None


def _download_path(file: File, folders: SearchFolders) -> Path:
    return folders.downloads / (PurePosixPath(file.repo).name if file.repo else "") / file.path


def _url(file: File) -> str | None:
    if file.url or not file.repo:
        return file.url
    return hf_hub_url(file.repo, file.path, revision=file.revision)


def _described(file: File) -> str:
    if file.sha256 is None:
        return f"{file.path}  (small text file{', optional' if file.optional else ''})"
    size = f"{file.bytes:,} bytes" if file.bytes else "size not on record"
    return f"{file.path}  {size}, sha256 {file.sha256}"


def _fetch_command(file: File, directory: Path) -> str:
    # -C - resumes; -f keeps an error page from being saved as the file.
    return shlex.join(["curl", "-fL", "-C", "-", "--create-dirs", "-o", str(directory / file.path), str(_url(file))])
