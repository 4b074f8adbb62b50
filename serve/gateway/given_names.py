"""The names that POST /models gives to archives, as SageMaker's platform does, for as long as the application lives."""

from collections.abc import Iterator
from dataclasses import dataclass

from serve.store.catalog import Archive

MOST = 10_000
"""Past these the oldest names are forgotten; their archives answer to their own."""


@dataclass(frozen=True)
class LoadedModel:
    """name: the given one, or the archive's own. url: as it was given, or where the archive lies."""

    name: str
    url: str
    archive: Archive


class GivenNames:
    """Iterating gives the models, oldest names first."""

    def __init__(self) -> None:
        self._names: dict[str, LoadedModel] = {}

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._names.values())

    def give(self, model: LoadedModel) -> None:
        self._names.pop(model.name, None)
        self._names[model.name] = model
        if len(self._names) > MOST:
            del self._names[next(iter(self._names))]

    def take_back(self, name: str) -> None:
        self._names.pop(name, None)
