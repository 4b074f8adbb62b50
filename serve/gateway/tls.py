"""TLS: the certificate, which may be renewed while the server runs, and the handshake in front of a connection."""

import asyncio
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.errors import PalimpsestError
from serve.gateway.connections import Doorkeeper
from serve.gateway.protocol import Connection
from serve.logs.record import Record

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
SHUTDOWN_SECONDS = 30.0  # for a client to take what was written, once its connection is to be closed
LOOK_EVERY = 1.0  # seconds between two looks whether the files have changed

# Of TLS 1.2, which some clients still speak: with forward secrecy and authenticated only.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class TlsError(PalimpsestError):
    """Certificate and key cannot be used; the message names the setting."""


class Certificate:
    """The server's, as the files have it. A pair that cannot be used leaves the one in force that there was.

    Changed files count once a second look finds them as the first did: nobody writes two at the same moment.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises TlsError."""
        self._files = certificate, key
        self._due = time.monotonic() + LOOK_EVERY
        self._known = self._seen = self._stamps()
        self._context = load(certificate, key)

    def context(self) -> ssl.SSLContext:
        """For the next connection; those that there are keep theirs."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + LOOK_EVERY
            self._look()
        return self._context

    def _look(self) -> None:
        seen, self._seen = self._seen, self._stamps()
        if self._seen == self._known or self._seen != seen:
            return
        self._known = self._seen
        try:
            self._context = load(*self._files)
        except TlsError as error:
            logger.error("the certificate is not renewed, the one before it goes on: %s", error.message)
        else:
            logger.warning("the certificate was renewed from %s", self._files[0])

    def _stamps(self) -> list[tuple[int, ...] | None]:
        """What changes with the files, also where they are links and the links change."""
        return [_stamp(file) for file in self._files]


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def load(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 and 1.3. Raises TlsError."""
    for setting, file in (("PALIMPSEST_TLS_CERT", certificate), ("PALIMPSEST_TLS_KEY", key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise TlsError(f"{setting}={file} cannot be read ({error.strerror})") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    asked = False

    def password() -> str:  # else OpenSSL asks whoever sits at the terminal
        nonlocal asked
        asked = True
        return ""

    try:
        context.load_cert_chain(certificate, key, password)
    except (ssl.SSLError, OSError, ValueError) as error:
        if asked:
            why = "the key is encrypted: `openssl pkey -in KEY -out PLAIN` takes its password off"
        elif getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            why = "the key is not that of the certificate, which has to be the first in its file"
        else:
            why = "they have to be in PEM form, the certificate first and those that vouch for it behind"
        raise TlsError(
            f"PALIMPSEST_TLS_CERT={certificate} and PALIMPSEST_TLS_KEY={key} cannot be used: {why}"
        ) from None
    return context


class Handshake(asyncio.Protocol):
    """A connection that does not speak TLS yet: it counts as any other, and waits as any other.

    asyncio's own handshake begins before anybody could count it. So its connection comes here as if it were plain, and
    is taken off the transport it came with, before that has read anything.
    """

    def __init__(
        self, certificate: Certificate, doorkeeper: Doorkeeper, on_refused: Callable[[Record], None], **uvicorn: Any
    ) -> None:
        """on_refused, uvicorn: as Connection takes them."""
        self._certificate, self._doorkeeper, self._on_refused = certificate, doorkeeper, on_refused
        self._uvicorn = uvicorn
        self._connections: set[Any] = uvicorn["server_state"].connections
        self._socket: socket.socket | None = None  # until the handshake has begun
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        own = transport.get_extra_info("socket")
        peer = transport.get_extra_info("peername")
        if self._doorkeeper.admit(self, peer[0] if peer else ""):
            self._socket = socket.socket(fileno=os.dup(own.fileno()))
            self._socket.setblocking(False)
            self._connections.add(self)
            self._task = asyncio.get_running_loop().create_task(self._shake_hands())
        transport.abort()  # where it is not admitted, without a word: nothing can be said before the handshake

    async def _shake_hands(self) -> None:
        taken, self._socket = self._socket, None
        assert taken is not None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._connection,
                taken,
                ssl=self._certificate.context(),
                ssl_handshake_timeout=HANDSHAKE_SECONDS,
                ssl_shutdown_timeout=SHUTDOWN_SECONDS,
            )
        except OSError:  # an ssl.SSLError is one, too
            pass
        finally:
            self.end()

    def _connection(self) -> Connection:
        return _Secure(self, self._doorkeeper, self._on_refused, **self._uvicorn)

    def end(self) -> None:
        """The handshake is over, however it ended."""
        self._connections.discard(self)
        self._doorkeeper.gone(self)

    # As the doorkeeper and the server see it

    def unsent(self) -> int:
        return 0

    def drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._socket is not None:
            self._socket.close()
        self.end()

    def shutdown(self) -> None:
        """uvicorn's, when the server stops: nothing has been asked yet."""
        self.drop()


class _Secure(Connection):
    """What the handshake becomes."""

    def __init__(self, handshake: Handshake, *arguments: Any, **uvicorn: Any) -> None:
        super().__init__(*arguments, **uvicorn)
        self._handshake = handshake

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._handshake.end()  # its place is this one's
        super().connection_made(transport)
