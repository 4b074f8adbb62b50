"""What a request is for, by its path and headers alone: a model, or the box that keeps something of the client's."""

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote

from serve.store.catalog import DEMO
from serve.store.unpack import SUFFIXES

MODEL_HEADER = b"x-palimpsest-model"
"""Names the model of a request whose path does not: in the body it may lie behind megabytes."""
SAGEMAKER_HEADER = b"x-amzn-sagemaker-target-model"
LONGEST = 256

_MODELS = re.compile(r"/(?:predictions|explanations|v1/models|v2/models|models)/+(.+)")
_NOT_THE_NAME = re.compile(r"(/(invoke|infer|load|unload|pin|unpin|warm)|:[a-z]+|/[0-9]+(\.[0-9]+)*)$", re.ASCII)
_SUFFIX = re.compile("(" + "|".join(map(re.escape, SUFFIXES)) + ")$")
_KEPT = re.compile(r"/v1/(?:images|jobs)/[^/.]+\.([a-z0-9]+)", re.ASCII)
# As the fields of these requests have it where they do not say.
_EDITS = {"/v1/segment": "sam", "/v1/erase": "lama", "/v1/replace": "sd", "/v1/images/edits": "sd"}


class Target(NamedTuple):
    """One of them, or neither: any box will do then."""

    model: str = ""
    box: str = ""

    def __str__(self) -> str:
        return f"@{self.box}" if self.box else self.model

    @classmethod
    def read(cls, text: str) -> "Target":
        """Of what str() made."""
        return cls(box=text[1:]) if text.startswith("@") else cls(text)


def target_of(path: str, headers: Iterable[tuple[bytes, bytes]]) -> Target:
    """path: percent-encoding undone. headers: names in lower case."""
    path = path.rstrip("/")
    if kept := _KEPT.fullmatch(path):
        return Target(box=kept[1])
    if path in _EDITS or path.startswith("/endpoints/"):
        named = MODEL_HEADER if path in _EDITS else SAGEMAKER_HEADER
        model = next((value.decode("latin-1") for name, value in headers if name == named), _EDITS.get(path, ""))
        return Target(routed(model))
    found = _MODELS.fullmatch(path)
    return Target(routed(_NOT_THE_NAME.sub("", found[1]))) if found else Target()


def routed(name: str) -> str:
    """By what a model is known to routers: one name, however a request spells it and whichever set is served."""
    plain = _SUFFIX.sub("", unquote(name).lstrip("/"))
    return plain.removeprefix(f"{DEMO}/")[:LONGEST]
