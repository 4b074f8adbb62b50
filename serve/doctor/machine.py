"""Ports, disks, memory, limits, the locale."""

import os
import shutil
from pathlib import Path

import psutil

from serve import disk, preflight
from serve.doctor.finding import Finding, Findings, gib, ok, problem, warning
from serve.engine import cgroups, cores, homes, supervisor
from serve.gateway import connections
from serve.gateway.access import keys as access
from serve.memory_file import MemoryFile
from serve.residency.memory import find_device, parse_budget
from serve.settings import Settings

LITTLE_DISK, LITTLE_MEMORY = 2 << 30, 4 << 30  # bytes
# What cannot be done where the folder cannot be written to; the server does without.
_LOST = {"STORE": "no archive can be built there", "CACHE": "no packed archive can be unpacked there"}
_NETWORK = ("nfs", "cifs", "smb", "fuse.sshfs", "fuse.gluster", "ceph", "lustre", "beegfs", "gpfs")


def ports(settings: Settings, runs: bool) -> Findings:
    try:
        supervisor.free_ports(supervisor.PORTS)
        if not runs:
            preflight.require_free_port(settings)
    except preflight.Unusable as error:
        yield problem("ports", f"{settings.port} is taken", str(error))
    except OSError as error:
        advice = "TorchServe listens on ports of 127.0.0.1: that address must be there."
        yield problem("ports", f"127.0.0.1 cannot be listened on ({error.strerror})", advice)
    else:
        yield ok("ports", f"{settings.port} is {'this server' if runs else 'free'}; 127.0.0.1 has free ones")


def config(settings: Settings) -> Findings:
    try:
        preflight.require_readable("CONFIG", settings.config)
    except preflight.Unusable as error:
        yield problem("configuration", "TorchServe's settings cannot be read", str(error))
    else:
        yield ok("configuration", str(settings.config))


def keys(settings: Settings) -> Findings:
    try:
        preflight.require_keys(settings)
    except preflight.Unusable as error:
        yield problem("keys", "the server would not start", str(error))
    else:
        asks = access.of_settings(settings)
        yield ok("keys", "are asked for" if asks and asks.current() else "none: whoever reaches the server may use it")


def disks(settings: Settings) -> Findings:
    try:
        preflight.require_temporary_folder()
        temporary = {"TMPDIR": Path(homes.temporary_folder())}
    except preflight.Unusable as error:
        yield problem("TMPDIR", "there is no temporary folder", str(error))
        temporary = {}
    folders = {"STATE": settings.state, "STORE": settings.store, "CACHE": settings.cache} | temporary
    for name, folder in folders.items():
        if isinstance(folder, Path):  # and not on a URL
            yield _disk(name, folder)


def _disk(name: str, folder: Path) -> Finding:
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    trouble = disk.trouble(there)
    found = f"{folder}: {gib(shutil.disk_usage(there).free)} free"
    advice = f"Make room there, or name another folder as {'TMPDIR' if name == 'TMPDIR' else f'PALIMPSEST_{name}'}."
    if trouble and name in _LOST:
        return warning(name, f"{folder} is {trouble}: {_LOST[name]}", advice)
    if trouble:
        return problem(name, f"{folder} is {trouble}", advice)
    if not there.is_dir() or not os.access(there, os.R_OK | os.X_OK | (0 if name == "STORE" else os.W_OK)):
        found = f"{folder} is no folder that this user may use"
        return warning(name, f"{found}: {_LOST[name]}", advice) if name == "CACHE" else problem(name, found, advice)
    if name == "CACHE" and (kind := _network_file_system(there)):
        advice = (
            "Other machines could remove what this one uses: name a folder on a disk of its own as PALIMPSEST_CACHE."
        )
        return warning(name, f"{folder} is on a disk of the network ({kind})", advice)
    if shutil.disk_usage(there).free < LITTLE_DISK:
        return warning(name, found, advice)
    return ok(name, found)


def _network_file_system(folder: Path) -> str:
    """Its kind; empty where the folder is on a disk of this machine."""
    mounts = [each for each in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(each.mountpoint)]
    kind = str(max(mounts, key=lambda each: len(each.mountpoint)).fstype) if mounts else ""
    return kind if kind.startswith(_NETWORK) else ""


def memory_files() -> Findings:
    """Pictures travel in files that are in memory only."""
    try:
        MemoryFile().close()
    except OSError as error:
        advice = "The container or its seccomp profile must allow memfd_create."
        yield problem("memory files", f"there can be none ({error.strerror})", advice)
    else:
        yield ok("memory files", "can be made; /dev/shm is not needed")


def memory(settings: Settings) -> Findings:
    total, limit = psutil.virtual_memory().total, cgroups.memory_limit()
    have = min(total, limit or total)
    bound = f", of which the control group grants {gib(have)}" if have < total else ""
    found = f"{gib(total)}{bound}; {cores.usable()} cores"
    for setting, text in _budgets(settings).items():
        try:
            budget = parse_budget(text, total)
        except ValueError as error:
            yield problem("memory", f"PALIMPSEST_{setting} {error}", "Set it anew, or unset it.")
            return
        if budget > have:
            advice = f"Set PALIMPSEST_{setting} to less than {have >> 20} (MiB), or raise the group's limit."
            yield warning("memory", f"{found}; PALIMPSEST_{setting} is {gib(budget)}", advice)
            return
    if have < LITTLE_MEMORY:
        yield warning("memory", found, f"The demo set runs in {gib(LITTLE_MEMORY)}; full-size models need 16 or more.")
    else:
        yield ok("memory", found)


def _budgets(settings: Settings) -> dict[str, str]:
    """Those that are of main memory."""
    own = {"HOST_BUDGET": settings.host_budget}
    try:
        on_gpu = find_device().gpu is not None
    except ValueError:  # the GPU's finding says why
        on_gpu = True
    return own if on_gpu else {"MEMORY_BUDGET": settings.memory_budget} | own


def open_files() -> Findings:
    granted = connections.descriptors_granted()
    most = connections.most_connections(granted)
    found = f"{granted:,}, enough for {most:,} connections"
    if most < connections.MOST:
        yield warning("open files", found, "Raise the hard limit: ulimit -Hn 65536, or LimitNOFILE= of the service.")
    else:
        yield ok("open files", found)


def locale() -> Findings:
    """Of the environment, which Java and the workers inherit."""
    name = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_CTYPE", "LANG"))), "C")
    if name.lower().replace("-", "").endswith("utf8"):
        yield ok("locale", name)
    else:
        yield warning("locale", f"{name} is not UTF-8", "Set LC_ALL=C.UTF-8: names of files would be misread.")
