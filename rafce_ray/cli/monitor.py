"""``rafce monitor``: write the configuration of Prometheus and Grafana for a Ray cluster."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

from rafce_ray.base.console import say, warn
from rafce_ray.base.errors import UsageError
from rafce_ray.cli.arguments import command
from rafce_ray.train.environment import ray_folder

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
"""Ray's dashboard looks for both at these ports, unless its cluster was told otherwise."""


@command
def main(argv: list[str]) -> int:
    """``rafce monitor``; returns the exit code."""
    arguments = _parser().parse_args(argv)
    cluster, token_file = arguments.cluster, arguments.token_file
    if cluster is not None:
        found = re.fullmatch(r"(?:http://)?([A-Za-z0-9._-]+:\d{1,5})/?", cluster)
        if found is None:
            raise UsageError(f"--cluster {cluster}: expected HOST:PORT of Ray's dashboard, such as 10.0.0.5:8265.")
        cluster, ray = found[1], None
    else:
        ray = (arguments.ray_folder or ray_folder()).absolute()
    if token_file is not None:
        if cluster is None:
            raise UsageError("--token-file is for --cluster: Ray's folder is read without a token.")
        if not token_file.is_file():
            raise UsageError(f"--token-file {token_file}: there is no such file. Write it: ray get-auth-token > FILE")
        token_file = token_file.absolute()
    from rafce_ray.monitoring.compose import DISCOVERY_FILE, configuration, write

    ports = {"prometheus_port": arguments.prometheus_port, "grafana_port": arguments.grafana_port}
    files = configuration(ray, cluster, token_file, **ports)
    for file in write(arguments.write, files):
        warn(f"{file} has other content and was kept. The new content is in {file.name}.new")
    say(f"Wrote {arguments.write}: compose.yaml, prometheus/ with alert rules, grafana/ with dashboards.")
    if ray is not None and not (ray / DISCOVERY_FILE).exists():
        warn(
            f"{ray / DISCOVERY_FILE} does not exist: no Ray cluster with a dashboard was started with this folder on "
            "this machine. Start one first, or name Ray's folder with --ray-folder or another machine's dashboard with "
            "--cluster."
        )
    compose = shlex.quote(str(arguments.write / "compose.yaml"))
    say(f"Start both: docker compose -f {compose} up -d    Stop both: docker compose -f {compose} down")
    say(f"Prometheus: http://127.0.0.1:{arguments.prometheus_port} (/alerts, /targets)")
    for board in (json.loads(content) for name, content in files.items() if name.endswith(".json")):
        say(f"Grafana, {board['title']}: http://127.0.0.1:{arguments.grafana_port}/d/{board['uid']}")
    forwarded = " ".join(f"-L {port}:127.0.0.1:{port}" for port in ports.values())
    say(f"From another machine: ssh -N {forwarded} THIS-MACHINE")
    for (name, port), usual in zip(ports.items(), (PROMETHEUS_PORT, GRAFANA_PORT), strict=True):
        if port != usual:
            host = f"RAY_{name.removesuffix('_port').upper()}_HOST=http://127.0.0.1:{port}"
            say(f"For the metrics page of Ray's dashboard, start the cluster with {host}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce monitor",
        description="Write a folder with a docker compose file, Prometheus and Grafana configuration, alert rules and "
        "dashboards for a Ray cluster.",
    )
    parser.add_argument("--write", type=Path, required=True, metavar="DIR", help="folder to write")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--ray-folder",
        type=Path,
        metavar="PATH",
        help="Ray's folder of temporary files, on the cluster's head node (default: RAY_TMPDIR/ray, or /tmp/ray)",
    )
    place.add_argument(
        "--cluster", metavar="HOST:PORT", help="address of the dashboard of a cluster whose head is another machine"
    )
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token that --cluster needs")
    parser.add_argument("--prometheus-port", type=int, default=PROMETHEUS_PORT, metavar="N")
    parser.add_argument("--grafana-port", type=int, default=GRAFANA_PORT, metavar="N")
    return parser
