"""This machine's part of the cluster: `ray start --block` as a child, with whose end all that it started ends."""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from serve.cluster.entrance import TARGET
from serve.engine import homes, processes
from serve.preflight import Unusable
from serve.settings import Settings
from serve.store_url import StoreUrl

PLACE = "box"  # Ray's resource of which each box takes one
START_SECONDS = 120.0
LEAVE_SECONDS = 10.0  # that a door tells who asks after its health that it is going, before it goes
END_SECONDS = 60.0  # for boxes to end what they started
WORKER_PORTS = range(10002, 20000)  # Ray's choice for its processes
STORE_BYTES = 256 << 20  # of Ray's object store, through which no picture goes
DOOR = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.cluster.entrance:middlewares",
    "RAY_SERVE_SESSION_ID_HEADER_KEY": TARGET.decode(),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # each box finds its GPU itself
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What Ray has to have in its environment on each machine, whoever starts it."""
_LAST_WORDS = 2000
_SOCKET = "/palimpsest-12345678/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store"
_SERVING = ("ray::ServeReplica", "ray::ProxyActor")  # what Ray calls their processes
_STARTED = "Ray runtime started"
_ADDRESS = re.compile(r"--address='([^']+)'")


class Node(NamedTuple):
    """name: of this machine's part, as Ray's other parts know it. address: the head's, as HOST:PORT."""

    process: subprocess.Popen[bytes]
    name: str
    address: str

    def serves(self) -> bool:
        """Whether boxes run here, or a door through which requests come."""
        family = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        return any(_title(each).startswith(_SERVING) for each in family)


def environment(settings: Settings, token: Path) -> dict[str, str]:
    """What all of Ray's processes on this machine have in theirs: the settings, and how they know each other."""
    fields = settings.model_dump(mode="json", exclude_none=True) | {
        "keys": settings.keys.get_secret_value(),
        "key": settings.key.get_secret_value(),
        "store": settings.store.full if isinstance(settings.store, StoreUrl) else settings.store,
    }
    return {
        **os.environ,
        **{f"PALIMPSEST_{name.upper()}": str(value) for name, value in fields.items()},
        # Ray's doors are open to the network, and who comes in may run anything: only who has the token does.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        **DOOR,
        "RAY_raylet_start_wait_time_s": f"{START_SECONDS:g}",
        "FORWARDED_ALLOW_IPS": settings.proxies,  # uvicorn believes this machine unless it is told
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": f"{LEAVE_SECONDS:g}",
        "RAY_ROTATION_MAX_BYTES": str(10 << 20),
        "RAY_ROTATION_BACKUP_COUNT": "2",
    }


def new_token(file: Path) -> None:
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(secrets.token_hex(32))


@contextlib.contextmanager
def running(log: Path, environ: dict[str, str], join: str | None, port: int, places: int) -> Iterator[Node]:
    """Starts it: as the head, on the port, or beside the one at the address. Raises Unusable with Ray's words.

    places: for boxes on this machine.
    """
    homes.sweep(_SOCKET)
    home = homes.Home(_SOCKET)
    head = ["--head", "--port", str(port), "--include-dashboard", "false"]
    name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    place = ["--node-name", name, *(["--address", join] if join else head)]
    place += ["--temp-dir", str(home.path), "--resources", json.dumps({PLACE: places})]
    limits = ["--object-store-memory", str(STORE_BYTES)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *place, *limits],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=processes.die_with_parent,
        )
    try:
        found = _started(process, log)
        yield Node(process, name, join or found)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        process.kill()
        process.wait()
        home.remove()


def _started(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that Ray tells; empty where it tells none."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        if _STARTED in text:
            found = _ADDRESS.search(text)
            return found[1] if found else ""
        time.sleep(0.1)
    raise Unusable(f"Ray did not start: {log.read_text(errors='replace')[-_LAST_WORDS:]}")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
