"""The server's commands of `palimpsest`."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from serve import models_table, pid_file, preflight, startup
from serve.archives.commands import archives_app
from serve.cluster.commands import cluster_app
from serve.doctor import report
from serve.doctor.finding import Status
from serve.errors import PalimpsestError
from serve.gateway.access.commands import keys_app
from serve.gateway.access.keys import of_settings as keys_of
from serve.gateway.server import Server
from serve.logs.writer import Writer, logging_begun
from serve.residency.memory import Memory
from serve.settings import Settings
from serve.store.catalog import Catalog


@contextlib.contextmanager
def _one_line_per_error() -> Iterator[None]:
    """Errors of ours become one line, not a traceback."""
    try:
        yield
    except PalimpsestError as error:
        raise SystemExit(f"palimpsest: {error.message}") from None
    except preflight.Unusable as error:
        raise SystemExit(f"palimpsest: {error}") from None


class _Command(TyperCommand):
    def invoke(self, ctx: Any) -> Any:
        with _one_line_per_error():
            return super().invoke(ctx)


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with _one_line_per_error():
            return super().invoke(ctx)


# The client's `palimpsest` has these commands beside its own, by the entry point in pyproject.toml.
app = typer.Typer(no_args_is_help=True, add_completion=False, help="A picture-editing server for one GPU.")
app.add_typer(archives_app, name="archives", cls=_Group)
app.add_typer(keys_app, name="keys", cls=_Group)
app.add_typer(cluster_app, name="cluster", cls=_Group)
models_app = typer.Typer()
app.add_typer(models_app, name="models", cls=_Group)
console = Console(highlight=False, soft_wrap=True)


@app.callback()
def main() -> None:
    """A callback keeps `serve` and `stop` named commands."""


@app.command(cls=_Command)
def serve() -> None:
    """Serve in the foreground until Ctrl-C; the settings are PALIMPSEST_* variables."""
    settings = _settings()
    try:
        preflight.check(settings)
        catalog = startup.catalog_of(settings, _say)
        memory = startup.memory_of(settings, startup.device_here(), _say)
    except preflight.Unusable as error:
        raise _fail(str(error)) from None
    _serve(settings, catalog, memory)


@app.command(cls=_Command)
def stop(timeout: Annotated[float, typer.Option(help="Seconds to wait for running requests.")] = 60) -> None:
    """Stop the server that runs on PALIMPSEST_PORT."""
    settings = _settings()
    process = pid_file.process_of(_pid_file(settings))
    if process is None:
        if found := preflight.listener(settings):
            raise _fail(f"no server of PALIMPSEST_STATE={settings.state} runs, but {found}")
        console.print(f"Nothing runs on port {settings.port}.")
        return
    if not pid_file.terminate(process, timeout):
        raise _fail(f"process {process.pid} still runs after {timeout:g} s: a request may take longer, try again")
    console.print("Stopped.")


@models_app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and end.")] = False,
) -> None:
    """Show the running server's models until Ctrl-C: where each is, what it takes, how it is used."""
    if context.invoked_subcommand is None:
        with contextlib.suppress(KeyboardInterrupt), _connection() as client:
            models_table.show(client, once, as_json, console)


@models_app.command()
def warm(name: Annotated[str, typer.Argument(help="The archive, e.g. sam or team/own.")]) -> None:
    """Read a model's archive into main memory, so that its next load does not wait for the disk."""
    with _connection() as client:
        models_table.warm(client, name, console)


@app.command(cls=_Command)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For a report of a fault; no secrets.")] = False,
) -> None:
    """Look at what the server needs of this machine, and say what to do; exit code 1 where there is a problem."""
    settings = _settings()
    findings = report.examine(settings, runs=pid_file.process_of(_pid_file(settings)) is not None)
    if as_json:
        print(report.as_json(findings))
    else:
        report.show(findings, console)
    if any(each.status is Status.PROBLEM for each in findings):
        raise typer.Exit(1)


def _serve(settings: Settings, catalog: Catalog, memory: Memory) -> None:
    with logging_begun(settings) as log:
        _serve_logged(settings, catalog, memory, log)


def _serve_logged(settings: Settings, catalog: Catalog, memory: Memory, log: Writer) -> None:
    application, supervisor = startup.assemble(settings, catalog, memory, log.engine_said)
    # uvicorn raises a signal once more after its shutdown; ours must not end the process before the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: None)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # the terminal was closed; under nohup it is ignored
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    sys.setswitchinterval(startup.TURN)
    began = time.monotonic()
    with contextlib.ExitStack() as starting:
        if console.is_terminal:
            starting.enter_context(console.status("Starting TorchServe"))

        def on_ready() -> None:
            starting.close()
            _announce(settings, time.monotonic() - began)

        server = Server(application, settings, on_ready)
        try:
            with pid_file.held(_pid_file(settings)), contextlib.suppress(KeyboardInterrupt):
                server.run()
        finally:
            supervisor.end()  # of what the event loop did not come to
    if not server.started:
        raise typer.Exit(1)
    _say("Stopped.")


def _announce(settings: Settings, seconds: float) -> None:
    url = preflight.url(settings)
    _say_what_has_no_effect(settings)
    _say(f"[bold]Palimpsest is ready[/bold] ({seconds:.1f} s): {url}  API: {url}/docs", markup=True)
    _say(f"Logs: {settings.state / 'logs'}   Store: {settings.store}")
    sample = Path(__file__).parent.parent / "tests" / "data" / "dog-on-bench.png"
    picture = os.path.relpath(sample) if sample.exists() else "picture.png"
    _say("Try a click:")
    key = ' -H "x-api-key: KEY"' if _asks_for_keys(settings) else ""
    _say(
        f"""  curl -s {url}/predictions/sam{key} -H 'Accept: image/png' -F image=@{picture} \\
    -F 'gen_args={{"point_coords": [750, 500], "dilate_kernel_size": 15}}' -o mask.png"""
    )
    _say("Ctrl-C stops everything.")


def _say_what_has_no_effect(settings: Settings) -> None:
    if "FORWARDED_ALLOW_IPS" in os.environ and not settings.proxies:
        _say("FORWARDED_ALLOW_IPS has no effect: PALIMPSEST_PROXIES names the reverse proxies in front of this server")


def _asks_for_keys(settings: Settings) -> bool:
    keys = keys_of(settings)
    if keys is None:
        _say("Whoever reaches it may use it: PALIMPSEST_KEYS=off")
    return keys is not None and keys.current() is not None


def _settings() -> Settings:
    try:
        return preflight.read_settings()
    except preflight.Unusable as error:
        raise _fail(str(error)) from None


def _connection() -> httpx.Client:
    """To the server that the settings name."""
    settings = _settings()
    try:
        trust = preflight.trust(settings)
    except preflight.Unusable as error:
        raise _fail(str(error)) from None
    return models_table.connection(preflight.url(settings), settings.key.get_secret_value(), trust)


def _pid_file(settings: Settings) -> Path:
    return settings.state / f"serve-{settings.port}.pid"


def _say(text: str, markup: bool = False) -> None:
    """What the server says is lost where it goes to a full disk; the server is not."""
    with contextlib.suppress(OSError):
        console.print(text, markup=markup)


def _fail(message: str) -> typer.Exit:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]palimpsest:[/red] {message}")
    return typer.Exit(1)


def run() -> None:
    """Runs the server's commands alone."""
    app()
