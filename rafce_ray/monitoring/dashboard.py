"""How a person reaches Ray's dashboard of the cluster that a command runs on."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping


def dashboard_line(address: str, page: str, environment: Mapping[str, str], *, started_here: bool) -> str:
    """Where the dashboard is and how to get past what guards it.

    ``address``: host:port as Ray tells it. ``page``: which of its pages (jobs, serve) shows what is about to run; training has none of its own. ``environment``: this process's after
    ``ray.init``, which sets RAY_AUTH_MODE. ``started_here``: False where the cluster is another machine's, whose loopback is not ours.
    """
    notes = []
    if environment.get("RAY_AUTH_MODE", "").lower() == "token":
        notes.append("it asks for a token: ray get-auth-token prints it")
    host, _, port = address.rpartition(":")
    if not started_here and _is_loopback(host):
        notes.append(f"where that is another machine's: ssh -N -L {port}:127.0.0.1:{port} HEAD-NODE")
    noted = f" ({'; '.join(notes)})" if notes else ""
    return f"dashboard: http://{address}/#/{page}{noted}; curves: rafce monitor"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
