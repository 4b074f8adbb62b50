"""Carries tasks out, a few at a time. What is written is whole: a batch that is stopped goes on where it was."""

import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from palimpsest import files
from palimpsest.async_client import AsyncClient
from palimpsest.cli.plan import Task
from palimpsest.cli.report import Report
from palimpsest.errors import PalimpsestError, Unreachable
from palimpsest.http import DEFAULT_URL

PATIENCE = 3600.0
"""Seconds that a picture of a batch waits for its turn, where the server is busy."""
INTERRUPTED = 130


class Batch:
    """fields: of every call. server: its address. force: overwrites what is there."""

    def __init__(self, verb: str, fields: dict[str, Any], server: str | None, force: bool, report: Report) -> None:
        self._verb, self._fields, self._force, self._report = verb, fields, force, report
        self._client = AsyncClient(server or DEFAULT_URL, patience=PATIENCE)

    def run(self, tasks: list[Task], parallel: int) -> int:
        """Does what is not done. Returns the exit code: 1 where something failed, 130 after Ctrl-C."""
        to_do = [task for task in tasks if not task.done]
        with self._report.shown(), suppress(KeyboardInterrupt):
            files.remove_parts(output for task in to_do for output in task.outputs)
            anyio.run(self._run, iter(to_do), parallel)
            return 1 if self._report.failed else 0
        return INTERRUPTED

    async def _run(self, to_do: Iterator[Task], parallel: int) -> None:
        async with self._client, anyio.create_task_group() as group:
            for _ in range(parallel):
                group.start_soon(self._work, to_do)

    async def _work(self, to_do: Iterator[Task]) -> None:
        """Takes one after the other, as its siblings do."""
        for task in to_do:
            began = time.monotonic()
            try:
                told = await (self._segment(task) if self._verb == "segment" else self._paint(task))
            except Unreachable as error:
                self._report.fail(task, error)
                for _ in to_do:  # nor will it answer to the others
                    continue
            except (PalimpsestError, OSError, ValueError) as error:
                self._report.fail(task, error)
            else:
                self._report.succeed(task, time.monotonic() - began, told)

    async def _segment(self, task: Task) -> dict[str, Any]:
        found = await self._client.segment(task.source, keep=False, **self._fields)
        await self._write(task.outputs[0], found.data)
        return {"score": found.score, "area": found.area, "warnings": list(found.warnings)}

    async def _paint(self, task: Task) -> dict[str, Any]:
        call: Any = self._client.erase if self._verb == "erase" else self._client.replace
        # In its own format it comes at once; for another the server keeps it, which costs no quality.
        keep = not _is_own_format(task)
        progress = partial(self._report.progress, task)
        edit = await call(task.source, mask=task.mask, keep=keep, progress=progress, **self._fields)
        for each, output in zip(edit.variants, task.outputs, strict=True):
            await self._write(output, await each.file(files.format_of(output)))
        seeds = [each.seed for each in edit.variants]
        return {"warnings": list(edit.warnings)} | ({} if seeds == [None] else {"seeds": seeds})

    async def _write(self, output: Path, data: bytes) -> None:
        def write() -> None:
            output.parent.mkdir(parents=True, exist_ok=True)
            if self._force or not output.exists():
                files.write(output, data)

        await anyio.to_thread.run_sync(write)


def _is_own_format(task: Task) -> bool:
    with task.source.open("rb") as file:
        return files.is_format(file.read(8), files.format_of(task.outputs[0]))
