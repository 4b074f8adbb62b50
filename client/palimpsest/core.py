"""What Client and AsyncClient do alike: calls as generators of steps (calls.py), without any I/O.

A chain of edits moves little: what is large is uploaded once and named by its id from then on, results stay on the
server, and of an edit only the patch comes back. What the server has forgotten meanwhile is sent, or made, again.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from palimpsest import composing, files
from palimpsest.calls import Call, Job, Step, Steps, Wait, Work, file, value
from palimpsest.errors import NotFound, PalimpsestError
from palimpsest.events import OnProgress
from palimpsest.fields import selection
from palimpsest.known import Known
from palimpsest.results import Edited, Made, Model, Segmentation
from palimpsest.sources import File, FileInput, MaskInput, PictureInput, Source, Upload, mask_source, picture_source

E = TypeVar("E", bound=Edited)

INLINE = 2**16
"""Bytes of the largest file that is sent with the request itself, instead of an id."""
_PAGE = "1000"
_FILE_TIMEOUT = 400.0  # seconds of silence in which a model may have to be loaded, which makes the file
_FORGOTTEN = "image_not_found"
_KEPT = {"keep": True, "result": "patch"}


class Core(Generic[E]):
    """edited: the class of what edits result in. patience: seconds that a call waits in all, as Retry-After says."""

    def __init__(self, edited: type[E], patience: float) -> None:
        self._edited, self._patience = edited, patience
        self._known = Known()

    def upload(self, image: FileInput) -> Steps[Upload]:
        source = yield Work(partial(picture_source, image))
        return Upload((yield from self._uploaded(source)), source.data)

    def segment(
        self, image: PictureInput, fields: Mapping[str, Any], keep: bool, on_progress: OnProgress | None
    ) -> Steps[Segmentation]:
        pictures = {"image": (yield Work(partial(picture_source, image)))}
        wanted = {**fields, "keep": True} if keep else fields
        return _segmentation((yield from self._job("segment", pictures, wanted, on_progress, inline=not keep)))

    def edit(
        self,
        verb: str,
        image: PictureInput,
        mask: MaskInput | None,
        fields: Mapping[str, Any],
        keep: bool,
        on_progress: OnProgress | None,
    ) -> Steps[E]:
        pictures = {"image": (yield Work(partial(picture_source, image)))}
        if mask is not None:
            pictures["mask"] = yield Work(partial(mask_source, mask))
        wanted = {**fields, **_KEPT} if keep else fields
        reply = yield from self._job(verb, pictures, wanted, on_progress, inline=not keep)
        return (yield from self._edits(Made(verb, pictures, dict(fields)), reply, whole=not keep))

    def file(self, edited: Edited, format: str) -> Steps[bytes]:
        """The whole picture's file, as the server writes it."""
        came = format == "input" and edited.patch is None
        if edited.data is not None and (came or files.is_format(edited.data, format)):
            return edited.data
        if edited.id is None:
            yield from self._restore(edited)
        data: bytes = yield from self._remembered({"image": edited}, lambda: self._kept_file(edited, format))
        return data

    def save(self, edited: Edited, path: Any) -> Steps[None]:
        format = files.format_of(path)
        data = yield from self.file(edited, format)
        yield Work(lambda: files.write(Path(path), data))

    def models(self) -> Steps[list[Model]]:
        query, found = {"limit": _PAGE}, list[dict[str, Any]]()
        while True:
            page = json.loads((yield from self._patiently(Call("GET", "/v1/models", query=query))))
            found += page["models"]
            if not page["next_page_token"]:
                return [_model(each) for each in found]
            query = query | {"next_page_token": page["next_page_token"]}

    def _job(
        self,
        verb: str,
        pictures: Mapping[str, Source],
        fields: Mapping[str, Any],
        on_progress: OnProgress | None = None,
        inline: bool = False,
        alone: bool = False,
    ) -> Steps[dict[str, Any]]:
        """inline: sends files with the request, however large they are. alone: as in _remembered."""
        wanted = {**fields, "previews": False} if verb == "replace" else fields  # nobody here would see them
        said = [value(name, each) for name, each in wanted.items() if each is not None]

        def ask() -> Steps[dict[str, Any]]:
            named = []
            for name, source in pictures.items():
                named.append((yield from self._part(name, source, inline)))
            reply: dict[str, Any] = yield from self._patiently(Job(f"/v1/{verb}", [*named, *said], on_progress))
            return reply

        reply: dict[str, Any] = yield from self._remembered(pictures, ask, alone)
        return reply

    def _part(self, name: str, source: Source, inline: bool) -> Steps[Any]:
        """A field that is the picture: its id, where the server has it or is to have it."""
        if source.id is None and source.data is not None and (inline or len(source.data) <= INLINE):
            return file(name, source.data)
        if source.id is None:
            yield from self._restore(source)
        return value(name, source.id)

    def _remembered(
        self, pictures: Mapping[str, Source], ask: Callable[[], Steps[Any]], alone: bool = False
    ) -> Steps[Any]:
        """Asks; where the server has forgotten a picture, gives it that and asks again, once for each.

        alone: unless it is one that has to be made again.
        """
        forgotten = dict(pictures)
        while True:
            try:
                return (yield from ask())
            except NotFound as error:
                if error.code != _FORGOTTEN or error.field not in forgotten:
                    raise
                source = forgotten.pop(error.field)
                if (source.data is None and not _is_made(source)) or (alone and _is_made(source)):
                    raise
                if source.id is not None:
                    self._known.forget(source.id)
            yield from self._restore(source)

    def _restore(self, source: Source) -> Steps[None]:
        """Has the server keep it, and sets its id."""
        if isinstance(source, Edited) and _is_made(source):
            yield from self._make_chain_again(source)
        else:
            source.id = yield from self._uploaded(source)

    def _make_chain_again(self, edited: Edited) -> Steps[None]:
        """What it was made from, too, from where the server still has it."""
        missing, again = [edited], set[Edited]()
        while missing:
            below = missing[-1].made.pictures["image"]
            try:
                yield from self._make_again(missing[-1])
            except NotFound:
                if not isinstance(below, Edited) or not _is_made(below) or below in again:
                    raise
                missing.append(below)
            else:
                again.add(missing.pop())

    def _make_again(self, edited: Edited) -> Steps[None]:
        """By the same steps, with the same seed; where another picture came of them, the one that was shown is sent.

        Raises NotFound where the server has forgotten what it was made from, and that has to be made again, too.
        """
        verb, pictures, fields = edited.made
        if edited.selected is not None:
            pictures = pictures | {"mask": File(edited.selected)}
            fields = {name: each for name, each in fields.items() if name not in selection(fields)}
        if edited.seed is not None:
            fields = fields | {"seed": edited.seed, "variants": None}
        reply = yield from self._job(verb, pictures, fields | _KEPT, alone=True)
        if base64.b64decode(reply["picture"]) == edited.patch:
            edited.id = reply["id"]
        else:
            data = yield Work(edited.png)
            edited.id = yield from self._uploaded(File(data))

    def _uploaded(self, source: Source) -> Steps[str]:
        """Its id; sends nothing that was sent before."""
        data = source.data
        if data is None:
            raise TypeError(f"only what is not on the server yet can be uploaded, and {source!r} is")
        digest = yield Work(lambda: hashlib.sha256(data).digest())
        id = self._known.get(digest)
        if id is None:
            reply = yield from self._patiently(Call("POST", "/v1/images", [file("image", data)]))
            id = json.loads(reply)["id"]
            self._known.add(digest, id)
        return id

    def _kept_file(self, edited: Edited, format: str) -> Steps[bytes]:
        call = Call("GET", f"/v1/images/{edited.id}", query={"format": format}, timeout=_FILE_TIMEOUT)
        data: bytes = yield from self._patiently(call)
        return data

    def _edits(self, made: Made, reply: dict[str, Any], whole: bool) -> Steps[E]:
        """The result, with its variants."""
        selected = _selected(made, reply)
        sent = [base64.b64decode(each) for each in reply.get("pictures", [reply["picture"]])]
        ids = reply.get("ids", [reply.get("id")] * len(sent))
        seeds = reply.get("seeds", [reply.get("seed")])
        variants = [
            self._edited(
                id=id,
                data=data if whole else None,
                patch=None if whole else data,
                box=None if whole else _box(reply["box"]),
                made=made,
                selected=selected,
                seed=seed,
                parameters=reply.get("parameters", {}),
                warnings=tuple(reply["warnings"]),
                timings=reply["timings"],
            )
            for data, id, seed in zip(sent, ids, seeds, strict=True)
        ]
        for each in variants:
            each.variants = tuple(variants)
            if not whole and not (yield Work(partial(_can_be_composed, each))):
                each.data = yield from self._kept_file(each, "png")
        return variants[0]

    def _patiently(self, step: Step) -> Steps[Any]:
        """Waits and tries again where the server says when, and on nothing else."""
        waited = 0.0
        while True:
            try:
                return (yield step)
            except PalimpsestError as error:
                if error.status not in (429, 503) or error.retry_after is None:
                    raise
                if waited + error.retry_after > self._patience:
                    raise
                pause = error.retry_after
            yield Wait(pause)
            waited += pause


