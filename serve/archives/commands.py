"""`palimpsest archives`: build, list, export, index."""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich import progress as bars
from rich.console import Console

from handlers.building.checkpoint import CheckpointError
from serve.archives import export as exporting
from serve.archives import index as indexing
from serve.archives.build import BuildError, build_demo, build_full, demo_names
from serve.archives.weights import (
    NotAvailable,
    SearchFolders,
    WeightsError,
    default_names,
    missing_report,
    read_weights,
)
from serve.store_url import shown

SMALL = 16 << 20  # bytes; less than this needs no bar


class Models(StrEnum):
    AUTO = "auto"
    FULL = "full"
    DEMO = "demo"


def _folder(text: str) -> Path:
    if "://" in text:
        raise typer.BadParameter(
            f"{shown(text)} is on a URL, and this needs a folder: put its archives there as .tar.gz or .mar"
        )
    return Path(text)


StoreOption = Annotated[
    Path, typer.Option(envvar="PALIMPSEST_STORE", parser=_folder, metavar="FOLDER", help="It holds the archives.")
]
STORE = Path("model-store")

archives_app = typer.Typer(no_args_is_help=True, help="Build archives into the store, list them, export them.")
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


@archives_app.command()
def build(
    names: Annotated[list[str] | None, typer.Argument(help="Archives to build; all default ones if none.")] = None,
    models: Annotated[
        Models, typer.Option(envvar="PALIMPSEST_MODELS", help="auto is full where --from is given, else demo.")
    ] = Models.AUTO,
    given: Annotated[
        Path | None,
        typer.Option("--from", exists=True, file_okay=False, help="A folder with the published checkpoint files."),
    ] = None,
    store: StoreOption = STORE,
    state: Annotated[
        Path, typer.Option(envvar="PALIMPSEST_STATE", help="Folder for downloads, which are kept.")
    ] = Path(".palimpsest"),
) -> None:
    """Build archives from the published checkpoints (full) or from what the repository carries (demo)."""
    with one_message_per_error(store):
        if models is Models.FULL or (models is Models.AUTO and given):
            missing = ensure_full(store, SearchFolders(state / "downloads", given), names or [])
            if missing:
                _fail(missing)
        else:
            _build_demo(names or [], store)


@archives_app.command("list")
def list_archives(store: StoreOption = STORE) -> None:
    """Show what can be built and what the store holds."""
    full = [(name, store / name, weights.licence) for name, weights in read_weights().items()]
    demo = [(f"demo/{name}", store / "demo" / name, "part of this repository") for name in demo_names()]
    for name, folder, licence in full + demo:
        built = (folder / "MAR-INF" / "MANIFEST.json").is_file()
        size = f"{_size(folder) / 1e6:10,.1f} MB" if built else "    not built"
        print(f"{name:12} {size}  {licence}")


@archives_app.command()
def export(
    name: Annotated[str, typer.Argument(help="An archive in the store, such as sam or demo/sam.")],
    file_format: Annotated[exporting.Format, typer.Option("--format", help="mar or tar.gz; both run unchanged.")],
    models: Annotated[
        Models, typer.Option(envvar="PALIMPSEST_MODELS", help="With demo, sam means demo/sam, as for the server.")
    ] = Models.AUTO,
    store: StoreOption = STORE,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default NAME.FORMAT here.")] = None,
) -> None:
    """Write an archive as one file that a stock TorchServe or SageMaker serves."""
    with one_message_per_error(store):
        target = out or Path(f"{Path(name).name}.{file_format}")
        exporting.export(_find(store, name, models), file_format, target, _show)
        console.print(f"wrote {target} ({target.stat().st_size:,} bytes)")
        console.print(exporting.ADVICE)


@archives_app.command()
def index(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="It holds packed archives.")],
) -> None:
    """Say in a file what packed archives a folder holds: any web server makes a store of it then."""
    with one_message_per_error(folder):
        written, count = indexing.write(folder, _show)
        console.print(f"wrote {written} ({count:,} packed archives)")


def _find(store: Path, name: str, models: Models) -> Path:
    """Finds an archive as the server does: in the demo set first, or, as long as the full one is not built, too."""
    order = [store / "demo" / name, store / name]
    for folder in order if models is Models.DEMO else order[::-1] if models is Models.AUTO else order[1:]:
        if exporting.is_archive(folder):
            return folder
    return store / name


def ensure_full(store: Path, folders: SearchFolders, names: Sequence[str] = ()) -> str | None:
    """Builds the full-size archives that are not up to date; all default ones if no names are given.

    Returns None, or a report of every file that is not to be had and of the commands that fetch it.
    """
    known = read_weights()
    _require_known(names, known, "full")
    unavailable: list[NotAvailable] = []
    for name in names or default_names(known):
        try:
            build_full(known[name], store, folders, _show, console.print)
        except NotAvailable as error:
            unavailable.append(error)
    if not unavailable:
        return None
    command = ["palimpsest", "archives", "build", "--models", "full", "--store", str(store)]
    return missing_report(unavailable, folders.given or Path("checkpoints"), command)


@contextmanager
def one_message_per_error(store: Path) -> Iterator[None]:
    """Turns what can go wrong with archives into one clear line and exit code 1."""
    try:
        yield
    except (WeightsError, CheckpointError, BuildError, exporting.ExportError, indexing.IndexFull) as error:
        _fail(str(error))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        _fail(f"The disk is full: nothing in {store} was changed." if full else str(error))


def _build_demo(names: Sequence[str], store: Path) -> None:
    _require_known(names, demo_names(), "demo")
    for name in names or demo_names():
        if not build_demo(name, store, console.print):
            console.print(f"{name}: up to date in {store / 'demo' / name}")


def _require_known(names: Sequence[str], known: Iterable[str], models: str) -> None:
    for name in names:
        if name not in known:
            _fail(f"There is no {models} archive {name}; with --models {models} there are {', '.join(known)}.")


def _fail(message: str) -> NoReturn:
    console.print(message)
    raise typer.Exit(1)


@contextmanager
def _show(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one line in a log, nothing for what takes no time."""
    if total is not None and total < SMALL:
        yield lambda done: None
        return
    if not console.is_terminal:
        console.print(what if total is None else f"{what} ({total:,} bytes)")
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task(what, total=total)
        yield lambda done: display.advance(task, done)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
