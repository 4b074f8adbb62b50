"""What a model says of itself without being loaded: what it takes, what it imports, how its checkpoint is made.

Each model has one, DESCRIPTION in handlers/<name>/description.py. The model's own code reads its arguments by it; the
builder, the zygote, the APIs and their documents are made from it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

MAX_TEXT = 10_000
"""Characters of a text, such as a prompt."""


class Field(NamedTuple):
    """A part of a request beside gen_args. kind: "picture" (a mask is one) or "text"."""

    name: str
    kind: str
    help: str
    required: bool = True

    def schema(self) -> dict[str, Any]:
        """JSON Schema of its value in a JSON body."""
        if self.kind == "picture":
            return {"type": "string"}
        # A form that is made from this begins with the example, else with the word "string".
        return {"type": "string", "maxLength": MAX_TEXT, "examples": [""]}


class Integer(NamedTuple):
    """A whole number in [low, high]. default: None where the archive or the request decides, as help says."""

    name: str
    default: int | None
    low: int
    high: int
    help: str

    def schema(self) -> dict[str, Any]:
        """JSON Schema."""
        return _with_default({"type": "integer", "minimum": self.low, "maximum": self.high}, self.default)


class Number(NamedTuple):
    """A finite number in [low, high]. default: as Integer's."""

    name: str
    default: float | None
    low: float
    high: float
    help: str

    def schema(self) -> dict[str, Any]:
        """JSON Schema."""
        return _with_default({"type": "number", "minimum": self.low, "maximum": self.high}, self.default)


class Flag(NamedTuple):
    """true or false. default: as Integer's."""

    name: str
    default: bool | None
    help: str

    def schema(self) -> dict[str, Any]:
        """JSON Schema."""
        return _with_default({"type": "boolean"}, self.default)


class Choice(NamedTuple):
    """One of some words. default: as Integer's."""

    name: str
    default: str | None
    choices: tuple[str, ...]
    help: str

    def schema(self) -> dict[str, Any]:
        """JSON Schema."""
        return _with_default({"type": "string", "enum": list(self.choices)}, self.default)


class Structure(NamedTuple):
    """What has a form of its own, such as points. form: JSON Schema."""

    name: str
    form: Mapping[str, Any]
    help: str

    def schema(self) -> dict[str, Any]:
        """JSON Schema."""
        return dict(self.form)


Argument = Integer | Number | Flag | Choice | Structure


class Description(NamedTuple):
    """One model.

    title, summary: its name for people, and what goes in → what comes out. fields, arguments: of a request.
    imports: third-party modules that its workers import, at best all before the first request. converters: by the name
    that weights.toml gives a way from published files to the archive's, the function that goes it (handlers.building
    says how). random_weights: the function that draws a checkpoint of such a network. Functions are "module:name".
    demo: the folder beside the description that holds a tiny version, if there is one.
    """

    title: str
    summary: str
    fields: tuple[Field, ...]
    arguments: tuple[Argument, ...]
    imports: tuple[str, ...]
    converters: Mapping[str, str]
    random_weights: str
    demo: str | None = None


def _with_default(schema: dict[str, Any], default: object) -> dict[str, Any]:
    return schema if default is None else schema | {"default": default}
