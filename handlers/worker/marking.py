"""Lets what is logged in this process during a request say so, and nothing of what the request says."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from contract.marking import mark

QUOTING = ("diffusers", "transformers")
"""Libraries whose warnings quote the prompt, such as where it is longer than the model reads."""


class _Marking(logging.Formatter):
    """What another formatter makes of it, marked. A worker has one request at a time."""

    request = ""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return mark(self._inner.format(record), _Marking.request)


def install() -> None:
    """To be called once logging is set up."""
    for handler in logging.getLogger().handlers:
        if not isinstance(handler.formatter, _Marking):
            handler.setFormatter(_Marking(handler.formatter or logging.Formatter()))
    for name in QUOTING:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def of_request(request: str) -> Iterator[None]:
    """Inside of it what is logged is about the request of that id; empty: about none."""
    _Marking.request = request
    try:
        yield
    finally:
        _Marking.request = ""
