"""The end of a connection, which lets the client read what was written to it, within bounds."""

import asyncio
from collections.abc import Callable

SILENCE_SECONDS = 5.0  # without progress, once the connection is to be closed
LINGER_SECONDS = 30.0  # for a client that still sends what nobody reads, to notice the answer
UNREAD_SECONDS = 300.0  # for a client to take the rest of its last reply


class Line:
    """A transport as uvicorn's protocol sees it; close() ends it once all that was written has left.

    A client that still sends is let go on for a while, unread: if its connection were closed, the system would tell it
    of that with an error, in place of the answer.

    on_close: called once, by close(); returns whether the client still sends. heard(): to be called when it does.
    """

    def __init__(self, wire: asyncio.Transport, loop: asyncio.AbstractEventLoop, on_close: Callable[[], bool]) -> None:
        self.write, self.abort, self.get_extra_info = wire.write, wire.abort, wire.get_extra_info
        self.pause_reading, self.resume_reading = wire.pause_reading, wire.resume_reading
        self._wire, self._loop, self._on_close = wire, loop, on_close
        self._secure = wire.get_extra_info("sslcontext") is not None
        self._closing = self._heard = False
        self._unsent = 0  # at the last look
        self._give_up = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def is_closing(self) -> bool:
        return self._closing or self._wire.is_closing()

    def unsent(self) -> int:
        """Bytes that the client has not taken yet."""
        return 0 if self._wire.is_closing() else self._wire.get_write_buffer_size()

    def heard(self) -> None:
        self._heard = True

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        still_sends = self._on_close()
        if self._wire.is_closing():
            return
        left = self.unsent()
        if not still_sends and (not left or self._secure):
            self._wire.close()  # TLS sends what is left, within SHUTDOWN_SECONDS of serve/gateway/tls.py
            return
        if not self._secure:  # it has no end of one direction
            self._wire.write_eof()
        self._give_up = self._loop.time() + (UNREAD_SECONDS if left else LINGER_SECONDS)
        self._look_later()

    def lost(self) -> None:
        """The connection is gone."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()

    def _look_later(self) -> None:
        self._unsent, self._heard = self.unsent(), False
        self._timer = self._loop.call_later(SILENCE_SECONDS, self._look)

    def _look(self) -> None:
        if (self._heard or self.unsent() < self._unsent) and self._loop.time() < self._give_up:
            self._look_later()
        else:
            self.abort()
