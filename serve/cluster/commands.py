"""`palimpsest cluster`: this machine as the head of many, or beside the head; what runs there, and its end.

Ray is imported only once its environment is set: it reads that while it is imported.
"""

import contextlib
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve import __version__, pid_file, preflight, startup
from serve.cluster import node
from serve.cluster.places import places_here
from serve.settings import Settings

TOKEN = "cluster.token"  # noqa: S105 - in STATE: who has it may run anything on the cluster's machines
PID, ADDRESS = "cluster.pid", "cluster.address"  # in STATE, while it runs
PORT = 6380

cluster_app = typer.Typer(no_args_is_help=True, help="Many servers behind one address, one for each GPU.")
console = Console(highlight=False, soft_wrap=True, markup=False)

Boxes = Annotated[
    int | None, typer.Option(min=0, help="Servers on this machine; unless given one for each GPU, or for four cores.")
]


@cluster_app.command()
def up(
    boxes: Boxes = None,
    port: Annotated[int, typer.Option(help="Port on which other machines join.")] = PORT,
) -> None:
    """Serve on this machine, in the foreground, and on all that join, behind PALIMPSEST_HOST and PALIMPSEST_PORT."""
    if port in node.WORKER_PORTS:
        first, last = node.WORKER_PORTS[0], node.WORKER_PORTS[-1]
        raise preflight.Unusable(f"--port {port}: Ray gives {first} to {last} to its processes, choose another")
    settings = _ready()
    preflight.check_door(settings)
    token = settings.state / TOKEN
    node.new_token(token)
    with _running(settings, token, None, port, boxes) as running:
        from serve.cluster.service import Service

        service = Service(settings, running.address)
        try:
            _say(f"Palimpsest is ready: {preflight.url(settings)}")
            _say(f"On other machines: palimpsest cluster join {running.address} --token-file COPY, a copy of {token}")
            _until_told_to_end(running)
        finally:
            service.end()


@cluster_app.command()
def join(
    address: Annotated[str, typer.Argument(help="Of the head, as `up` tells it.")],
    token_file: Annotated[Path, typer.Option(help="A copy of the head's STATE/cluster.token.")],
    boxes: Boxes = None,
) -> None:
    """Serve beside the head, in the foreground, until Ctrl-C: what runs finishes then, unless told a second time."""
    settings = _ready()
    if not os.access(token_file, os.R_OK):
        raise preflight.Unusable(f"--token-file {token_file} cannot be read: copy the head's STATE/{TOKEN} there")
    with _running(settings, token_file.absolute(), address, 0, boxes) as running:
        _say(f"This machine belongs to {address}.")
        _until_told_to_end(running)
        _leave(settings, running)


@cluster_app.command()
def status() -> None:
    """Show the servers of the cluster: where each is, what it has in memory, how busy it is."""
    _, address = _head()
    from serve.cluster import service

    table = Table("server", "machine", "ready", "parked", "runs", "waits")
    for name, told in sorted(service.boxes(address).items()):
        ready, parked = ", ".join(told["ready"]), ", ".join(told["parked"])
        table.add_row(name, told["machine"], ready, parked, str(told["leases"]), str(told["queue"]))
    console.print(table)


@cluster_app.command()
def update() -> None:
    """Replace the servers of the whole cluster, one after another, by such that run what is installed now.

    Requests go on meanwhile. Install the new version on each machine before. The doors stay as `up` and `join` started
    them.
    """
    settings, address = _head()
    from serve.cluster import service

    _say("Replacing the servers, one after another...")
    try:
        service.update(settings, address)
    except RuntimeError as error:
        raise preflight.Unusable(
            f"the new version does not start, and the old one serves on where it ran: {error}"
        ) from error
    _say(f"All servers run {__version__}.")


@cluster_app.command()
def down(timeout: Annotated[float, typer.Option(help="Seconds to wait for running requests.")] = 120) -> None:
    """End what `up` or `join` started on this machine."""
    settings = preflight.read_settings()
    process = pid_file.process_of(settings.state / PID)
    if process is None:
        _say("Nothing of a cluster runs here.")
    elif pid_file.terminate(process, timeout):
        _say("Stopped.")
    else:
        raise preflight.Unusable(f"process {process.pid} still runs after {timeout:g} s: try again")


def _ready() -> Settings:
    """The settings of what this machine can serve: its archives are there. Raises Unusable."""
    if importlib.util.find_spec("ray") is None:
        raise preflight.Unusable("a cluster needs Ray: pip install 'palimpsest[cluster]'")
    settings = preflight.read_settings()
    preflight.check_machine(settings)
    return settings.model_copy(update={"models": startup.ready_models(settings, _say)})


@contextlib.contextmanager
def _running(settings: Settings, token: Path, join: str | None, port: int, boxes: int | None) -> Iterator[node.Node]:
    """Ray's part on this machine."""
    environment = node.environment(settings, token)
    os.environ |= environment
    places = places_here() if boxes is None else boxes
    with (
        pid_file.held(settings.state / PID),
        node.running(settings.state / "logs" / "ray.log", environment, join, port, places) as running,
        _told(settings.state / ADDRESS, running.address),
    ):
        yield running


def _leave(settings: Settings, running: node.Node) -> None:
    """Until nothing is served here any more, or there is no more time, or it is told to end again."""
    from serve.cluster import service

    _say("What runs here finishes first...")
    seconds = settings.predict_timeout + settings.stop_timeout + node.END_SECONDS
    deadline = time.monotonic() + seconds
    try:
        service.leave(running.address, running.name, seconds)
    except (RuntimeError, OSError) as error:
        _say(f"The head does not answer: {error}")
        return
    told = _told_to_end()
    while running.serves() and time.monotonic() < deadline and not told.wait(0.5):
        pass


@contextlib.contextmanager
def _told(file: Path, text: str) -> Iterator[None]:
    file.write_text(text)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _head() -> tuple[Settings, str]:
    """The settings, and the address of this machine's cluster, of which this process may ask from then on."""
    settings = preflight.read_settings()
    try:
        address = (settings.state / ADDRESS).read_text()
    except OSError:
        raise preflight.Unusable(f"nothing of a cluster runs with PALIMPSEST_STATE={settings.state}") from None
    os.environ |= node.environment(settings, settings.state / TOKEN)
    return settings, address


def _until_told_to_end(running: node.Node) -> None:
    """Raises Unusable where Ray ends by itself, as it does where its head is lost."""
    told = _told_to_end()
    while not told.wait(1.0):
        if running.process.poll() is not None:
            raise preflight.Unusable("Ray has ended here: STATE/logs/ray.log says why")


def _told_to_end() -> threading.Event:
    """Set by Ctrl-C, SIGTERM, or the end of the terminal. Ray has handlers of its own, which would not clean up."""
    told = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, lambda *_: told.set())
    return told


def _say(text: Any) -> None:
    with contextlib.suppress(OSError):
        console.print(text)
