"""Keys: what each may do, the file that they are kept in, and those of the environment.

A key is 256 random bits, so that a plain SHA-256 of it gives nothing away: slow or salted hashes are for passwords,
which can be guessed. AWS signatures are another matter. Whoever checks one needs the very secret that made it, so that
keys made for them (`keys add --aws`), and only those, are in the file as they are; its owner alone can read it.
"""

import base64
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve.errors import PalimpsestError
from serve.settings import OFF, Settings

logger = logging.getLogger(__name__)

MOST_KEYS = 200
MOST_BYTES = 256 * 1024  # of the file
LONGEST = 512  # bytes of a key
SHORTEST = 32  # characters of a key that somebody else made
LOOK_EVERY = 1.0  # seconds between two looks whether the file has changed
LOCK_SECONDS = 10.0  # that another `keys add` or `keys revoke` may take

_PREFIX = "pk_"  # so that those who look for leaked secrets can tell one
_CHOSEN = re.compile(rf"[!-+\--~]{{{SHORTEST},{LONGEST}}}", re.ASCII)  # printable, no comma


class Scope(StrEnum):
    EDIT = "edit"
    OPERATE = "operate"


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Key(BaseModel):
    """sha256: of the key, in hex. secret: the key itself, where signatures are to be checked by it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: Name
    scopes: Annotated[list[Scope], Field(min_length=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: Annotated[str, Field(max_length=40)] = ""
    secret: Annotated[str | None, Field(max_length=LONGEST, repr=False)] = None

    @property
    def access_key_id(self) -> str | None:
        """What AWS clients call it by: 90 bits that tell nothing of the key, and that nobody guesses."""
        if self.secret is None:
            return None
        return "PK" + base64.b32encode(hashlib.sha256(b"access key id" + self.secret.encode()).digest())[:18].decode()


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    keys: Annotated[list[Key], Field(max_length=MOST_KEYS)]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        if len({key.name for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same name")
        return self


class KeysError(PalimpsestError):
    """The keys cannot be read or written; the message quotes none of them."""


class KeySet:
    """Keys as they are at one moment."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self.keys = tuple(keys)
        self._digests = [(bytes.fromhex(key.sha256), key) for key in self.keys]
        self._by_id = {key.access_key_id: key for key in self.keys if key.secret is not None}
        self._by_digest = {key.sha256: key for key in self.keys}

    def find(self, presented: bytes) -> Key | None:
        """Takes the same time for any that is none, and for any that is one."""
        digest = hashlib.sha256(presented[: LONGEST + 1]).digest()
        found = None
        for own, key in self._digests:
            if hmac.compare_digest(own, digest):
                found = key
        return found

    def by_access_key_id(self, name: str) -> Key | None:
        return self._by_id.get(name)

    def still(self, key: Key) -> Key | None:
        """None once it was revoked, also where another has its name by now."""
        return self._by_digest.get(key.sha256)


