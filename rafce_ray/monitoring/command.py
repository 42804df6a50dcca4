"""``rafce monitor``: Prometheus and Grafana for a running cluster, configured, and started where they are installed.

It writes their configuration into a folder: Ray's list of metrics ports, the alert rules, Ray's own dashboards and ours. Both programs listen
on this machine alone. Give the command where the cluster's head runs, before or while something trains; it follows the newest cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
import urllib.parse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rafce_ray.console import handled_signals, run_main, say, warn
from rafce_ray.errors import RafceError
from rafce_ray.monitoring.configuration import Written, ray_folder, read_targets, write_configuration
from rafce_ray.monitoring.programs import (
    HOW_TO_GET,
    Program,
    answers,
    check_free,
    fetch,
    find_grafana,
    find_prometheus,
    last_words,
    running,
)

POLL_S = 1.0
LIST_S = 30.0
"""Seconds that Prometheus has to find out which ports there are."""

CURVES = {
    "training": (
        'max by (run) (ray_rafce_train_metric{split="validation", name="score"})',
        "max by (run, split, task) (ray_rafce_train_loss)",
        "max by (study, metric) (ray_rafce_tune_best_score)",
    ),
    "serving": (
        "sum by (status) (rate(ray_rafce_serve_requests_total[1m]))",
        'histogram_quantile(0.99, sum by (le) (rate(ray_rafce_serve_request_ms_bucket{route="/v1/predict"}[1m])))',
        "max by (statistic) (ray_rafce_serve_drift_psi)",
    ),
}
"""What Prometheus's own page draws, for whom has no Grafana, by title."""

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
"""Where the metrics page of Ray's dashboard looks for both, unless its cluster was told otherwise."""


def monitor(written: Written, prometheus: Program | None, grafana: Program | None) -> None:
    """Run what is there until SIGINT or SIGTERM, and end what was started.

    Raises:
        UsageError: a port is taken.
        RafceError: a program does not come up, or ends by itself.
    """
    programs = [program for program in (prometheus, grafana) if program is not None]
    for program in programs:
        check_free(program, f"--{program.name.lower()}-port")
    stop = threading.Event()
    with handled_signals(lambda *_: stop.set(), (signal.SIGINT, signal.SIGTERM)), ExitStack() as stack:
        started = [(program, stack.enter_context(running(program))) for program in programs]
        _tell_urls(written, prometheus, grafana)
        told, listed_by = None, time.monotonic() + LIST_S
        while not stop.wait(POLL_S):
            read = None if prometheus is None else read_ports(prometheus)
            if read not in (None, told) and (read != (0, ()) or time.monotonic() > listed_by):
                told = read
                _tell_ports(*read)
            for program, process in started:
                if process.poll() is not None:
                    raise RafceError(f"{program.name} ended with code {process.returncode}; {last_words(program)}")
        say("ending what was started; what Prometheus gathered stays in its folder")


def _tell_urls(written: Written, prometheus: Program | None, grafana: Program | None) -> None:
    if prometheus is not None:
        # Debian's package has the pages of Prometheus 1 alone.
        pages = prometheus.url if answers(f"{prometheus.url}/alerts") else f"{prometheus.url}/classic"
        say(f"Prometheus: {prometheus.url} (alerts: {pages}/alerts, what it asks: {pages}/targets)")
        for title, expressions in CURVES.items():
            say(f"  {title}: {graph_url(prometheus, expressions)}")
    if grafana is not None:
        for path, title in written.titles.items():
            say(f"Grafana, {title}: {grafana.url}/{path}")
    for program, port in ((prometheus, PROMETHEUS_PORT), (grafana, GRAFANA_PORT)):
        if program is not None and program.port != port:
            say(
                f"for the metrics page of Ray's dashboard, start its cluster with RAY_{program.name.upper()}_HOST={program.url}"
            )
    ports = [program.port for program in (prometheus, grafana) if program is not None]
    forwarded = " ".join(f"-L {port}:127.0.0.1:{port}" for port in ports)
    say(f"from another machine: ssh -N {forwarded} THIS-MACHINE. Ctrl-C ends what was started.")


