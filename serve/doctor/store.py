"""The archives: which there are, and which are damaged."""

import time
import zipfile
import zlib
from gzip import GzipFile
from pathlib import Path

from serve import preflight
from serve.archives.build import lost_files
from serve.doctor.finding import Finding, Findings, ok, problem, warning
from serve.errors import StoreUnreachable
from serve.residency.seed import read_seed
from serve.settings import Settings
from serve.store.catalog import DEMO, Archive, Catalog
from serve.store.digests import RECORD
from serve.store.mirror import Mirror
from serve.store.unpack import MANIFEST

READING_SECONDS = 10.0  # for all packed archives together
LISTED = 20


def archives(settings: Settings) -> Findings:
    catalog = Catalog(settings.store, settings.cache, demo=False)
    if catalog.mirror:
        yield _reached(catalog.mirror, settings)
    names = catalog.names()
    deadline = time.monotonic() + READING_SECONDS
    for name in names:
        archive = catalog.find(name)
        # What is still elsewhere is looked at when it was fetched.
        packed = None if catalog.mirror else archive.file
        trouble = _damage(packed, deadline) if packed else _lost(archive)
        advice = f"Build it anew ({_build(name)}), or copy it here again."
        if trouble:
            yield problem("archives", f"{name} is damaged: {trouble}", advice)
        elif (archive.path / RECORD).is_file() and not read_seed(archive).takes_commands:
            yield warning("archives", f"{name} is of another version: it is never parked", advice)
    if names:
        yield ok("archives", f"{len(names)}: {', '.join(names[:LISTED])}{' and more' if len(names) > LISTED else ''}")
    elif settings.models == "full":
        advice = "Run palimpsest archives build --models full, or serve with MODELS=demo."
        yield warning("archives", f"none in {settings.store}, and MODELS is full: they are built at the start", advice)
    else:
        yield ok("archives", "none yet: they are built at the start")


def _reached(mirror: Mirror, settings: Settings) -> Finding:
    try:
        preflight.require_store(settings)
        mirror.sync()
    except preflight.Unusable as error:
        return problem("STORE", f"{mirror.url} cannot be used", str(error))
    except StoreUnreachable as error:
        advice = "Look at its address, its credentials and the network; what is in the cache can be served."
        return problem("STORE", error.message, advice)
    return ok("STORE", f"{mirror.url} answers")


def _build(name: str) -> str:
    demo = name.startswith(f"{DEMO}/")
    return f"palimpsest archives build --models {'demo' if demo else 'full'} {name.removeprefix(f'{DEMO}/')}"


def _lost(archive: Archive) -> str:
    lost = lost_files(archive.path)
    return f"{', '.join(lost)} missing or cut off" if lost else ""


def _damage(file: Path, deadline: float) -> str:
    """Why a packed archive can't be unpacked; empty where it can, as far as it could be read until the deadline."""
    try:
        with file.open("rb") as content:
            if content.read(2) != b"\x1f\x8b":
                with zipfile.ZipFile(file) as packed:
                    return "" if MANIFEST in packed.namelist() else f"it holds no {MANIFEST}"
            content.seek(0)
            with GzipFile(fileobj=content) as stream:
                while time.monotonic() < deadline and stream.read(1 << 20):
                    pass
    except EOFError:
        return "it ends too early"
    except (OSError, zlib.error, zipfile.BadZipFile) as error:
        return str(error)
    return ""