class Keys:
    """Those of the environment, and those of the file as it is now.

    Once there has been a file, its keys are asked for: one that vanishes or cannot be read lets nobody in.
    """

    def __init__(self, file: Path, own: Iterable[Key] = ()) -> None:
        """own: those of the environment."""
        self._file, self._own = file, tuple(own)
        self._due, self._seen = 0.0, False
        self._version: tuple[int, ...] | None = None
        self._failed = ""
        self._now = KeySet(self._own) if self._own else None

    def current(self) -> KeySet | None:
        """None where there have never been any: whoever reaches the server may use it."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + LOOK_EVERY
            self._look()
        return self._now

    def _look(self) -> None:
        try:
            version = _version(os.stat(self._file))
            if version == self._version:
                return
            keys, failed = read(self._file), ""
        except FileNotFoundError:
            if not self._seen:
                return
            version, keys, failed = None, [], "it is gone"
        except OSError as error:
            version, keys, failed = None, [], str(error.strerror)
        except KeysError as error:
            version, keys, failed = None, [], error.message
        if failed and failed != self._failed:
            logger.error("no key of %s is accepted: %s", self._file, failed)
        self._seen, self._version, self._failed = True, version, failed
        self._now = KeySet((*self._own, *keys))


def _version(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def of_settings(settings: Settings) -> Keys | None:
    """None where there are to be none. Raises KeysError."""
    return None if settings.keys.get_secret_value() == OFF else Keys(file_of(settings), of_environment(settings))


def file_of(settings: Settings) -> Path:
    return settings.keys_file or settings.state / "keys.json"


def of_environment(settings: Settings) -> list[Key]:
    """Those of PALIMPSEST_KEYS. Raises KeysError, which quotes nothing of it."""
    text = settings.keys.get_secret_value()
    if text == OFF:
        return []
    found = []
    entries = [each.strip() for each in text.split(",") if each.strip()]
    for number, entry in enumerate(entries, 1):
        name, _, rest = entry.partition(":")
        scopes, _, key = rest.partition(":")
        if not _CHOSEN.fullmatch(key):
            raise _unusable(number, f"the key itself must have {SHORTEST} to {LONGEST} printable characters")
        try:
            found.append(_key(name, scopes.split("+"), key, keep=True))
        except ValidationError:
            raise _unusable(number, "the name or the scopes are none") from None
    if len({key.name for key in found}) < len(found) or len(found) > MOST_KEYS:
        raise KeysError(f"PALIMPSEST_KEYS has two keys of one name, or more than {MOST_KEYS}")
    return found


def _unusable(number: int, why: str) -> KeysError:
    return KeysError(
        f"PALIMPSEST_KEYS is {OFF}, or keys as name:edit:KEY,name:edit+operate:KEY; of number {number} {why}"
        " (`openssl rand -hex 32` makes one)"
    )


def _key(name: str, scopes: Iterable[str], key: str, keep: bool, created: str = "") -> Key:
    """keep: whether the key itself is remembered. Raises ValidationError."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    told = {"name": name, "scopes": sorted(set(scopes)), "sha256": digest, "created": created}
    return Key.model_validate(told | ({"secret": key} if keep else {}))


def existing(settings: Settings) -> list[Key]:
    """Those of the file; none where there is no file. Raises KeysError."""
    file = file_of(settings)
    try:
        return read(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KeysError(f"{file} cannot be read: {error.strerror}") from None


def read(file: Path) -> list[Key]:
    """Raises OSError, and KeysError where it is none of keys."""
    with file.open("rb") as opened:
        content = opened.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise KeysError(f"{file} has more than {MOST_BYTES} bytes")
    try:
        return _File.model_validate_json(content).keys
    except ValidationError as error:
        where = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"]))
        raise KeysError(f"{file} is no file of keys ({where or 'its contents'}): `palimpsest keys` writes it") from None


def add(file: Path, name: str, scopes: Iterable[Scope], keep: bool) -> tuple[str, Key]:
    """Makes a key and returns it, with what is written of it. Raises KeysError.

    keep: whether the file has the key itself, for AWS signatures.
    """
    text = _PREFIX + secrets.token_urlsafe(32)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        key = _key(name, scopes, text, keep, created)
    except ValidationError:
        raise KeysError("a name has up to 64 letters, digits, dots, dashes and underscores") from None

    def with_it(keys: list[Key]) -> list[Key]:
        if any(each.name == name for each in keys):
            raise KeysError(f"there is a key of the name {name}: revoke it first, or take another name")
        if len(keys) >= MOST_KEYS:
            raise KeysError(f"there are {MOST_KEYS} keys already: revoke one first")
        return [*keys, key]

    _change(file, with_it)
    return text, key


def revoke(file: Path, name: str) -> None:
    """Raises KeysError where there is none of that name."""

    def without_it(keys: list[Key]) -> list[Key]:
        left = [each for each in keys if each.name != name]
        if len(left) == len(keys):
            raise KeysError(f"{file} has no key of that name: `palimpsest keys list` shows them")
        return left

    _change(file, without_it)


def _change(file: Path, change: Callable[[list[Key]], list[Key]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file.parent):
            keys = read(file) if file.exists() else []
            _write(file, _File(keys=change(keys)))
    except OSError as error:
        raise KeysError(f"{file} cannot be changed: {error.strerror}") from None


def _write(file: Path, content: _File) -> None:
    """In one step, and never readable by others, not even for a moment."""
    new = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            opened.write(content.model_dump_json(indent=2, exclude_none=True))
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(file)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Against another that changes the file meanwhile; the folder is what is locked, so that nothing is left there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    deadline = time.monotonic() + LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