def graph_url(prometheus: Program, expressions: Sequence[str]) -> str:
    """The page of Prometheus that draws these expressions, one below the other, over the last hour."""
    asked = {
        f"g{number}.{key}": value
        for number, expression in enumerate(expressions)
        for key, value in (("expr", expression), ("tab", "0"), ("range_input", "1h"))
    }
    return f"{prometheus.url}/graph?{urllib.parse.urlencode(asked, quote_via=urllib.parse.quote)}"


def read_ports(prometheus: Program) -> tuple[int, tuple[str, ...]] | None:
    """How many metrics ports Prometheus reads, and why it does not read the others; None while it does not know of each."""
    try:
        ports = json.loads(fetch(f"{prometheus.url}/api/v1/targets?state=active"))["data"]["activeTargets"]
    except (OSError, ValueError):
        return None
    if any(port["health"] == "unknown" for port in ports):
        return None
    refused = tuple(port["lastError"] for port in ports if port["health"] != "up")
    return len(ports) - len(refused), refused


def _tell_ports(num_read: int, refused: Sequence[str]) -> None:
    if refused or not num_read:
        reason = f": {refused[0]}" if refused else ", because Ray's list of them is empty or not there"
        warn(f"Prometheus reads {num_read} of {num_read + len(refused)} metrics ports{reason}")
    else:
        say(f"Prometheus reads all {num_read} metrics ports of the cluster")


def _tell_missing(written: Written, prometheus: Program | None, grafana: Program | None) -> None:
    starts = {
        "Prometheus": f"prometheus --config.file={written.prometheus}",
        "Grafana": f"grafana server --config={written.grafana}",
    }
    for name, program in (("Prometheus", prometheus), ("Grafana", grafana)):
        if program is None:
            warn(
                f"{name} is not on the PATH. Get it: {HOW_TO_GET[name]}. Then give this command again, or start it yourself: {starts[name]}"
            )


def _tell_targets(targets: Sequence[str]) -> None:
    there = sum(answers(f"http://{target}/metrics") for target in targets)
    if there == 0:
        warn(
            f"none of the cluster's {len(targets)} metrics ports answers: it seems to have ended. Prometheus follows the next one by itself."
        )
    else:
        say(f"{there} of the cluster's {len(targets)} metrics ports answer")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce monitor",
        description="Configure Prometheus and Grafana for a running Ray cluster, and start both where they are installed. Ctrl-C ends them.",
    )
    parser.add_argument(
        "--ray-folder",
        type=Path,
        metavar="PATH",
        help="Ray's folder of temporary files (default: RAY_TMPDIR/ray, or /tmp/ray)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("monitor"),
        metavar="FOLDER",
        help="where configuration and data go (default: monitor)",
    )
    parser.add_argument("--prometheus-port", type=int, default=PROMETHEUS_PORT, metavar="N")
    parser.add_argument("--grafana-port", type=int, default=GRAFANA_PORT, metavar="N")
    parser.add_argument(
        "--grafana-home", type=Path, metavar="PATH", help="Grafana's own files, where it does not find them"
    )
    parser.add_argument("--write-only", action="store_true", help="write the configuration and start nothing")
    return parser


def _main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    folder = arguments.ray_folder or ray_folder(os.environ)
    targets = read_targets(folder)
    written = write_configuration(
        arguments.out, folder, prometheus_port=arguments.prometheus_port, grafana_port=arguments.grafana_port
    )
    say(
        f"wrote {written.folder}: {written.prometheus.name}, alert rules, {written.grafana.name}, {len(written.titles)} dashboard(s)"
    )
    _tell_targets(targets)
    prometheus = find_prometheus(written, arguments.prometheus_port)
    grafana = find_grafana(written, arguments.grafana_port, arguments.grafana_home)
    _tell_missing(written, prometheus, grafana)
    if arguments.write_only:
        return 0
    if prometheus is None and grafana is None:
        raise RafceError(
            "nothing was started: neither program is here. With --write-only the configuration alone is enough."
        )
    monitor(written, prometheus, grafana)
    return 0


def main(argv: list[str] | None = None) -> int:
    """``rafce monitor``; returns the exit code."""
    return run_main(_main, argv)
