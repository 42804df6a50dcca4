"""Bearer keys: sha256 of each in a file, what each may do, wrong ones slowed down; ``new`` makes one.

``python -m rafce_ray.service.keys new NAME --file keys.json [--scope predict] [--scope admin]``
"""

from __future__ import annotations

import argparse
import hmac
import logging
import os
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, MutableMapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from rafce_ray.base.console import command, pretty_json, say
from rafce_ray.base.errors import UsageError
from rafce_ray.config import parse_yaml
from rafce_ray.service.problems import Problem

Scope = Literal["predict", "admin"]

KEY_ID = "rafce.key_id"
"""Key of the ASGI scope under which the id of the request's key is left, for the log."""

LOOK_S = 1.0
"""Seconds between looks at the file's stamp."""

MAX_KEY_BYTES = 512
MAX_WRONG_KEYS = 10
WRONG_KEYS_S = 60.0
"""A peer may send ``MAX_WRONG_KEYS`` wrong keys in these seconds. Valid keys still pass: peers behind one proxy look
alike, and a key has 256 bits."""

MAX_PEERS = 10_000

_MAKE_ONE = "Make one with: python -m rafce_ray.service.keys new NAME --file keys.json"

_log = logging.getLogger(__name__)


class Key(BaseModel, frozen=True, extra="forbid"):
    """One key as its file has it: a hash, never the key itself."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of the key's owner, which stands in the log.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the key, hexadecimal.")
    scopes: frozenset[Scope] = Field(min_length=1, description="What the key may do.")


class KeyFile(BaseModel, frozen=True, extra="forbid"):
    """The file: ``{"keys": [{"id", "sha256", "scopes"}]}``."""

    keys: tuple[Key, ...]


class Keys:
    """The keys of a file, read again when it changes. Without a file anyone may predict and nobody administrate.

    When a new file cannot be used, the log says so and the old keys stay.
    """

    def __init__(self, file: Path | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """UsageError where the file cannot be used."""
        self._file = file
        self._clock = clock
        self._looked = clock()
        self._stamp = None if file is None else _stamp(file)
        self._keys = () if file is None else read_keys(file)
        self._wrong = _WrongKeys(clock)

    def authorize(self, scope: MutableMapping[str, Any], needed: Scope) -> None:
        """Let the request of an ASGI ``scope`` pass, and leave its key's id there; synchronous and cheap.

        Problem ``key_needed``, ``wrong_key`` (401), ``scope_missing`` (403) or ``too_many_wrong_keys`` (429).
        """
        if self._file is None:
            if needed == "predict":
                return
            detail = f"The service has no keys, and this needs one with scope {needed}."
            raise Problem("scope_missing", detail, hint=_MAKE_ONE)
        self._look_for_changes(self._file)
        presented = _bearer(scope)
        if presented is None:
            raise Problem("key_needed", "The request carries no bearer key.", headers={"www-authenticate": "Bearer"})
        digest = sha256(presented).hexdigest()
        # Every key is compared, always: the time does not tell which one is near.
        found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        if not found:
            self._wrong.count(scope)
            headers = {"www-authenticate": 'Bearer error="invalid_token"'}
            raise Problem("wrong_key", "The key is not known here.", headers=headers)
        scope[KEY_ID] = found[0].id
        if needed not in found[0].scopes:
            raise Problem("scope_missing", f"The key has no scope {needed}.")

    def _look_for_changes(self, file: Path) -> None:
        now = self._clock()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        stamp = _stamp(file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(file)
        except UsageError as error:
            _log.error("keys file unusable; the old keys stay", extra={"fields": {"reason": str(error)}})
        else:
            _log.info("keys file read", extra={"fields": {"key_ids": [key.id for key in self._keys]}})


class _WrongKeys:
    """How many wrong keys each peer sent lately."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counts: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def count(self, scope: MutableMapping[str, Any]) -> None:
        """Count one more; Problem ``too_many_wrong_keys`` where a peer has sent more than ``MAX_WRONG_KEYS``."""
        peer, now = (scope.get("client") or ("",))[0], self._clock()
        since, number = self._counts.get(peer, (now, 0))
        if now - since >= WRONG_KEYS_S:
            since, number = now, 0
        self._counts[peer] = (since, number + 1)
        self._counts.move_to_end(peer)
        if len(self._counts) > MAX_PEERS:
            self._counts.popitem(last=False)
        if number >= MAX_WRONG_KEYS:
            wait = max(1, round(since + WRONG_KEYS_S - now))
            raise Problem(
                "too_many_wrong_keys",
                f"More than {MAX_WRONG_KEYS} wrong keys came from this peer within {WRONG_KEYS_S:g} s.",
                headers={"retry-after": str(wait)},
            )


