"""Files that a model names: below folders that a person has allowed, and never in the place of what is there."""

from collections.abc import Sequence
from pathlib import Path

from palimpsest import files

MOST_BYTES = 64 * 2**20
"""Of a picture's file."""
_MOST_NAMES = 1000


class Refused(ValueError):
    """What was asked for is not to be done; the message says what to ask for instead."""


class Places:
    """folders: the allowed ones; relative paths are below the first. Raises OSError for one that is not there."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = [folder.resolve(strict=True) for folder in folders]

    def source(self, name: str, field: str) -> Path:
        """A file to read. Raises Refused, and OSError."""
        path = self._allowed(name, field)
        if not path.is_file():
            raise Refused(f"{field}: there is no file {path}")
        return path

    def target(self, name: str) -> Path:
        """A file to write, which is not there yet. Raises Refused, and OSError."""
        path = self._allowed(name, "output")
        files.format_of(path)
        if not path.parent.is_dir():
            raise Refused(f"output: there is no folder {path.parent}")
        if path.exists():
            raise Refused(f"output: {path} is there already, and nothing is overwritten: choose another name")
        return path

    def _allowed(self, name: str, field: str) -> Path:
        """The path without links on its way. Says nothing of what is there or not elsewhere."""
        try:
            path = self.folders[0].joinpath(Path(name).expanduser()).resolve()
        except RuntimeError:  # a home that nobody has, links in a circle
            raise Refused(f"{field}: {name} is no path") from None
        if not any(path.is_relative_to(folder) for folder in self.folders):
            allowed = ", ".join(map(str, self.folders))
            raise Refused(f"{field}: {name} is not below a folder that was allowed: {allowed}")
        return path


def read(path: Path) -> bytes:
    """Raises Refused for a file that is too large, and OSError."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise Refused(f"{path} is larger than {MOST_BYTES >> 20} MiB")
    return data


def beside(source: Path, word: str) -> Path:
    """Names what was made of bench.jpg bench-erased.jpg; .png where the server writes no such files."""
    suffix = source.suffix if source.suffix.lower() in files.FORMATS else ".png"
    return source.with_name(f"{source.stem}-{word}{suffix}")


def write_new(path: Path, data: bytes) -> Path:
    """Writes the file under that name or, where there is one, as NAME-2, NAME-3, ... Raises Refused and OSError."""
    for each in (path, *(path.with_stem(f"{path.stem}-{number}") for number in range(2, _MOST_NAMES))):
        try:
            each.open("xb").close()  # from here on the name is ours
        except FileExistsError:
            continue
        try:
            files.write(each, data)
        except BaseException:
            each.unlink(missing_ok=True)
            raise
        return each
    raise Refused(f"output: {path} and {_MOST_NAMES} names like it are taken: choose another")
