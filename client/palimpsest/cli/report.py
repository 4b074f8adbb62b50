"""What a batch tells: a bar while it runs, and at its end what was done, and what failed and why."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from palimpsest import events
from palimpsest.cli.plan import Task
from palimpsest.errors import PalimpsestError

_SHOWN = 50  # failures; JSON has them all


class Report:
    """Of a command's tasks. as_json: whether the end is one JSON object on the standard output instead of sentences."""

    def __init__(self, verb: str, tasks: list[Task], as_json: bool) -> None:
        self._verb, self._tasks, self._as_json = verb, tasks, as_json
        self._done: dict[Task, dict[str, Any]] = {}
        self.failed: dict[Task, dict[str, Any]] = {}
        self._running: dict[Task, float] = {}  # of how much each is done
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows the bar meanwhile, on a terminal."""
        left = sum(not task.done for task in self._tasks)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal or not left) as self._bar:
            self._bar.add_task(self._verb, total=left)
            yield

    def progress(self, task: Task, told: events.Progress) -> None:
        if told.steps:
            self._running[task] = told.step / told.steps
            self._advance()

    def succeed(self, task: Task, seconds: float, told: dict[str, Any]) -> None:
        """told: further fields of the JSON."""
        self._done[task] = {"seconds": round(seconds, 3), **told}
        for warning in told["warnings"]:
            self._say(f"{task.source}: {warning}", "yellow")
        self._end_of(task)

    def fail(self, task: Task, error: Exception) -> None:
        if isinstance(error, PalimpsestError):
            fields = {"code": error.code, "field": error.field, "message": error.message}
        else:
            fields = {"code": type(error).__name__, "field": None, "message": str(error)}
        self.failed[task] = {"error": fields}
        self._end_of(task)

    def plan(self) -> None:
        """Says what would be done."""
        for task in self._tasks if not self._as_json else ():
            if not task.done:
                self._say(f"{task.source} -> {', '.join(map(str, task.outputs))}")
        self.end()

    def end(self) -> None:
        """Says how it went."""
        if self._as_json:
            print(json.dumps({"counts": self._counts(), "pictures": [self._entry(task) for task in self._tasks]}))
            return
        for task, entry in list(self.failed.items())[:_SHOWN]:
            self._say(f"{task.source}: {entry['error']['message']}", "red")
        if len(self.failed) > _SHOWN:
            self._say(f"and {len(self.failed) - _SHOWN} more: --json lists all", "red")
        counts = self._counts()
        said = [f"{count} {words}" for words, count in counts.items() if count]
        self._say(", ".join(said) + ".")
        if counts["already there"]:
            self._say("What is already there was left as it is; --force does it anew.")

    def _status(self, task: Task) -> str:
        if task in self.failed:
            return "failed"
        return "done" if task in self._done else "already there" if task.done else "to do"

    def _counts(self) -> dict[str, int]:
        counts = dict.fromkeys(("done", "already there", "to do", "failed"), 0)
        for task in self._tasks:
            counts[self._status(task)] += 1
        return counts

    def _entry(self, task: Task) -> dict[str, Any]:
        told = self._done.get(task) or self.failed.get(task) or {}
        outputs = [str(output) for output in task.outputs]
        return {"input": str(task.source), "outputs": outputs, "status": self._status(task), **told}

    def _end_of(self, task: Task) -> None:
        self._running.pop(task, None)
        self._advance()

    def _advance(self) -> None:
        if self._bar:
            ended = len(self._done) + len(self.failed)
            self._bar.update(self._bar.task_ids[0], completed=ended + sum(self._running.values()))

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style))
