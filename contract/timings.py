"""What a request's stages took: seconds by name, as gateway and worker measure them.

queue, or load where the model was not in memory: until the request had its turn. engine: from there to the answer, of
which the worker says more: decode (files to pixels), encode (pixels to files), model (what else it did). SAM has embed,
or recall where it knew the picture, and mask. keep: until the result had an id.
"""

from collections.abc import Mapping

HEADER = "server-timing"


def server_timing(timings: Mapping[str, float]) -> str:
    """The header's value (W3C, Server Timing): milliseconds."""
    return ", ".join(f"{name};dur={ms}" for name, ms in in_milliseconds(timings).items())


def in_milliseconds(timings: Mapping[str, float]) -> dict[str, float]:
    """Rounded to hundredths."""
    return {name: round(1000 * seconds, 2) for name, seconds in timings.items()}
