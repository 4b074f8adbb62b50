"""A job's progress, told to whoever called the tool."""

from palimpsest.events import Progress

_TICK = 0.01


class News:
    """Steps begin anew with each model; the protocol's numbers must rise with every notification."""

    def __init__(self) -> None:
        self._model, self._before, self._steps, self._last = "", 0, 0, 0.0

    def of(self, told: Progress) -> tuple[float, float | None, str]:
        """progress, total and message."""
        if told.model != self._model:
            self._model, self._before = told.model, self._before + self._steps
        self._steps = told.steps
        self._last = max(self._last + _TICK, self._before + told.step)
        total = self._before + told.steps if told.steps else None
        doing = f"step {told.step} of {told.steps}" if told.steps else told.phase
        return self._last, total, f"{told.model}: {doing}"
