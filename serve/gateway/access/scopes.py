"""Which scope each route needs. A path that has no rule is no route, and tells that to those who have a key."""

from typing import TypeAlias

from serve.gateway.access.keys import Scope

Needed: TypeAlias = frozenset[Scope]
"""One of these is enough; none: whoever reaches the server."""

OPEN: Needed = frozenset()
ANY: Needed = frozenset(Scope)
EDIT: Needed = frozenset({Scope.EDIT})
OPERATE: Needed = frozenset({Scope.OPERATE})

_OPEN = frozenset({"/", "/docs", "/openapi.json", "/api-description", "/ping", "/login", "/logout"})
# By the beginnings of paths, of which the first that fits counts: so a rule holds for whatever the router makes of the
# rest. Which models there are, the editing page shows.
_RULES: tuple[tuple[str, Needed, Needed], ...] = (
    # beginning, to look, to change
    ("/web/", OPEN, OPEN),
    ("/docs/files", OPEN, OPEN),
    ("/v1/models", ANY, OPERATE),
    ("/v1/state", ANY, OPERATE),
    ("/v1/", EDIT, EDIT),
    ("/v2/models/", EDIT, EDIT),
    ("/predictions/", EDIT, EDIT),
    ("/explanations/", EDIT, EDIT),
    ("/endpoints/", EDIT, EDIT),
    ("/models", OPERATE, OPERATE),
)
_LOOKING = {"GET", "HEAD", "OPTIONS"}


def needed(method: str, path: str, metrics: Needed) -> Needed | None:
    """path: as the router sees it. metrics: what /metrics needs. None where no rule fits."""
    if path in _OPEN:
        return OPEN
    if path.startswith("/metrics"):
        return metrics
    for beginning, looking, changing in _RULES:
        if path.startswith(beginning):
            return looking if method in _LOOKING else changing
    return None