def read_keys(file: Path) -> tuple[Key, ...]:
    """The keys of a file. UsageError where it is unreadable or malformed, has no key, or a name, id or key twice."""
    try:
        content = file.read_bytes()
        keys = KeyFile.model_validate_json(content, strict=False).keys
    except OSError as error:
        raise UsageError(f"{file}: the keys file cannot be read ({error.strerror}). {_MAKE_ONE}") from None
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "the file"
        raise UsageError(f"{file}: {place}: {fault['msg']}. {_MAKE_ONE}") from None
    # A JSON parser silently keeps the last value of a repeated name; this one refuses it.
    parse_yaml(content, str(file))
    if not keys:
        raise UsageError(f"{file}: holds no key. {_MAKE_ONE}")
    for name in ("id", "sha256"):
        value, number = Counter(getattr(key, name) for key in keys).most_common(1)[0]
        if number > 1:
            raise UsageError(f"{file}: two keys have the {name} {value}. Remove one of them.")
    return keys


def new_key(file: Path, key_id: str, scopes: frozenset[Scope]) -> str:
    """Make a key, add its hash to the file and return the key. A new file is readable by its owner only.

    UsageError where the id is taken or malformed, or the file cannot be used.
    """
    keys = read_keys(file) if file.exists() else ()
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", key_id):
        raise UsageError(f"NAME: found {key_id!r}; use 1 to 64 letters, digits, dots, dashes and underscores.")
    if any(key.id == key_id for key in keys):
        raise UsageError(
            f"{file}: there is a key {key_id!r} already. Take another name, or remove its entry to revoke it."
        )
    secret = secrets.token_urlsafe(32)
    keys = (*keys, Key(id=key_id, sha256=sha256(secret.encode()).hexdigest(), scopes=scopes))
    content = pretty_json({"keys": [key.model_dump() | {"scopes": sorted(key.scopes)} for key in keys]})
    scratch = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
        os.replace(scratch, file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}). Give --file a place that can.") from None
    return secret


@command
def main(argv: list[str]) -> int:
    """``python -m rafce_ray.service.keys``: the new key alone goes to standard output."""
    parser = argparse.ArgumentParser(prog="python -m rafce_ray.service.keys", description="Keys of the service.")
    new = parser.add_subparsers(dest="verb", required=True).add_parser("new", help="make a key and store its hash")
    new.add_argument("name", help="who gets it; stands in the log")
    new.add_argument("--file", type=Path, required=True, help="keys file, made if need be")
    new.add_argument("--scope", choices=("predict", "admin"), action="append", help="may be repeated (default predict)")
    arguments = parser.parse_args(argv)
    secret = new_key(arguments.file, arguments.name, frozenset(arguments.scope or ("predict",)))
    say(f"The key of {arguments.name} follows; it is stored nowhere, {arguments.file} holds its hash.")
    print(secret)
    return 0


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _bearer(scope: MutableMapping[str, Any]) -> bytes | None:
    """The request's key; None where it has none or not as a bearer."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            key = key.strip()
            return key if scheme.lower() == b"bearer" and 0 < len(key) <= MAX_KEY_BYTES else None
    return None


if __name__ == "__main__":
    raise SystemExit(main())
