"""The address of a store that is no folder of this machine."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

BUCKETS = {"s3": "s3fs", "gs": "gcsfs"}
"""Schemes of buckets, and the package that speaks to each: fsspec's, which is not installed by default."""
_SCHEMES = ("http", "https", *BUCKETS)


@dataclass(frozen=True, repr=False)
class StoreUrl:
    """str() and repr() leave out what may be secret, the user, password and query: they are what logs and errors show.

    full: all of it.
    """

    full: str

    @classmethod
    def read(cls, text: str) -> "StoreUrl":
        """Raises ValueError, which says what to write instead and shows nothing secret."""
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise ValueError("this is no URL") from None
        if parts.scheme not in _SCHEMES:
            raise ValueError(f"a store is a folder, or a URL of {', '.join(_SCHEMES)}")
        if not host or not text.isprintable() or " " in text or "@" in parts.path or parts.fragment:
            raise ValueError(f"write it as {parts.scheme}://{'BUCKET' if parts.scheme in BUCKETS else 'HOST'}/FOLDER")
        if parts.scheme in BUCKETS and (parts.username is not None or parts.query):
            raise ValueError(f"credentials for {parts.scheme} are no part of its URL: see docs/scale.md")
        return cls(text)

    @property
    def scheme(self) -> str:
        return urlsplit(self.full).scheme

    def __str__(self) -> str:
        return shown(self.full)

    def __repr__(self) -> str:
        return f"StoreUrl({self})"


def shown(text: str) -> str:
    """A URL, be it usable or not, without what may be secret in it; other text as it is."""
    return re.sub(r"://.*@", "://", re.sub(r"[?#].*", "", text, flags=re.S), flags=re.S) if "://" in text else text
