"""Who may ask: without keys this machine alone, the named hosts of a proxy, and pages of other sites (CORS)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import Scope

from rafce_ray.service.problems import Problem, shown

Headers = tuple[tuple[bytes, bytes], ...]

ANY = "*"
PREFLIGHT_MAX_AGE_S = 600

_EXPOSED = b"retry-after, x-request-id"
_OF_PREFLIGHT: Headers = (
    (b"access-control-allow-methods", b"GET, HEAD, OPTIONS, POST"),
    (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
    (b"access-control-max-age", str(PREFLIGHT_MAX_AGE_S).encode()),
)


@dataclass(frozen=True)
class Callers:
    """Peers, host names and origins that a service answers.

    ``loopback_only``: refuse peers that are not this machine. ``keys``: each request needs a key. A page of another
    site cannot know it, so Host and Origin need not be this machine's. ``hosts``: host names besides this machine's, in
    lower case, ``*.`` before one for all below it; none: any, if there are keys. ``origins``: sites whose pages may
    read answers, or ``*``.
    """

    loopback_only: bool = True
    keys: bool = False
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        """Problem where the peer, the Host header or the Origin header may not ask.

        A page of another site can make a browser ask a loopback service, under a host name of its own if it likes.
        """
        client = scope.get("client")
        if self.loopback_only and (client is None or not _is_loopback(client[0])):
            raise Problem("not_loopback", "This service answers peers on its own machine only.")
        local_names_only = self.loopback_only and not self.keys
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if host is not None and (self.hosts or local_names_only) and not self._is_answered(_name(host)):
            name, hint = _name(host), None
            if self.keys and _HOST.fullmatch(name):
                hint = f"Start the service with allowed_hosts=[{name}] if it is to answer under this name."
            raise Problem("cross_site", f"The Host header names another machine, {shown(name)}.", hint=hint)
        if origin is not None and local_names_only and not (self._may_read(origin) or _is_local_origin(origin)):
            site, hint = origin.decode("latin-1").lower(), None
            if _ORIGIN.fullmatch(site):
                hint = f"Start the service with allow_origins=[{site}] if pages of this site may ask it."
            raise Problem("cross_site", f"The request comes from a page of another site, {shown(site)}.", hint=hint)

    def cors(self, scope: Scope, headers: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Headers of the response by which a browser lets a page of an allowed origin read it.

        Keys go into a header of their own, so that credentials (cookies) are never allowed.
        """
        if not self.origins:
            return
        if ANY not in self.origins:
            yield b"vary", b"origin"
        origin = headers.get(b"origin")
        if origin is None or not self._may_read(origin):
            return
        yield b"access-control-allow-origin", ANY.encode() if ANY in self.origins else origin
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            yield from _OF_PREFLIGHT
            if headers.get(b"access-control-request-private-network") == b"true":
                yield b"access-control-allow-private-network", b"true"
        else:
            yield b"access-control-expose-headers", _EXPOSED

    def _is_answered(self, name: str) -> bool:
        # With keys an address is as good as a name of this machine: no other site can be reached under it.
        return (
            _is_local_name(name) or (self.keys and _is_address(name)) or any(_is_named(name, one) for one in self.hosts)
        )

    def _may_read(self, origin: bytes) -> bool:
        return ANY in self.origins or origin.decode("latin-1").lower() in self.origins


def host_name(text: str) -> str:
    """A name for ``Callers.hosts``; ValueError where it is none."""
    name = text.strip().lower().rstrip(".")
    if not _HOST.fullmatch(name):
        raise ValueError(f"found {text!r}; give the name alone, without https:// and port, such as faces.example")
    return name


def origin_of(text: str) -> str:
    """An origin as browsers write it, for ``Callers.origins``; ValueError where it is none."""
    origin = text.strip().lower().rstrip("/")
    scheme, _, _ = origin.partition(":")
    origin = origin.removesuffix({"https": ":443", "http": ":80"}.get(scheme, "/"))
    if origin != ANY and not _ORIGIN.fullmatch(origin):
        raise ValueError(f"found {text!r}; give scheme, name and port of the page alone, such as https://app.example")
    return origin


_HOST = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_ORIGIN = re.compile(r"https?://([a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])(:\d{1,5})?")


@lru_cache(maxsize=256)
def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_address(host: str) -> bool:
    return _address(host) is not None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_loopback


def _is_local_name(name: str) -> bool:
    return name == "localhost" or _is_loopback(name)


def _is_local_origin(origin: bytes) -> bool:
    return _is_local_name(_name(origin.partition(b"://")[2]))


def _name(host: bytes) -> str:
    """The name in ``host[:port]``, in lower case."""
    return re.sub(r":\d*$", "", host.decode("latin-1")).strip("[]").lower()


def _is_named(name: str, known: str) -> bool:
    name = name.rstrip(".")
    return name == known or (known.startswith("*.") and name.endswith(known[1:]))
