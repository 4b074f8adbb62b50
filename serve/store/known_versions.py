"""What archives held when they were read, so that they need not be read again."""

import contextlib
import os
import re
from itertools import islice
from pathlib import Path

MAX_ENTRIES = 20_000
_LINE = re.compile(r"([0-9a-f]+) ([0-9a-f]+) (/.+)")


class KnownVersions:
    """Hashes of a folder or a packed file by its path and identity, kept between runs in `file`, which may be lost.

    A line each. Servers that share it add to it, and find what the others added when they start. For any thread.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, tuple[str, str]] | None = None  # identity and version by path
        self._lines = 0

    def get(self, path: Path, identity: str) -> str:
        """Empty where it is not known. The first look reads the file: milliseconds."""
        found = self._read().get(str(path))
        return found[1] if found and found[0] == identity else ""

    def add(self, path: Path, identity: str, version: str, keep: bool) -> None:
        """keep: also for the next run."""
        known = self._read()
        known.pop(str(path), None)
        known[str(path)] = identity, version
        if len(known) > MAX_ENTRIES:
            known.pop(next(iter(known)), None)
        with contextlib.suppress(OSError):  # a full disk costs only what was learned
            if keep and self._lines < 2 * MAX_ENTRIES:
                self._append(f"{identity} {version} {path}\n")
            elif keep:
                self._write_anew(known)

    def _append(self, line: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # In one write, so that lines of several servers do not mix.
        with open(self._file, "ab", buffering=0) as file:
            file.write(os.fsencode(line))
        self._lines += 1

    def _write_anew(self, known: dict[str, tuple[str, str]]) -> None:
        new = self._file.with_suffix(f".{os.getpid()}")
        try:
            lines = [f"{identity} {version} {path}\n" for path, (identity, version) in list(known.items())]
            new.write_bytes(os.fsencode("".join(lines)))
            new.replace(self._file)
        finally:
            new.unlink(missing_ok=True)
        self._lines = len(lines)

    def _read(self) -> dict[str, tuple[str, str]]:
        if self._known is None:
            known: dict[str, tuple[str, str]] = {}
            with contextlib.suppress(OSError), open(self._file, "rb") as file:
                for line in islice(file, 3 * MAX_ENTRIES):
                    self._lines += 1
                    if told := _LINE.fullmatch(os.fsdecode(line).rstrip("\n")):
                        known.pop(told[3], None)
                        known[told[3]] = told[1], told[2]
            self._known = dict(islice(known.items(), max(0, len(known) - MAX_ENTRIES), None))
        return self._known
