"""The client of Palimpsest, a server that selects, erases and replaces what is in pictures.

from palimpsest import Client

with Client("http://127.0.0.1:8080") as client:
    dog = client.segment("bench.jpg", points=[(750, 500)], dilate=8)
    client.erase("bench.jpg", mask=dog).save("empty-bench.jpg")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palimpsest.async_client import AsyncClient, AsyncEdit
    from palimpsest.client import Client, Edit
    from palimpsest.errors import (
        BadRequest,
        Busy,
        Cancelled,
        DeadlineExceeded,
        NoRoom,
        NotAllowed,
        NotFound,
        PalimpsestError,
        TooLarge,
        Unavailable,
        Unreachable,
    )
    from palimpsest.events import Progress
    from palimpsest.results import Model, Segmentation
    from palimpsest.sources import Upload

__all__ = [
    "AsyncClient",
    "AsyncEdit",
    "BadRequest",
    "Busy",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Edit",
    "Model",
    "NoRoom",
    "NotAllowed",
    "NotFound",
    "PalimpsestError",
    "Progress",
    "Segmentation",
    "TooLarge",
    "Unavailable",
    "Unreachable",
    "Upload",
    "__version__",
]

__version__ = "0.1.0"

_MODULES = ("client", "async_client", "results", "sources", "events", "errors")


def __getattr__(name: str) -> Any:
    """Imports what is asked for: a command line that starts a server does not wait for numpy, Pillow and httpx."""
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"palimpsest.{module}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
    raise AttributeError(f"module 'palimpsest' has no attribute {name!r}")
