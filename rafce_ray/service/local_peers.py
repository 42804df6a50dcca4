"""Whether a request comes from this machine and from no other site: what a service without keys depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address

from starlette.types import Scope

from rafce_ray.service.problems import Problem


def check_local(scope: Scope, headers: Mapping[bytes, bytes]) -> None:
    """Problem unless peer, host name and origin are this machine's.

    A page of another site can make a browser ask a loopback service, under a host name of its own if it likes.
    """
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        raise Problem("not_loopback", "This service answers peers on its own machine only.")
    host, origin = headers.get(b"host"), headers.get(b"origin")
    if host is not None and not _is_local_name(host):
        raise Problem("cross_site", "The Host header names another machine.")
    if origin is not None and not _is_local_name(origin.partition(b"://")[2]):
        raise Problem("cross_site", "The request comes from a page of another site.")


@lru_cache(maxsize=256)
def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@lru_cache(maxsize=256)
def _is_local_name(host: bytes) -> bool:
    """Whether ``host[:port]`` is localhost or a loopback address."""
    name = re.sub(r":\d*$", "", host.decode("latin-1")).strip("[]").lower()
    return name == "localhost" or _is_loopback(name)
