"""A job's progress, told to whoever called the tool."""

from palimpsest.events import Progress

_TICK = 0.01


class News:
    """Steps begin anew with each model, and where it runs; the protocol's numbers must rise with every notification."""

    def __init__(self) -> None:
        self._what, self._before, self._steps, self._last = ("", ""), 0, 0, 0.0

    def of(self, told: Progress) -> tuple[float, float | None, str]:
        """progress, total and message."""
        if (told.model, told.phase) != self._what:
            self._what, self._before = (told.model, told.phase), self._before + self._steps
        self._steps = told.steps
        self._last = max(self._last + _TICK, self._before + told.step)
        total = self._before + told.steps if told.steps else None
        of = "step" if told.phase == "running" else told.phase
        doing = f"{of} {told.step} of {told.steps}" if told.steps else told.phase
        return self._last, total, f"{told.model}: {doing}"
