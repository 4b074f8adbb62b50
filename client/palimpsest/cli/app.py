"""What the command line takes. Defaults are the server's: what is not given is not sent."""

import importlib.metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from palimpsest.fields import EraseQuality, ReplaceQuality

SERVER, GROUP = "palimpsest", "palimpsest.commands"
"""The server's distribution, and a group of its entry points: Typer applications whose commands are ours, too."""


class Commands(TyperGroup):
    """Our commands, and the server's where it is installed, which are imported only where they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self._of_server()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or self._of_server().get(cmd_name)

    def _of_server(self) -> dict[str, Any]:
        try:
            # Not all distributions' entry points: that takes 10 ms for 100 of them.
            points = importlib.metadata.distribution(SERVER).entry_points.select(group=GROUP)
        except importlib.metadata.PackageNotFoundError:
            return {}
        groups: list[Any] = [typer.main.get_command(point.load()) for point in points]
        return {name: command for group in groups for name, command in group.commands.items()}


app = typer.Typer(cls=Commands, no_args_is_help=True, help="Select, erase and replace what is in pictures.")

Inputs = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="Pictures, folders of pictures, or patterns: 'photos/*.jpg'.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A folder; of a single picture also a file, whose suffix says the format."),
]
At = Annotated[list[str] | None, typer.Option("--at", metavar="X,Y", help="A point on the object; may be repeated.")]
Not = Annotated[
    list[str] | None, typer.Option("--not", metavar="X,Y", help="A point on what does not belong to it; repeatable.")
]
Box = Annotated[str | None, typer.Option("--box", metavar="L,T,R,B", help="A box around the object.")]
Dilate = Annotated[int | None, typer.Option(help="Grow the mask by so many pixels.")]
Erode = Annotated[int | None, typer.Option(help="Shrink the mask by so many pixels, first.")]
FillHoles = Annotated[bool | None, typer.Option("--fill-holes", help="Add what the mask encloses.")]
Smooth = Annotated[int | None, typer.Option(help="Round the mask's edge over so many pixels.")]
Invert = Annotated[bool | None, typer.Option("--invert", help="Select everything else instead.")]
Mask = Annotated[
    Path | None,
    typer.Option(help="What to change, white on black: a picture for all, or a folder with one for each, of its name."),
]
Feather = Annotated[int | None, typer.Option(help="Fade the paint in over so many pixels, inside the mask.")]
Quality = typer.Option("--quality", help="How much time to take.")
ModelName = Annotated[str | None, typer.Option("--model", help="The archive to ask.")]
SegmentModel = Annotated[str | None, typer.Option(help="The archive that turns points and box into a mask.")]
Server = Annotated[str | None, typer.Option(envvar="PALIMPSEST_SERVER", metavar="URL", help="Where the server is.")]
Parallel = Annotated[int, typer.Option(min=1, max=32, help="Requests at a time.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@app.callback()
def main() -> None:
    """A callback keeps the commands named."""


@app.command()
def segment(
    inputs: Inputs,
    output: Output = None,
    at: At = None,
    not_at: Not = None,
    box: Box = None,
    dilate: Dilate = None,
    erode: Erode = None,
    fill_holes: FillHoles = None,
    smooth: Smooth = None,
    invert: Invert = None,
    model: ModelName = None,
    server: Server = None,
    parallel: Parallel = 4,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Select what points or a box show: a mask for each picture, white on black, as PNG in the folder `masks`."""
    fields = _selection(at, not_at, box) | _given(
        dilate=dilate, erode=erode, fill_holes=fill_holes, smooth=smooth, invert=invert, model=model
    )
    _run("segment", inputs, output, None, fields, server, parallel, force, dry_run, as_json)


