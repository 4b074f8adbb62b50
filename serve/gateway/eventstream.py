"""AWS's event stream encoding (application/vnd.amazon.eventstream), in which the runtime API streams its replies."""

import struct
from collections.abc import AsyncIterator
from zlib import crc32

MEDIA_TYPE = "application/vnd.amazon.eventstream"

_TEXT = 7
_PART = {":message-type": "event", ":event-type": "PayloadPart", ":content-type": "application/octet-stream"}


async def payload_parts(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The body's pieces as PayloadPart events. botocore accepts 24 MiB in one message, far more than a piece has."""
    async for piece in pieces:
        yield encode(_PART, piece)


def encode(headers: dict[str, str], payload: bytes) -> bytes:
    """One message. Big-endian: total length, headers' length, CRC-32 of these two; headers; payload; CRC-32 of all."""
    block = b"".join(_header(name.encode(), value.encode()) for name, value in headers.items())
    prelude = struct.pack("!II", 16 + len(block) + len(payload), len(block))
    message = prelude + struct.pack("!I", crc32(prelude)) + block + payload
    return message + struct.pack("!I", crc32(message))


def _header(name: bytes, value: bytes) -> bytes:
    return struct.pack("!B", len(name)) + name + struct.pack("!BH", _TEXT, len(value)) + value
