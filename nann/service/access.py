"""Who may do what: API keys, and the four roles that they have.

A key is a secret that a caller sends with every request. The file of `--api-keys-file` holds one a line:

    # name        role     key, or the SHA-256 of one
    prometheus    metrics  sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    shop          read     q0gJ5mYt0bVf0mC2m1XbqC0m8kQyYw3v

Of a key only its hash is kept, and nothing here logs or repeats one. The file is looked at again when a
caller comes, at most once a second: a key that was taken out of it is refused from then on.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

from nann.service.errors import PermissionDenied, Unauthenticated
from nann.service.metrics import Metrics
from nann.service.settings import Settings, SettingsError
from nann.service.watched_files import WatchedFiles

__all__ = ["Access", "ApiKey", "Role", "bearer_key", "open_access", "read_api_keys"]

# How long a key may be good after it was taken out of the file; and the most often it is looked at.
_PAUSE_S: Final = 1.0
# A plain SHA-256 keeps a random secret as well as any slow hash, and a guessable one is refused by its
# length: 22 characters of base64 are 128 bits.
_MIN_KEY_LENGTH: Final = 22
_KEY: Final = re.compile(r"[\x21-\x7e]{1,1024}")
_NAME: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASHED: Final = re.compile(r"sha256:([0-9a-f]{64})")
_BEARER: Final = re.compile(r"(?i:bearer) +([\x21-\x7e]{1,1024}) *")


class Role(IntEnum):
    """What a key allows; each includes those before it."""

    METRICS = 1  # read metrics and the state of the process
    READ = 2  # retrieve, predict, read histories, ask for status and metadata
    WRITE = 3  # record events and delete users
    ADMIN = 4  # change what is served


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file; `digest` is the SHA-256 of the key."""

    name: str
    role: Role
    digest: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Access:
    """Decides who may do what. Without `keys` everyone may do everything.

    `keys` are those at start; `keys_now` gives those that hold when it is called, by default the same.
    """

    keys: tuple[ApiKey, ...] = ()
    open_metrics: bool = False
    open_docs: bool = False
    keys_now: Callable[[], tuple[ApiKey, ...]] | None = field(default=None, repr=False)

    @property
    def is_open(self) -> bool:
        """True when nobody needs a key."""
        return not self.keys

    def allow(self, presented: str | None, needed: Role) -> str:
        """The name of the caller, who presented a key and needs a role.

        Raises:
            Unauthenticated: there is no key, or nobody has this one.
            PermissionDenied: the key's role allows less.
        """
        if presented is None:
            raise Unauthenticated(
                "this needs an API key: send the header 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            )
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        known: ApiKey | None = None
        keys = self.keys if self.keys_now is None else self.keys_now()
        for key in keys:  # all of them, so that the time taken does not tell which came close
            if hmac.compare_digest(key.digest, digest):
                known = key
        if known is None:
            raise Unauthenticated("this API key is not valid")
        if known.role < needed:
            raise PermissionDenied(
                f"the API key {known.name!r} has the role {known.role.name.lower()}; "
                f"this needs {needed.name.lower()}"
            )
        return known.name


def bearer_key(authorization: str | None, api_key: str | None) -> str | None:
    """The key in ``Authorization: Bearer KEY``, else in ``X-API-Key``."""
    if authorization is not None and (match := _BEARER.fullmatch(authorization)):
        return match[1]
    return api_key


def open_access(
    settings: Settings, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
) -> Access:
    """The access that the settings ask for; raises SettingsError when the file of keys is wrong."""
    path = settings.api_keys_file
    if path is None:
        return Access()
    watched = WatchedFiles(
        "api_keys", [path], lambda: read_api_keys(path), metrics, pause_s=_PAUSE_S, clock=clock
    )
    return Access(watched.value, settings.open_metrics, settings.open_docs, watched.refresh)


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file; raises SettingsError, which names the line and never what it holds."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"--api-keys-file {path}: {reason}") from None
    keys = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            keys.append(_key(words, number))
        except ValueError as error:
            raise SettingsError(f"--api-keys-file {path}, line {number}: {error}") from None
    _check_unique(keys, path)
    return tuple(keys)


def _key(words: list[str], number: int) -> ApiKey:
    match words:
        case [secret]:
            return ApiKey(f"line-{number}", Role.WRITE, _digest(secret))
        case [name, role, secret]:
            if not _NAME.fullmatch(name):
                raise ValueError("a name is 1 to 64 letters, digits and '._@-'")
            if role.upper() not in Role.__members__:
                raise ValueError("a role is metrics, read, write or admin")
            return ApiKey(name, Role[role.upper()], _digest(secret))
        case _:
            raise ValueError("expected NAME ROLE KEY, or a KEY alone")


def _digest(secret: str) -> bytes:
    if hashed := _HASHED.fullmatch(secret):
        return bytes.fromhex(hashed[1])
    if secret.startswith("sha256:"):
        raise ValueError("after sha256: there must be 64 hexadecimal digits in lower case")
    if not _KEY.fullmatch(secret) or len(secret) < _MIN_KEY_LENGTH:
        raise ValueError(
            f"a key has at least {_MIN_KEY_LENGTH} printable ASCII characters; "
            "make one with: openssl rand -hex 32"
        )
    return hashlib.sha256(secret.encode()).digest()


def _check_unique(keys: Iterable[ApiKey], path: Path) -> None:
    names: set[str] = set()
    digests: set[bytes] = set()
    for key in keys:
        if key.name in names:
            raise SettingsError(f"--api-keys-file {path}: two keys are called {key.name}")
        if key.digest in digests:
            raise SettingsError(f"--api-keys-file {path}: {key.name} has the key of another line")
        names.add(key.name)
        digests.add(key.digest)
    if not names:
        raise SettingsError(f"--api-keys-file {path}: it holds no key")
