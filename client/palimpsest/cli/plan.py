"""A command's inputs -> what is to be done: which file becomes which, and what is done already."""

import glob
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from palimpsest.files import FORMATS

FOLDERS = {"segment": "masks", "erase": "erased", "replace": "replaced"}
"""Where results go, unless it is said."""
_READ = {*FORMATS, ".heic", ".heif", ".avif", ".gif", ".bmp"}
_FOLDS_CASE = sys.platform in ("win32", "darwin")  # a.png and A.png are one file


class Unusable(ValueError):
    """The command can't be carried out as it stands; the message says why."""


class Task(NamedTuple):
    """source: a picture's file. mask: its mask's, where there are any. outputs: what is to be written; all of it."""

    source: Path
    mask: Path | None
    outputs: tuple[Path, ...]
    done: bool


class _Found(NamedTuple):
    """A picture, and its path from the folder or pattern that it was found by."""

    path: Path
    relative: Path


def plan(
    verb: str, inputs: list[str], output: Path | None, mask: Path | None, variants: int, force: bool
) -> list[Task]:
    """The tasks in the order of the inputs, each file once. force: what is there counts as not done.

    Raises Unusable: nothing found, two results of one name, or a result in its own picture's place without force.
    """
    target = Path(FOLDERS[verb]) if output is None else output
    # Neither results nor masks are pictures to edit, where they lie among these.
    apart = [folder.resolve() for folder in (target, mask) if folder is not None]
    found = list({each.path.resolve(): each for text in inputs for each in _found(text, apart)}.values())
    if not found:
        raise Unusable(f"there are no pictures in {', '.join(inputs)}")
    if mask is not None and not mask.exists():
        raise Unusable(f"{mask}: there is no such mask")
    single = len(inputs) == 1 and Path(inputs[0]).is_file()
    as_file = single and target.suffix.lower() in FORMATS and not target.is_dir()
    tasks = []
    for path, relative in found:
        whole = target if as_file else target / relative.with_suffix(_suffix(verb, path))
        outputs = tuple(_outputs(whole, variants))
        done = not force and all(each.exists() for each in outputs)
        tasks.append(Task(path, _mask_of(relative, mask), outputs, done))
    _check(tasks, force)
    return tasks


def _found(text: str, apart: list[Path]) -> Iterator[_Found]:
    path = Path(text)
    if path.is_dir():
        for each in sorted(path.rglob("*")):
            if _is_picture(each.relative_to(path)) and each.is_file() and not _is_apart(each, path, apart):
                yield _Found(each, each.relative_to(path))
    elif path.is_file():
        yield _Found(path, Path(path.name))
    elif glob.has_magic(text):
        parts = path.parts
        fixed = Path(*parts[: next(index for index, part in enumerate(parts) if glob.has_magic(part))])
        for each in sorted(map(Path, glob.glob(text, recursive=True))):
            if each.is_file() and not _is_apart(each, fixed, apart):
                yield _Found(each, each.relative_to(fixed))
    else:
        raise Unusable(f"{text}: there is no such file or folder")


def _is_apart(path: Path, base: Path, apart: list[Path]) -> bool:
    """Whether one of the folders, itself somewhere below the base, holds the file."""
    parents = path.resolve().parents
    return any(folder in parents and base.resolve() in folder.parents for folder in apart)


def _is_picture(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return relative.suffix.lower() in _READ and not hidden


def _suffix(verb: str, path: Path) -> str:
    """Its own, where the server writes such files, and has to."""
    return path.suffix if verb != "segment" and path.suffix.lower() in FORMATS else ".png"


def _outputs(path: Path, variants: int) -> Iterator[Path]:
    if variants == 1:
        yield path
    else:
        yield from (path.with_stem(f"{path.stem}-{number}") for number in range(1, variants + 1))


def _mask_of(relative: Path, mask: Path | None) -> Path | None:
    """In a folder of masks the one of the picture's name, as `palimpsest segment` calls it."""
    return mask / relative.with_suffix(".png") if mask is not None and mask.is_dir() else mask


def _check(tasks: list[Task], force: bool) -> None:
    writers: dict[str, Path] = {}
    for task in tasks:
        for output in task.outputs:
            name = str(output).casefold() if _FOLDS_CASE else str(output)
            if name in writers:
                raise Unusable(f"{writers[name]} and {task.source} would both become {output}: run them apart")
            writers[name] = task.source
            if not force and output.resolve() == task.source.resolve():
                raise Unusable(f"{output} would overwrite the picture itself: name another folder, or --force")
