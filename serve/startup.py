"""From settings to what a server is made of: the models that it shows, the memory that it has, the application."""

from collections.abc import Callable
from typing import NamedTuple

import psutil
from fastapi import FastAPI

from serve.archives import build
from serve.archives.commands import ensure_full, one_message_per_error
from serve.archives.weights import SearchFolders, default_names, read_weights
from serve.engine.supervisor import Supervisor
from serve.errors import StoreUnreachable
from serve.gateway.app import create_app
from serve.gateway.peers import ALONE, Peers
from serve.preflight import Unusable
from serve.residency.memory import Device, Memory, find_device, parse_budget
from serve.settings import ModelSet, Settings
from serve.store.catalog import DEMO, Catalog
from serve.store.mirror import Mirror

Say = Callable[[str], None]

TURN = 0.001
"""Seconds after which the event loop gets its turn, instead of 5 ms: bodies are read and hashed in threads."""


class Assembled(NamedTuple):
    """supervisor: of the application's TorchServe; its end() is for what an event loop did not come to."""

    application: FastAPI
    supervisor: Supervisor


def assemble(
    settings: Settings,
    catalog: Catalog,
    memory: Memory,
    on_output: Callable[[bytes], None],
    peers: Peers = ALONE,
) -> Assembled:
    """on_output: told of all that TorchServe prints, in blocks."""
    supervisor = Supervisor(settings, memory.device.gpu)
    supervisor.on_output = on_output
    return Assembled(create_app(settings, catalog, supervisor, memory, peers), supervisor)


def catalog_of(settings: Settings, say: Say) -> Catalog:
    """Raises as ready_models."""
    return Catalog(settings.store, settings.cache, ready_models(settings, say) == DEMO, settings.cache_mib << 20)


def ready_models(settings: Settings, say: Say) -> ModelSet:
    """Builds the archives that are due and not there, and returns which set it is.

    Raises Unusable, and SystemExit where an archive cannot be built.
    """
    catalog = Catalog(settings.store, settings.cache, demo=False)
    with one_message_per_error(catalog.folder):
        if catalog.mirror:
            demo, reason = _choose_there(settings, catalog, catalog.mirror, say)
        else:
            demo, reason = _choose_models(settings, catalog, say)
        say(f"Models: {DEMO if demo else 'full'} ({reason})")
        if demo:
            build.ensure_demo(catalog.folder, say)
    return "demo" if demo else "full"


def memory_of(settings: Settings, device: Device, say: Say) -> Memory:
    """Raises Unusable."""
    budget = _budget("MEMORY_BUDGET", settings.memory_budget, device.total)
    host_budget = _budget("HOST_BUDGET", settings.host_budget, psutil.virtual_memory().total)
    if budget == 0:
        raise Unusable("PALIMPSEST_MEMORY_BUDGET must be more than 0")
    say(f"Memory budget: {budget / 2**20:,.0f} MiB of {device.name}'s {device.total / 2**20:,.0f} MiB")
    if settings.suspend and not device.suspends:
        say(f"PALIMPSEST_SUSPEND has no effect: the driver of {device.name} has no process checkpoint")
    return Memory(device, budget, settings.state / "footprints.json", host_budget, settings.suspend)


def device_here() -> Device:
    """Raises Unusable."""
    try:
        return find_device()
    except ValueError as error:
        raise Unusable(str(error)) from None


def _choose_there(settings: Settings, catalog: Catalog, mirror: Mirror, say: Say) -> tuple[bool, str]:
    """As _choose_models, of a store on a URL, for which nothing is built."""
    try:
        mirror.sync()
    except StoreUnreachable as error:
        known = "what is known of it is served" if mirror.is_known else "nothing is known of it yet: requests get 503"
        say(f"{error.message}; {known}")
    if settings.models != "auto":
        return settings.models == DEMO, f"MODELS={settings.models}"
    full = default_names(read_weights())
    missing = [name for name in full if name not in catalog.names()]
    if not mirror.is_known or not missing:
        return False, f"{', '.join(full)} are looked for in {settings.store}"
    return True, f"{settings.store} has no {', '.join(missing)}"


def _choose_models(settings: Settings, catalog: Catalog, say: Say) -> tuple[bool, str]:
    """Returns (whether to serve the demo set, the reason in words); builds the full set where it is due."""
    if settings.models == DEMO:
        return True, "MODELS=demo"
    full = default_names(read_weights())
    if set(full) <= set(catalog.names()):
        return False, f"{', '.join(full)} are built in {catalog.folder}"
    if settings.models == "auto" and device_here().gpu is None:
        return True, "no CUDA GPU and no full-size archives here; MODELS=full would build them"
    missing = ensure_full(catalog.folder, SearchFolders(settings.state / "downloads", None))
    if missing is None:
        return False, "just built"
    if settings.models == "full":
        raise Unusable(missing)
    say(missing)
    return True, "there is a CUDA GPU, but the checkpoints named above are not to be had here"


def _budget(setting: str, text: str, total: int) -> int:
    try:
        return parse_budget(text, total)
    except ValueError as error:
        raise Unusable(f"PALIMPSEST_{setting} {error}") from None
