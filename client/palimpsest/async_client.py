"""The client, for programs on an event loop."""

import os
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import anyio
import anyio.to_thread
import httpx

from palimpsest import errors
from palimpsest.calls import Call, Job, Step, Steps, Wait, Work
from palimpsest.core import Core
from palimpsest.errors import Cancelled, PalimpsestError, Unreachable
from palimpsest.events import JobReader, OnProgress
from palimpsest.fields import EraseFields, Format, ReplaceFields, SegmentFields
from palimpsest.http import CANCEL_TIMEOUT, CLOSED, DEFAULT_URL, LOOK, PATIENCE, TIMEOUT, options
from palimpsest.results import Edited, Model, Segmentation
from palimpsest.sources import FileInput, MaskInput, PictureInput, Upload

T = TypeVar("T")


class AsyncEdit(Edited):
    __doc__ = Edited.__doc__

    variants: "tuple[AsyncEdit, ...]"
    _client: "AsyncClient"

    async def file(self, format: Format = "input") -> bytes:
        """As Edit.file. Example: `await edit.file("webp")`."""
        return await self._client._run(self._client._core.file(self, format))

    async def save(self, path: str | os.PathLike[str]) -> None:
        """As Edit.save. Example: `await edit.save("out.jpg")`."""
        await self._client._run(self._client._core.save(self, path))


class AsyncClient:
    """Talks to one server; its calls are those of Client, awaited, and may run at once.

    Cancelling the task, and leaving the `async with`, stop what the server still does. Reading files, encoding and
    decoding run in threads; only a result's `image` and `mask` compute where they are asked for.

    Example:
        async with AsyncClient() as client:
            dog = await client.segment("bench.jpg", points=[(750, 500)], dilate=8)
            bench = await client.erase("bench.jpg", mask=dog)
            await bench.save("empty-bench.jpg")
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """As Client."""
        self.url = url
        self._core = Core(AsyncEdit, patience)
        self._http = httpx.AsyncClient(**options(url, key, timeout), transport=transport)
        self._jobs: set[JobReader] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops what runs: calls of other tasks end with Cancelled."""
        self._closed = True
        with anyio.CancelScope(shield=True):
            for job in list(self._jobs):
                await self._cancel(job)
            await self._http.aclose()

    async def upload(self, image: FileInput) -> Upload:
        """As Client.upload. Example: `await client.upload("bench.jpg")`."""
        return await self._run(self._core.upload(image))

    async def segment(
        self,
        image: PictureInput,
        *,
        keep: bool = True,
        progress: OnProgress | None = None,
        **fields: Unpack[SegmentFields],
    ) -> Segmentation:
        """As Client.segment. Example: `await client.segment("bench.jpg", points=[(750, 500)])`."""
        return await self._run(self._core.segment(image, fields, keep, progress))

    async def erase(
        self,
        image: PictureInput,
        *,
        mask: MaskInput | None = None,
        keep: bool = True,
        progress: OnProgress | None = None,
        **fields: Unpack[EraseFields],
    ) -> AsyncEdit:
        """As Client.erase. Example: `await client.erase("bench.jpg", box=(548, 208, 958, 885))`."""
        return await self._run(self._core.edit("erase", image, mask, fields, keep, progress))

    async def replace(
        self,
        image: PictureInput,
        prompt: str,
        *,
        mask: MaskInput | None = None,
        keep: bool = True,
        progress: OnProgress | None = None,
        **fields: Unpack[ReplaceFields],
    ) -> AsyncEdit:
        """As Client.replace. Example: `await client.replace("bench.jpg", "a cat", mask=mask, seed=7)`."""
        steps = self._core.edit("replace", image, mask, {**fields, "prompt": prompt}, keep, progress)
        return await self._run(steps)

    async def models(self) -> list[Model]:
        """As Client.models. Example: `await client.models()`."""
        return await self._run(self._core.models())

    async def _run(self, steps: Steps[T]) -> T:
        """Carries out the steps."""
        result: Any = None
        error: PalimpsestError | None = None
        while True:
            try:
                step = steps.send(result) if error is None else steps.throw(error)
            except StopIteration as end:
                value: T = end.value
                return self._own(value)
            result = error = None
            try:
                result = await self._carry_out(step)
            except PalimpsestError as failed:
                error = failed

    def _own(self, result: T) -> T:
        for each in result.variants if isinstance(result, AsyncEdit) else ():
            each._client = self
        return result

    async def _carry_out(self, step: Step) -> Any:
        if isinstance(step, Work):
            return await anyio.to_thread.run_sync(step.do)
        if isinstance(step, Wait):
            return await self._wait(step.seconds)
        if self._closed:
            raise Cancelled("cancelled", CLOSED)
        try:
            return await (self._watch(step) if isinstance(step, Job) else self._ask(step))
        except Unreachable as error:
            if self._closed:
                raise Cancelled("cancelled", CLOSED) from error
            raise

    async def _wait(self, seconds: float) -> None:
        """Or until the client is closed."""
        end = anyio.current_time() + seconds
        while not self._closed and (left := end - anyio.current_time()) > 0:
            await anyio.sleep(min(left, LOOK))

    async def _ask(self, call: Call) -> bytes:
        with errors.reaching(self.url):
            answer = await self._http.request(**call.request())
        errors.check(answer)
        return answer.content

    async def _watch(self, job: Job) -> dict[str, Any]:
        reader = JobReader(job.on_progress)
        self._jobs.add(reader)
        try:
            with errors.reaching(self.url):
                async with self._http.stream(**job.request()) as answer:
                    if not answer.is_success:
                        await answer.aread()
                        errors.check(answer)
                    async for piece in answer.aiter_bytes():
                        reader.feed(piece)
                        if self._closed and reader.runs:
                            raise Cancelled("cancelled", CLOSED)
            return reader.result()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._cancel(reader)
            raise
        finally:
            self._jobs.discard(reader)

    async def _cancel(self, reader: JobReader) -> None:
        """Stops the job, where there is one: best effort, for whoever calls has something else to say."""
        if reader.runs:
            try:
                await self._http.delete(f"/v1/jobs/{reader.job}", timeout=CANCEL_TIMEOUT)
            except (httpx.HTTPError, RuntimeError):
                return