@app.command()
def erase(
    inputs: Inputs,
    output: Output = None,
    mask: Mask = None,
    at: At = None,
    not_at: Not = None,
    box: Box = None,
    dilate: Dilate = None,
    erode: Erode = None,
    fill_holes: FillHoles = None,
    smooth: Smooth = None,
    invert: Invert = None,
    feather: Feather = None,
    quality: Annotated[EraseQuality | None, Quality] = None,
    model: ModelName = None,
    segment_model: SegmentModel = None,
    server: Server = None,
    parallel: Parallel = 4,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Remove what a mask, points or a box mark: the pictures keep names and formats, in the folder `erased`."""
    fields = _selection(at, not_at, box) | _given(
        dilate=dilate,
        erode=erode,
        fill_holes=fill_holes,
        smooth=smooth,
        invert=invert,
        feather=feather,
        quality=quality,
        model=model,
        segment_model=segment_model,
    )
    _run("erase", inputs, output, mask, fields, server, parallel, force, dry_run, as_json)


@app.command()
def replace(
    inputs: Inputs,
    prompt: Annotated[str, typer.Option(help="What to paint.")],
    output: Output = None,
    mask: Mask = None,
    at: At = None,
    not_at: Not = None,
    box: Box = None,
    dilate: Dilate = None,
    erode: Erode = None,
    fill_holes: FillHoles = None,
    smooth: Smooth = None,
    invert: Invert = None,
    feather: Feather = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    variants: Annotated[int | None, typer.Option(min=1, help="So many of each: NAME-1, NAME-2, ...")] = None,
    quality: Annotated[ReplaceQuality | None, Quality] = None,
    steps: Annotated[int | None, typer.Option(help="More are slower and finer.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of what is there to forget, 0 to 1.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Instead of the quality's own.")] = None,
    model: ModelName = None,
    segment_model: SegmentModel = None,
    server: Server = None,
    parallel: Parallel = 4,
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Paint what the prompt says where a mask, points or a box mark, in the folder `replaced`."""
    fields = _selection(at, not_at, box) | _given(
        prompt=prompt,
        dilate=dilate,
        erode=erode,
        fill_holes=fill_holes,
        smooth=smooth,
        invert=invert,
        feather=feather,
        negative_prompt=negative_prompt,
        seed=seed,
        variants=variants,
        quality=quality,
        steps=steps,
        guidance=guidance,
        strength=strength,
        scheduler=scheduler,
        model=model,
        segment_model=segment_model,
    )
    _run("replace", inputs, output, mask, fields, server, parallel, force, dry_run, as_json)


@app.command()
def mcp(
    server: Server = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(
            "--folder",
            exists=True,
            file_okay=False,
            help="Pictures are read and written below it; repeatable. If absent, the working directory.",
        ),
    ] = None,
    http: Annotated[
        int | None,
        typer.Option(
            metavar="PORT", min=1, max=65535, help="Serve http://127.0.0.1:PORT/mcp, not standard input and output."
        ),
    ] = None,
) -> None:
    """Serve the Model Context Protocol: programs that chat with a model have it segment, erase and replace."""
    folders = folder or [Path.cwd()]
    if not folder and folders[0].parent == folders[0]:
        raise typer.BadParameter(f"the working directory is {folders[0]}: say with --folder where pictures are")
    try:
        from palimpsest.mcp.server import listening, run
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is missing: pip install 'palimpsest-client[mcp]'") from None
    from palimpsest.async_client import AsyncClient
    from palimpsest.http import DEFAULT_URL

    try:
        client = AsyncClient(server or DEFAULT_URL)
    except ValueError as error:
        raise typer.BadParameter(f"--server: {error}") from None
    try:
        listener = listening(http) if http else None
    except OSError as error:
        raise typer.BadParameter(f"--http {http}: {error.strerror}") from None
    run(client, folders, listener)


def _run(
    verb: str,
    inputs: list[str],
    output: Path | None,
    mask: Path | None,
    fields: dict[str, Any],
    server: str | None,
    parallel: int,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if not mask and not {"points", "box"} & fields.keys():
        raise typer.BadParameter("say where: --at X,Y or --box L,T,R,B" + ("" if verb == "segment" else ", or --mask"))
    # Imported here: whoever starts a server with this command does not wait for numpy, Pillow and httpx.
    from palimpsest.cli import batch, plan, report

    try:
        tasks = plan.plan(verb, inputs, output, mask, fields.get("variants", 1), force)
    except plan.Unusable as error:
        raise typer.BadParameter(str(error)) from None
    shown = report.Report(verb, tasks, as_json)
    if dry_run:
        shown.plan()
        return
    try:
        work = batch.Batch(verb, fields, server, force, shown)
    except ValueError as error:
        raise typer.BadParameter(f"--server: {error}") from None
    code = work.run(tasks, parallel)
    shown.end()
    raise typer.Exit(code)


def _selection(at: list[str] | None, not_at: list[str] | None, box: str | None) -> dict[str, Any]:
    points = [_numbers("--at", each, 2) for each in at or ()]
    points += [[*_numbers("--not", each, 2), 0] for each in not_at or ()]
    return _given(points=points or None, box=None if box is None else _numbers("--box", box, 4))


def _numbers(option: str, text: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise typer.BadParameter(f"{option} {text!r}: {count} numbers with commas between them are wanted")
    return numbers


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
