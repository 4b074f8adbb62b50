"""The editing page at / and its login form: plain files from web/, by the hash of their content, and what a browser may
do with them."""

import base64
import gzip
import hashlib
import mimetypes
import re
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

router = APIRouter(include_in_schema=False)

_FOR_EVER = "public, max-age=31536000, immutable"
_TEXTS = ("text/", "image/svg", "application/json")
_STARTS = {"/": "index.html", "/login": "login.html"}
_HERE = "{files}"  # stands there for the folder of the other files
_INLINE = re.compile(rb"<script type=\"importmap\">(.*?)</script>", re.DOTALL)


class File(NamedTuple):
    """packed: the content as gzip has it; None where that makes it no smaller."""

    content: bytes
    packed: bytes | None
    content_type: str


class Start(NamedTuple):
    """What an address shows. tag: of this content and all the files that it may name."""

    file: File
    policy: str
    tag: str


class Page(NamedTuple):
    """starts: by address. files: the others, by their path under web/. version: the hash of all of them."""

    starts: dict[str, Start]
    files: dict[str, File]
    version: str


@cache
def page() -> Page:
    """Reads web/, once."""
    contents = dict(sorted(_contents(files("serve.gateway") / "web")))
    starts = {address: contents.pop(name) for address, name in _STARTS.items()}
    version = _hash(b"".join(name.encode() + b"\0" + _hash(data) for name, data in contents.items())).hex()[:16]
    others = {name: _file(name, data) for name, data in contents.items()}
    return Page({address: _start(html, version) for address, html in starts.items()}, others, version)


def _start(html: bytes, version: str) -> Start:
    html = html.replace(_HERE.encode(), f"web/{version}".encode())
    return Start(_file("start.html", html), _policy(html), f'"{version}-{_hash(html).hex()[:16]}"')


def _contents(folder: Traversable, below: str = "") -> list[tuple[str, bytes]]:
    found = []
    for each in folder.iterdir():
        name = below + each.name
        found += _contents(each, f"{name}/") if each.is_dir() else [(name, each.read_bytes())]
    return found


def _file(name: str, content: bytes) -> File:
    kind = {"js": "text/javascript"}.get(name.rpartition(".")[2]) or mimetypes.guess_type(name)[0] or "text/plain"
    text = kind.startswith(_TEXTS)
    packed = gzip.compress(content, mtime=0) if text else content
    return File(content, packed if len(packed) < len(content) else None, f"{kind}; charset=utf-8" if text else kind)


def _policy(index: bytes) -> str:
    """Nothing from elsewhere, nothing inline but the import map, which is named by its hash."""
    allowed = " ".join(f"'sha256-{base64.b64encode(_hash(text)).decode()}'" for text in _INLINE.findall(index))
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src 'self' {allowed}".rstrip(),
            "style-src 'self'",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "require-trusted-types-for 'script'",
            "trusted-types lit-html",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@router.get("/")
async def index(request: Request) -> Response:
    return _start_of(request, page().starts["/"])


@router.get("/login")
async def login(request: Request) -> Response:
    return _start_of(request, page().starts["/login"])


def _start_of(request: Request, start: Start) -> Response:
    """Asked for anew each time, and sent anew when it is another one."""
    headers = {"content-security-policy": start.policy, "cache-control": "no-cache", "etag": start.tag}
    if request.headers.get("if-none-match") == start.tag:
        return Response(status_code=304, headers=headers)
    return _reply(request, start.file, headers)


@router.get("/web/{version}/{name:path}")
async def file(version: str, name: str, request: Request) -> Response:
    """Never another content under the same address."""
    found = page().files.get(name) if version == page().version else None
    if found is None:
        raise HTTPException(404, "there is no such file of the page")
    return _reply(request, found, {"cache-control": _FOR_EVER})


def _reply(request: Request, file: File, headers: dict[str, str]) -> Response:
    headers["vary"] = "Accept-Encoding"
    if file.packed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.packed, headers=headers | {"content-encoding": "gzip"}, media_type=file.content_type)
    return Response(file.content, headers=headers, media_type=file.content_type)
