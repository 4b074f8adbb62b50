"""How a line that a worker prints says which request it is about."""

import re

_MARK = re.compile(r"\[request ([A-Za-z0-9][A-Za-z0-9._:=@+/-]{0,127})\] (.*)", re.ASCII)


def mark(text: str, request: str) -> str:
    """The text with each of its lines marked. request: the id; empty: not marked."""
    return "\n".join(f"[request {request}] {line}" for line in text.splitlines()) if request else text


def marked(line: str) -> tuple[str, str]:
    """The request's id, empty where it says none, and what the line says."""
    match = _MARK.fullmatch(line)
    return (match[1], match[2]) if match else ("", line)
