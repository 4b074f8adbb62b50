"""Which models are remembered: versions of archives that were asked for, and which of a name's is the current one."""

from itertools import islice

from serve.residency.model import Model
from serve.store.catalog import Archive

# Models that are neither in memory nor asked for now and are remembered all the same, with their counts and errors.
MAX_REMEMBERED = 2000


class Versions:
    """all: by engine name, those asked for last at the end. active: of them what is in memory or in use, perhaps a few
    more; what happens costs as much as it is long. The version of a name that was asked for last is its current one.
    """

    def __init__(self) -> None:
        self.all: dict[str, Model] = {}
        self.active: dict[str, Model] = {}
        self._current: dict[str, Model] = {}

    def register(self, archive: Archive) -> tuple[Model, bool]:
        """The archive's model, active from now on, and whether it has just become the current version of its name.

        One that was before is stale then, and no longer pinned: the new one is in its place.
        """
        key = archive.engine_name
        model = self.all.pop(key, None) or Model(archive)
        model.archive = archive  # the same content, but it may lie there anew
        self.all[key] = self.active[key] = model
        before = self._current.get(archive.name)
        if before is model:
            return model, False
        self._current[archive.name] = model
        model.stale = False
        if before is not None:
            before.stale, model.pinned, before.pinned = True, model.pinned or before.pinned, False
            self.active[before.archive.engine_name] = before  # where it is forgotten, or has to leave
        return model, True

    def drop_inactive(self) -> None:
        """An old version stays in the list while anything of it is in use."""
        for key, model in list(self.active.items()):
            if not model.active:
                del self.active[key]
                if model.stale:
                    self._forget(model)

    def forget_oldest(self) -> None:
        """Forgets as many as are too many, of those that are neither active nor pinned."""
        surplus = len(self.all) - len(self.active) - MAX_REMEMBERED
        if surplus > 0:
            absent = (m for key, m in self.all.items() if key not in self.active and not m.pinned)
            for model in list(islice(absent, surplus)):
                self._forget(model)

    def _forget(self, model: Model) -> None:
        del self.all[model.archive.engine_name]
        if self._current.get(model.archive.name) is model:
            del self._current[model.archive.name]
