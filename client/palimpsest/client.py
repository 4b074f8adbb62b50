"""The client, for programs that wait."""

import os
import threading
import time
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

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


class Edit(Edited):
    __doc__ = Edited.__doc__

    variants: "tuple[Edit, ...]"
    _client: "Client"

    def file(self, format: Format = "input") -> bytes:
        """The whole picture's file as the server writes it, with the input's metadata. format: input is that of the
        picture which was edited. Raises PalimpsestError.

        Example: `edit.file("webp")`.
        """
        return self._client._run(self._client._core.file(self, format))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `file`, in the format that the path's suffix names: .png, .jpg, .jpeg, .webp, .tif or .tiff.

        Raises ValueError for another suffix, OSError and PalimpsestError. Example: `edit.save("out.jpg")`.
        """
        self._client._run(self._client._core.save(self, path))


class Client:
    """Talks to one server; calls may come from several threads at once.

    Leaving the `with` (or close()) and Ctrl-C during a call stop what the server still does for it.

    Example:
        with Client() as client:
            dog = client.segment("bench.jpg", points=[(750, 500)], dilate=8)
            bench = client.erase("bench.jpg", mask=dog)
            client.replace(bench, "a hamster on a bench", mask=dog, seed=7).save("hamster.jpg")
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """url: of the server. key: for a server that asks for one; by default PALIMPSEST_KEY of the environment.

        timeout: seconds without a sign of it until it counts as unreachable. patience: seconds in all that a call waits
        where the server says that it is busy or starting (429, 503) and when to come again. transport: httpx's, where
        another than the network is to be used. Raises ValueError for what is no address.
        """
        self.url = url
        self._core = Core(Edit, patience)
        self._http = httpx.Client(**options(url, key, timeout), transport=transport)
        self._jobs: set[JobReader] = set()
        self._no_jobs = threading.Condition()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops what runs: calls in other threads end with Cancelled."""
        with self._no_jobs:
            self._closed = True
            running = list(self._jobs)
        for job in running:
            self._cancel(job)
        with self._no_jobs:
            self._no_jobs.wait_for(lambda: not self._jobs, CANCEL_TIMEOUT)
        self._http.close()

    def upload(self, image: FileInput) -> Upload:
        """Has the server keep a picture for a while: an hour since its last use, by default. Calls do so by themselves
        with what is large; this says when.

        Raises PalimpsestError; TypeError and ValueError for what is no picture. Example: `client.upload("bench.jpg")`.
        """
        return self._run(self._core.upload(image))

    def segment(
        self,
        image: PictureInput,
        *,
        keep: bool = True,
        progress: OnProgress | None = None,
        **fields: Unpack[SegmentFields],
    ) -> Segmentation:
        """Selects what points or a box show. fields: those of palimpsest.fields.SegmentFields.

        keep: False has the server keep nothing, neither the picture nor the mask, which suits a single call about it.
        progress: called with a Progress at every change; what it raises stops the work and comes out of this call.
        Raises BadRequest, Busy, Unreachable and other PalimpsestErrors; TypeError and ValueError for what can be no
        picture, OSError of a file.

        Example: `client.segment(array, points=[(750, 500), (20, 30, 0)], masks="all").candidates[1].mask`, HxW bool.
        """
        return self._run(self._core.segment(image, fields, keep, progress))

    def erase(
        self,
        image: PictureInput,
        *,
        mask: MaskInput | None = None,
        keep: bool = True,
        progress: OnProgress | None = None,
        **fields: Unpack[EraseFields],
    ) -> Edit:
        """Removes what the mask, points or a box mark. fields: those of palimpsest.fields.EraseFields.

        mask: 128 or more of 255 (or True) marks what to change; as large as the upright picture. keep: the result stays
        on the server, for the next call, and only what changed comes here; False has all of it come at once, as a file
        of the input's format: for a single edit of a picture, or archives of another make, which know no other way.
        progress, errors: as in segment.

        Example: `client.erase("bench.jpg", box=(548, 208, 958, 885)).image`, a Pillow picture.
        """
        return self._run(self._core.edit("erase", image, mask, fields, keep, progress))

    def replace(
        self,
        image: PictureInput,
        prompt: str,
        *,
        mask: MaskInput | None = None,
        keep: bool = True,
        progress: OnProgress | None = None,
        **fields: Unpack[ReplaceFields],
    ) -> Edit:
        """Paints what the prompt says where the mask, points or a box mark. fields: those of
        palimpsest.fields.ReplaceFields. mask, keep, progress, errors: as in erase.

        Example: `[each.seed for each in client.replace(image, "a cat", mask=mask, variants=4).variants]`.
        """
        return self._run(self._core.edit("replace", image, mask, {**fields, "prompt": prompt}, keep, progress))

    def models(self) -> list[Model]:
        """All archives that the server can load, and what it has in memory. Raises PalimpsestError.

        Example: `[model.name for model in client.models() if model.state == "ready"]`.
        """
        return self._run(self._core.models())

    def _run(self, steps: Steps[T]) -> T:
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
                result = self._carry_out(step)
            except PalimpsestError as failed:
                error = failed

    def _own(self, result: T) -> T:
        for each in result.variants if isinstance(result, Edit) else ():
            each._client = self
        return result

    def _carry_out(self, step: Step) -> Any:
        if isinstance(step, Work):
            return step.do()
        if isinstance(step, Wait):
            return self._wait(step.seconds)
        if self._closed:
            raise Cancelled("cancelled", CLOSED)
        try:
            return self._watch(step) if isinstance(step, Job) else self._ask(step)
        except Unreachable as error:
            if self._closed:
                raise Cancelled("cancelled", CLOSED) from error
            raise

    def _wait(self, seconds: float) -> None:
        """Or until the client is closed. Not by an Event: on Windows Ctrl-C does not end the wait for one."""
        end = time.monotonic() + seconds
        while not self._closed and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK))

    def _ask(self, call: Call) -> bytes:
        with errors.reaching(self.url):
            answer = self._http.request(**call.request())
        errors.check(answer)
        return answer.content

    def _watch(self, job: Job) -> dict[str, Any]:
        reader = JobReader(job.on_progress)
        with self._no_jobs:
            self._jobs.add(reader)
        try:
            with errors.reaching(self.url), self._http.stream(**job.request()) as answer:
                if not answer.is_success:
                    answer.read()
                    errors.check(answer)
                for piece in answer.iter_bytes():
                    reader.feed(piece)
                    if self._closed and reader.runs:
                        raise Cancelled("cancelled", CLOSED)
            return reader.result()
        except BaseException:
            self._cancel(reader)
            raise
        finally:
            with self._no_jobs:
                self._jobs.discard(reader)
                self._no_jobs.notify_all()

    def _cancel(self, reader: JobReader) -> None:
        """Stops the job, where there is one: best effort, for whoever calls has something else to say."""
        if reader.runs:
            try:
                self._http.delete(f"/v1/jobs/{reader.job}", timeout=CANCEL_TIMEOUT)
            except (httpx.HTTPError, RuntimeError):
                return
