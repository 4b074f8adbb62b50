"""What the OpenAPI document says of keys."""

from typing import Any

from serve.gateway.access import scopes
from serve.gateway.access.credentials import COOKIE
from serve.gateway.access.guard import Guard

_SCHEMES: dict[str, dict[str, Any]] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key."},
    "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "A key."},
    "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "What logging in at /login gives."},
    "awsSigV4": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "AWS Signature Version 4, as boto3 makes it, with a key made by `palimpsest keys add --aws`.",
    },
}


def describe(document: dict[str, Any], guard: Guard) -> None:
    """Adds the schemes, and what each operation needs. All may be left out: a server without keys asks for none."""
    document["components"]["securitySchemes"] = _SCHEMES
    document["security"] = [*({name: []} for name in _SCHEMES), {}]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            needed = guard.needed(method.upper(), path)
            if needed is scopes.OPEN:
                operation["security"] = []
                continue
            one = " or ".join(sorted(needed))
            operation["responses"].setdefault("401", {"description": "The server asks for a key, and has no such one."})
            operation["responses"].setdefault("403", {"description": f"The key lacks the scope {one}."})
