"""What must hold before a server starts; every message names the setting and says what to do."""

import errno
import importlib.util
import ipaddress
import os
import re
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pydantic
from pydantic_core import ErrorDetails

from serve.gateway import origins, proxies, tls
from serve.gateway.access import keys
from serve.healthcheck import reached_at
from serve.settings import OFF, Settings
from serve.store_url import BUCKETS, shown

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class Unusable(Exception):
    """A setting that the server cannot run with."""


def read_settings() -> Settings:
    """Raises Unusable."""
    try:
        return Settings()
    except pydantic.ValidationError as error:
        raise Unusable("; ".join(map(_words, error.errors()))) from None


def _words(error: ErrorDetails) -> str:
    setting = f"PALIMPSEST_{'.'.join(map(str, error['loc'])).upper().removeprefix('PALIMPSEST_')}"
    if error["type"] == "extra_forbidden":
        return f"{setting}: there is no such setting; docs/settings.md lists them"
    return f"{setting}: {error['msg']}, not {shown(str(error['input']))[:40]!r}"


def check(settings: Settings) -> None:
    """Makes the folders that are missing. Raises Unusable."""
    check_machine(settings)
    check_door(settings)


def check_machine(settings: Settings) -> None:
    require_readable("CONFIG", settings.config)
    _require_folder("STATE", settings.state, "the server keeps logs, downloads and its process id there")
    _require_folder("STATE", settings.state / "logs", "the server's and TorchServe's logs go there")
    require_temporary_folder()
    require_store(settings)


def check_door(settings: Settings) -> None:
    require_free_port(settings)
    require_keys(settings)
    require_tls(settings)
    require_proxies(settings)
    require_origins(settings)


def listener(settings: Settings) -> str:
    """What listens on the server's port, in a sentence, and what to do; empty if nothing does."""
    try:
        answer = httpx.get(f"{url(settings)}/ping", timeout=5, verify=trust(settings), trust_env=False)
    except httpx.ConnectError:
        return ""
    except (httpx.HTTPError, httpx.InvalidURL):
        answer = None
    process = _listening_process(settings.port)
    who = f"process {process.pid}" if process else "a process that this user cannot see"
    if answer is None or process is None or "palimpsest" not in " ".join(process.cmdline()):
        return f"{who} listens on port {settings.port}, and is no server of this state folder: end it by its own means"
    state = Path(process.cwd(), process.environ().get("PALIMPSEST_STATE", ".palimpsest"))
    return (
        f"the palimpsest on port {settings.port} ({who}) has another state folder: `PALIMPSEST_STATE={state}"
        f" PALIMPSEST_PORT={settings.port} palimpsest stop` stops it"
    )


def url(settings: Settings) -> str:
    """Returns the address at which this machine reaches the server."""
    host = reached_at(settings.host)
    scheme = "http" if settings.tls_cert is None else "https"
    return f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"


def trust(settings: Settings) -> ssl.SSLContext | bool:
    """What httpx is to trust at that address: the server's own certificate and no other, by whatever name it is called.

    Raises Unusable.
    """
    if settings.tls_cert is None:
        return False  # it is not https
    try:
        first = _CERTIFICATE.search(settings.tls_cert.read_text("latin-1"))
    except OSError as error:
        raise Unusable(f"PALIMPSEST_TLS_CERT={settings.tls_cert} cannot be read ({error.strerror})") from None
    if first is None:
        raise Unusable(f"PALIMPSEST_TLS_CERT={settings.tls_cert} has no certificate in PEM form")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=first[0])
    return context


def require_readable(setting: str, file: Path) -> None:
    try:
        file.read_bytes()
    except OSError as error:
        raise Unusable(
            f"PALIMPSEST_{setting}={file} cannot be read ({error.strerror}): name an existing file"
        ) from None


def require_store(settings: Settings) -> None:
    """A store on a URL need not be reached: what is in the cache can be served."""
    if isinstance(settings.store, Path):
        _require_folder("STORE", settings.store, "the server looks for archives there", written=False)
        return
    module = BUCKETS.get(settings.store.scheme)
    if module and importlib.util.find_spec(module) is None:
        raise Unusable(f"PALIMPSEST_STORE={settings.store} needs {module}: pip install {module}")
    _require_folder("CACHE", settings.cache, "what a store on a URL holds is kept there")


def _require_folder(setting: str, folder: Path, use: str, written: bool = True) -> None:
    """written: whether it must be possible to write there; archives may also lie on a read-only disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.listdir(folder)
        if written:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"x" * 4096)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "make room on its disk" if full else "name a folder that this user may use"
        reason = "a file is in its place" if isinstance(error, FileExistsError) else error.strerror
        raise Unusable(f"PALIMPSEST_{setting}={folder} cannot be used ({reason}): {use}; {todo}") from None


def require_temporary_folder() -> None:
    """tempfile looks for one that can be written to, in TMPDIR and four more."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise Unusable(
            "neither TMPDIR nor /tmp, /var/tmp or the working directory can be written to: TorchServe lives in a"
            " folder there; make room on their disk, or name another folder as TMPDIR"
        ) from None


def require_free_port(settings: Settings) -> None:
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise Unusable(f"PALIMPSEST_HOST={host} is no address or name of this machine: 127.0.0.1, say") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise Unusable(f"PALIMPSEST_HOST={host} is not an address of this machine: 127.0.0.1, say") from None
            raise Unusable(
                f"port {port} on {host} cannot be used ({error.strerror}). Set another PALIMPSEST_PORT, e.g."
                f" `make serve PORT={min(port + 1, 65535)}`, or end what listens there (`make stop` if it is ours)."
            ) from None


def require_keys(settings: Settings) -> None:
    """Where other machines reach the server there must be keys, or somebody must have said that there are none."""
    if settings.keys.get_secret_value() == OFF:
        return
    try:
        there = keys.of_environment(settings) + keys.existing(settings)
    except keys.KeysError as error:
        raise Unusable(error.message) from None
    if not there and not is_loopback(settings.host):
        raise Unusable(
            f"PALIMPSEST_HOST={settings.host} lets other machines in, and there is no key: make one with"
            " `palimpsest keys add NAME`, or set PALIMPSEST_KEYS=off if whoever reaches the server may use it"
        )


def require_tls(settings: Settings) -> None:
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise Unusable("PALIMPSEST_TLS_CERT and PALIMPSEST_TLS_KEY belong together: set both, or neither")
    if settings.tls_cert is not None and settings.tls_key is not None:
        try:
            tls.load(settings.tls_cert, settings.tls_key)
        except tls.TlsError as error:
            raise Unusable(error.message) from None


def require_proxies(settings: Settings) -> None:
    try:
        proxies.networks(settings.proxies)
    except ValueError as error:
        raise Unusable(f"PALIMPSEST_PROXIES={settings.proxies}: {error}") from None


def require_origins(settings: Settings) -> None:
    try:
        origins.origins(settings.origins)
    except ValueError as error:
        raise Unusable(f"PALIMPSEST_ORIGINS={settings.origins}: {error}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches all that the name means; not where it means nothing."""
    try:
        addresses = {each[4][0] for each in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


def _listening_process(port: int) -> psutil.Process | None:
    for process in _own_processes():
        try:
            connections = process.net_connections(kind="tcp")
        except psutil.Error:
            continue
        if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
            return process
    return None


def _own_processes() -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid():
                yield process
        except psutil.Error:
            continue