def _model(said: dict[str, Any]) -> Model:
    known: dict[str, Any] = {name: said.get(name) for name in Model.__annotations__}
    return Model(**known)


def _selected(made: Made, reply: Mapping[str, Any]) -> bytes | None:
    """The mask's file, where it is the server's."""
    if "mask" in reply:
        return base64.b64decode(reply["mask"])
    mask = made.pictures.get("mask")
    return mask.data if isinstance(mask, Segmentation) else None


def _is_made(source: Source) -> bool:
    """Whether the server made it from a picture that it had, and has the result alone."""
    return isinstance(source, Edited) and source.patch is not None


def _can_be_composed(edited: Edited) -> bool:
    below: Source = edited.made.pictures["image"]
    while isinstance(below, Edited) and below.data is None:
        below = below.made.pictures["image"]
    if below.data is None or edited.patch is None:
        return False
    # The mask is as large as the upright picture.
    mask = edited.selected or edited.made.pictures["mask"].data
    return composing.fits(below.data, edited.patch, None if mask is None else composing.size_of(mask))


def _segmentation(reply: dict[str, Any]) -> Segmentation:
    several = {"id": "ids", "mask": "masks", "score": "scores", "box": "boxes", "area": "areas"}
    count = len(reply.get("masks", ()))
    each = [{one: reply[many][index] for one, many in several.items() if many in reply} for index in range(count)]
    said = {"warnings": tuple(reply["warnings"]), "timings": reply["timings"]}
    candidates = tuple(_mask(fields, **said) for fields in each)
    return _mask(reply, candidates=candidates, logits=reply.get("logits"), **said)


def _mask(fields: Mapping[str, Any], **more: Any) -> Segmentation:
    return Segmentation(
        id=fields.get("id"),
        data=base64.b64decode(fields["mask"]),
        score=fields["score"],
        box=_box(fields["box"]),
        area=fields["area"],
        **more,
    )


def _box(said: list[int] | None) -> composing.Box | None:
    return None if said is None else (said[0], said[1], said[2], said[3])
