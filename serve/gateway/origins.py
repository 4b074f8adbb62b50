"""Pages of other sites that may use this server: those that are named, and what browsers must be told for it (CORS)."""

import re
from typing import TypeAlias

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

Origins: TypeAlias = frozenset[str]

_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.ASCII)
DEFAULT_PORT = {"http": ":80", "https": ":443"}


def origins(text: str) -> Origins:
    """text: origins, separated by commas. Raises ValueError, which says what to write."""
    return frozenset(_origin(each.strip()) for each in text.split(",") if each.strip())


def let_read(app: ASGIApp, origins: Origins) -> ASGIApp:
    """Lets pages of these origins read the application's answers.

    They show a key where one is asked for: the cookie of the login is for the server's own page alone.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app, origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"], allow_private_network=True
    )


def _origin(text: str) -> str:
    """As browsers write it: in small letters, and without the port that its scheme implies."""
    origin = text.lower().removesuffix("/")
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{text!r} is no origin: name each page's scheme, host and port, as https://studio.example.org or"
            " http://localhost:3000"
        )
    return origin.removesuffix(DEFAULT_PORT[origin.partition("://")[0]])
