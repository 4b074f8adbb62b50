"""segment, erase, replace and models, as tools."""

import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import anyio
import anyio.to_thread
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, ImageContent, TextContent
from pydantic import BaseModel

from palimpsest import files
from palimpsest.async_client import AsyncClient, AsyncEdit
from palimpsest.errors import NotFound, PalimpsestError, Unreachable
from palimpsest.events import OnProgress, Progress
from palimpsest.mcp import arguments as a
from palimpsest.mcp import places, showing
from palimpsest.mcp.news import News
from palimpsest.mcp.places import Places, Refused
from palimpsest.sources import File, Source, Upload

_ID = re.compile(r"img_[0-9a-f]+")
_NEWS = 100  # that wait to be told; the rest is dropped


class Given(NamedTuple):
    """A picture as it was given. path: of its file, if it is one."""

    source: Source
    path: Path | None = None


class Tools:
    """Pictures are read and written below `places` alone."""

    def __init__(self, client: AsyncClient, allowed: Places) -> None:
        self._client, self._places = client, allowed

    async def segment(
        self,
        ctx: Context,
        image: a.Image = None,
        image_data: a.ImageData = None,
        points: a.Points = None,
        box: a.Box = None,
        dilate: a.Dilate = None,
        erode: a.Erode = None,
        fill_holes: a.FillHoles = None,
        smooth: a.Smooth = None,
        invert: a.Invert = None,
        model: a.Model = None,
        output: a.Output = None,
        preview: a.PreviewOfMask = False,
    ) -> Annotated[CallToolResult, a.Selected]:
        """Select the object that points or a box show. Makes a mask, white where the object is, for erase and replace:
        by its id, or as a PNG in a file.
        """
        fields = _given(
            points=points, box=box, dilate=dilate, erode=erode, fill_holes=fill_holes, smooth=smooth, invert=invert,
            model=model,
        )  # fmt: skip

        async def work(progress: OnProgress) -> CallToolResult:
            picture = await self._picture("image", image, image_data)
            target = await self._target(output)
            if target and files.format_of(target) != "png":
                raise Refused("output: a mask is a PNG, name the file so")
            found = await self._client.segment(picture.source, progress=progress, **fields)
            base = target or (picture.path and places.beside(picture.path.with_suffix(".png"), "mask"))
            made = await _delivered(base, found.data, shown=2 if preview else 1)
            if preview and picture.source.data:
                most = showing.MOST_SHOWN // 2
                overlay = await anyio.to_thread.run_sync(showing.overlaid, picture.source.data, found.data, most)
                made.images.extend([overlay] if overlay else [])
            told = a.Selected(
                score=found.score,
                box=found.box and list(found.box),
                area=found.area,
                id=found.id,
                path=made.path,
                warnings=[*found.warnings, *made.warnings],
            )
            return _result(told, made.images)

        return await _answered(ctx, work)

    async def erase(
        self,
        ctx: Context,
        image: a.Image = None,
        image_data: a.ImageData = None,
        mask: a.Mask = None,
        mask_data: a.MaskData = None,
        points: a.Points = None,
        box: a.Box = None,
        dilate: a.Dilate = None,
        erode: a.Erode = None,
        fill_holes: a.FillHoles = None,
        smooth: a.Smooth = None,
        invert: a.Invert = None,
        feather: a.Feather = None,
        quality: a.EraseQuality = None,
        model: a.Model = None,
        output: a.Output = None,
        preview: a.Preview = False,
    ) -> Annotated[CallToolResult, a.Painted]:
        """Remove what a mask, points or a box mark, and fill the place with what is around it. Everything else stays,
        pixel by pixel.
        """
        fields = _given(
            points=points, box=box, dilate=dilate, erode=erode, fill_holes=fill_holes, smooth=smooth, invert=invert,
            feather=feather, quality=quality, model=model,
        )  # fmt: skip
        call = partial(self._client.erase, **fields)
        return await self._painted(ctx, call, "erased", (image, image_data), (mask, mask_data), output, preview)

    async def replace(
        self,
        ctx: Context,
        prompt: a.Prompt,
        image: a.Image = None,
        image_data: a.ImageData = None,
        mask: a.Mask = None,
        mask_data: a.MaskData = None,
        points: a.Points = None,
        box: a.Box = None,
        dilate: a.Dilate = None,
        erode: a.Erode = None,
        fill_holes: a.FillHoles = None,
        smooth: a.Smooth = None,
        invert: a.Invert = None,
        feather: a.Feather = None,
        negative_prompt: a.NegativePrompt = None,
        seed: a.Seed = None,
        variants: a.Variants = None,
        quality: a.Quality = None,
        steps: a.Steps = None,
        guidance: a.Guidance = None,
        strength: a.Strength = None,
        model: a.Model = None,
        output: a.Output = None,
        preview: a.Preview = False,
    ) -> Annotated[CallToolResult, a.Painted]:
        """Paint what the prompt says where a mask, points or a box mark. Everything else stays, pixel by pixel."""
        fields = _given(
            points=points, box=box, dilate=dilate, erode=erode, fill_holes=fill_holes, smooth=smooth, invert=invert,
            feather=feather, negative_prompt=negative_prompt, seed=seed, variants=variants, quality=quality,
            steps=steps, guidance=guidance, strength=strength, model=model,
        )  # fmt: skip
        call = partial(self._client.replace, prompt=prompt, **fields)
        return await self._painted(ctx, call, "replaced", (image, image_data), (mask, mask_data), output, preview)

    async def models(self, ctx: Context) -> Annotated[CallToolResult, a.Archives]:
        """List the models that the server has, and which are in memory."""

        async def work(progress: OnProgress) -> CallToolResult:
            archives = [a.Archive.model_validate(each, from_attributes=True) for each in await self._client.models()]
            return _result(a.Archives(models=archives), [])

        return await _answered(ctx, work)

    async def _painted(
        self,
        ctx: Context,
        call: Callable[..., Awaitable[AsyncEdit]],
        word: str,
        image: tuple[str | None, str | None],
        mask: tuple[str | None, str | None],
        output: str | None,
        preview: bool,
    ) -> CallToolResult:
        """What erase and replace have in common. word: for the names of files."""

        async def work(progress: OnProgress) -> CallToolResult:
            picture = await self._picture("image", *image)
            hole = await self._picture("mask", *mask) if any(mask) else None
            target = await self._target(output)
            edit = await call(picture.source, mask=hole and hole.source, progress=progress)
            base = target or (picture.path and places.beside(picture.path, word))
            format = files.format_of(base) if base else showing.format_to_show(picture.source.data)
            results, images, warnings = list[a.Result](), list[ImageContent](), list(edit.warnings)
            for each in edit.variants:
                made = await _delivered(base, await each.file(format), preview, shown=len(edit.variants))
                results.append(a.Result(id=each.id, path=made.path, seed=each.seed))
                images += made.images
                warnings += made.warnings
            told = a.Painted(results=results, box=edit.box and list(edit.box), warnings=warnings)
            return _result(told, images)

        return await _answered(ctx, work)

    async def _picture(self, field: str, name: str | None, data: str | None) -> Given:
        """name: a path or an id. data: base64. Raises Refused and OSError."""
        if (name is None) == (data is None):
            raise Refused(f"give either {field}, a path or an id, or {field}_data, a file as base64")
        if data is not None:
            return Given(File(await anyio.to_thread.run_sync(showing.decoded, data, f"{field}_data")))
        assert name is not None
        if _ID.fullmatch(name):
            return Given(Upload(name))

        def read() -> Given:
            path = self._places.source(name, field)
            return Given(File(places.read(path)), path)

        return await anyio.to_thread.run_sync(read)

    async def _target(self, output: str | None) -> Path | None:
        return None if output is None else await anyio.to_thread.run_sync(self._places.target, output)


