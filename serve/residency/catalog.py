"""Which archives the store holds."""

import re
from dataclasses import dataclass
from pathlib import Path

from serve.errors import BadRequest, ModelNotFound

DEMO = "demo"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", re.ASCII)
_SUFFIX = re.compile(r"\.(tar\.gz|mar)$")


@dataclass(frozen=True)
class Archive:
    """name: its path in the store. engine_name: the same as TorchServe can carry it in a URL."""

    name: str
    path: Path

    @property
    def engine_name(self) -> str:
        # The prefix keeps "/token" out of TorchServe's management paths, which it takes for its token API.
        return "p." + self.name.replace("/", "--")


class Catalog:
    """The archives of one store. With `demo`, a bare name means the demo archive where there is one."""

    def __init__(self, store: Path, demo: bool) -> None:
        self._store, self._demo = store, demo

    def find(self, name: str) -> Archive:
        """Accepts what SageMaker clients send, too: a leading slash and the suffix .tar.gz.

        Raises BadRequest for a name that cannot be one, ModelNotFound where the store holds no such archive.
        """
        plain = _SUFFIX.sub("", name.lstrip("/"))
        if not _NAME.fullmatch(plain) or ".." in plain or "--" in plain or len(plain) > 200:
            raise BadRequest(f"{name[:80]!r} is not a model name: letters, digits, . _ - and / for folders", "model")
        for candidate in [f"{DEMO}/{plain}", plain] if self._demo else [plain]:
            path = self._store / candidate
            if (path / "MAR-INF" / "MANIFEST.json").is_file():
                return Archive(candidate, path)
        known = ", ".join(self.names()) or f"none; build them with: palimpsest archives build --store {self._store}"
        raise ModelNotFound(f"there is no model {plain!r}; the store holds {known}", "model")

    def names(self) -> list[str]:
        """Every archive in the store, by its path in it."""
        manifests = self._store.glob("**/MAR-INF/MANIFEST.json")
        names = (str(path.parent.parent.relative_to(self._store)) for path in manifests)
        return sorted(name for name in names if not name.startswith("."))