class _Delivered(NamedTuple):
    path: str | None
    images: list[ImageContent]
    warnings: list[str]


async def _delivered(base: Path | None, data: bytes, preview: bool = False, shown: int = 1) -> _Delivered:
    """What was made: in a new file, where there is a name for it, else shown. preview: shows it in any case.

    shown: how many pictures the reply may have.
    """
    path = None if base is None else str(await anyio.to_thread.run_sync(places.write_new, base, data))
    if path and not preview:
        return _Delivered(path, [], [])
    image, warnings = await anyio.to_thread.run_sync(showing.shown, data, showing.MOST_SHOWN // shown)
    return _Delivered(path, [image], [] if path else warnings)


async def _answered(ctx: Context, work: Callable[[OnProgress], Awaitable[CallToolResult]]) -> CallToolResult:
    """Does the work, and tells how far it is meanwhile. Raises ToolError with what the caller should know."""
    send, receive = anyio.create_memory_object_stream[Progress](_NEWS)

    async def pass_on() -> None:
        news = News()
        async with receive:
            async for each in receive:
                await ctx.report_progress(*news.of(each))

    def tell(progress: Progress) -> None:
        with suppress(anyio.WouldBlock):
            send.send_nowait(progress)

    result: CallToolResult | None = None
    refusal = ""
    async with anyio.create_task_group() as group:
        group.start_soon(pass_on)
        with send:
            try:
                result = await work(tell)
            except (PalimpsestError, OSError, ValueError) as error:
                refusal = _in_words(error)
    if result is None:
        raise ToolError(refusal)
    return result


def _in_words(error: Exception) -> str:
    if isinstance(error, Unreachable):
        return f"{error}: start it with `palimpsest serve`, or name its address with --server"
    if isinstance(error, NotFound) and error.code == "image_not_found":
        return f"{error.field}: the server has it no more: give its path or its file again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _result(told: BaseModel, images: list[ImageContent]) -> CallToolResult:
    """Also as text, for programs that know no structured results."""
    said = told.model_dump(mode="json")
    return CallToolResult(content=[TextContent(text=json.dumps(said)), *images], structured_content=said)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
