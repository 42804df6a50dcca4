"""``rafce monitor``: write the configuration of Prometheus and Grafana for a Ray cluster, with a compose file that starts both.

Both containers use the host's network, since Ray's metrics ports may listen on loopback alone, and both listen on loopback.
Ray's folder is mounted at its own path, so that ``prometheus.yml`` also works for a Prometheus outside of a container.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rafce_ray.console import run_main, say, warn
from rafce_ray.errors import UsageError
from rafce_ray.ray_environment import ray_folder

HERE = Path(__file__).parent
IMAGES = {"prometheus": "prom/prometheus:v3.5.0", "grafana": "grafana/grafana:12.0.2"}
DISCOVERY_FILE = "prom_metrics_service_discovery.json"
"""Ray's head writes the metrics ports of all nodes into it every five seconds. The one in Ray's folder is the newest cluster's."""

RAY_DASHBOARDS = Path("session_latest", "metrics", "grafana", "dashboards")
DATASOURCE = "Prometheus"
"""Ray's dashboards expect this name."""

SCRAPE_INTERVAL = "10s"
"""As often as Ray's processes export."""

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
"""Ray's dashboard looks for both at these ports, unless its cluster was told otherwise."""

_ADDRESS = re.compile(r"(?:http://)?([A-Za-z0-9._-]+:\d{1,5})/?")


def configuration(
    ray: Path | None, cluster: str | None, token_file: Path | None, *, prometheus_port: int, grafana_port: int
) -> dict[str, str]:
    """Every file by its path below the folder: compose file, scraping, alert rules, provisioning and dashboards.

    ``ray``: folder of Ray's temporary files on the head node; None: ask the dashboard at ``cluster`` (HOST:PORT) for the metrics
    ports, with the token in ``token_file`` where the cluster needs one.
    """
    discovery: dict[str, Any]
    if ray is not None:
        # Prometheus does not see changes of the linked file, so it must look again.
        discovery = {"file_sd_configs": [{"files": [str(ray / DISCOVERY_FILE)], "refresh_interval": SCRAPE_INTERVAL}]}
    else:
        asked: dict[str, Any] = {"url": f"http://{cluster}/api/prometheus/sd", "refresh_interval": SCRAPE_INTERVAL}
        if token_file is not None:
            asked["authorization"] = {"credentials_file": str(token_file)}
        discovery = {"http_sd_configs": [asked]}
    prometheus = {
        "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL},
        "rule_files": ["rules/*.yaml"],
        "scrape_configs": [{"job_name": "ray", **discovery}],
    }
    url = f"http://127.0.0.1:{prometheus_port}"
    source = {"name": DATASOURCE, "type": "prometheus", "access": "proxy", "url": url, "isDefault": True}
    folders = {"rafce": "/etc/grafana/dashboards"} | ({} if ray is None else {"Ray": str(ray / RAY_DASHBOARDS)})
    providers = [
        {"name": name, "folder": name, "type": "file", "options": {"path": path}} for name, path in folders.items()
    ]
    yaml_files = {
        "compose.yaml": _compose(ray, token_file, prometheus_port=prometheus_port, grafana_port=grafana_port),
        "prometheus/prometheus.yml": prometheus,
        "grafana/provisioning/datasources/rafce.yaml": {"apiVersion": 1, "datasources": [source]},
        "grafana/provisioning/dashboards/rafce.yaml": {"apiVersion": 1, "providers": providers},
    }
    return {
        **{path: yaml.safe_dump(content, sort_keys=False) for path, content in yaml_files.items()},
        **{f"prometheus/rules/{file.name}": file.read_text() for file in sorted(HERE.glob("alerts*.yaml"))},
        **{f"grafana/dashboards/{file.name}": file.read_text() for file in sorted((HERE / "grafana").glob("*.json"))},
    }


def _compose(ray: Path | None, token_file: Path | None, *, prometheus_port: int, grafana_port: int) -> dict[str, Any]:
    def bind(source: str, target: str, *, read_only: bool = True) -> dict[str, Any]:
        # Without this, docker makes a missing source as a folder of root's.
        return {
            "type": "bind",
            "source": source,
            "target": target,
            "read_only": read_only,
            "bind": {"create_host_path": False},
        }

    ray_mount = [] if ray is None else [bind(str(ray), str(ray))]
    token_mount = [] if token_file is None else [bind(str(token_file), str(token_file))]
    # The user's own ids may read Ray's files and write the data folders.
    common = {"network_mode": "host", "user": f"{os.getuid()}:{os.getgid()}", "restart": "unless-stopped"}
    return {
        "services": {
            "prometheus": {
                "image": IMAGES["prometheus"],
                **common,
                "command": [
                    "--config.file=/etc/prometheus/prometheus.yml",
                    "--storage.tsdb.path=/prometheus",
                    f"--web.listen-address=127.0.0.1:{prometheus_port}",
                ],
                "volumes": [
                    bind("./prometheus", "/etc/prometheus"),
                    bind("./data/prometheus", "/prometheus", read_only=False),
                    *ray_mount,
                    *token_mount,
                ],
            },
            "grafana": {
                "image": IMAGES["grafana"],
                **common,
                # Anyone on this machine may look without a login; Ray's dashboard shows its panels in a frame.
                "environment": {
                    "GF_SERVER_HTTP_ADDR": "127.0.0.1",
                    "GF_SERVER_HTTP_PORT": str(grafana_port),
                    "GF_AUTH_ANONYMOUS_ENABLED": "true",
                    "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
                    "GF_SECURITY_ALLOW_EMBEDDING": "true",
                    "GF_ANALYTICS_REPORTING_ENABLED": "false",
                    "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
                    "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
                },
                "volumes": [
                    bind("./grafana/provisioning", "/etc/grafana/provisioning"),
                    bind("./grafana/dashboards", "/etc/grafana/dashboards"),
                    bind("./data/grafana", "/var/lib/grafana", read_only=False),
                    *ray_mount,
                ],
            },
        }
    }


def write(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write the files and make the data folders; returns the files that exist with other content.

    Those stay as they are. The new content goes next to them, as NAME.new, which no program reads.
    """
    for data in ("prometheus", "grafana"):
        (folder / "data" / data).mkdir(parents=True, exist_ok=True)
    kept = []
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.read_text() != content:
            kept.append(file)
            file = file.with_name(f"{file.name}.new")
        file.write_text(content)
    return kept


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rafce monitor",
        description="Write a folder with a docker compose file, Prometheus and Grafana configuration, alert rules and dashboards for a Ray cluster.",
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


def _main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    cluster, token_file = arguments.cluster, arguments.token_file
    if cluster is not None:
        found = _ADDRESS.fullmatch(cluster)
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
    ports = {"prometheus_port": arguments.prometheus_port, "grafana_port": arguments.grafana_port}
    files = configuration(ray, cluster, token_file, **ports)
    for file in write(arguments.write, files):
        warn(f"{file} has other content and was kept. The new content is in {file.name}.new")
    say(f"Wrote {arguments.write}: compose.yaml, prometheus/ with alert rules, grafana/ with dashboards.")
    if ray is not None and not (ray / DISCOVERY_FILE).exists():
        warn(
            f"{ray / DISCOVERY_FILE} does not exist: no Ray cluster with a dashboard was started with this folder on this "
            "machine. Start one first, or name Ray's folder with --ray-folder or another machine's dashboard with --cluster."
        )
    compose = shlex.quote(str(arguments.write / "compose.yaml"))
    say(f"Start both: docker compose -f {compose} up -d    Stop both: docker compose -f {compose} down")
    say(f"Prometheus: http://127.0.0.1:{arguments.prometheus_port} (/alerts, /targets)")
    boards = [json.loads(content) for name, content in files.items() if name.endswith(".json")]
    for board in boards:
        say(f"Grafana, {board['title']}: http://127.0.0.1:{arguments.grafana_port}/d/{board['uid']}")
    forwarded = " ".join(f"-L {port}:127.0.0.1:{port}" for port in ports.values())
    say(f"From another machine: ssh -N {forwarded} THIS-MACHINE")
    for name, port, usual in (
        ("PROMETHEUS", arguments.prometheus_port, PROMETHEUS_PORT),
        ("GRAFANA", arguments.grafana_port, GRAFANA_PORT),
    ):
        if port != usual:
            say(
                f"For the metrics page of Ray's dashboard, start the cluster with RAY_{name}_HOST=http://127.0.0.1:{port}"
            )
    return 0


def main(argv: list[str] | None = None) -> int:
    """``rafce monitor``; returns the exit code."""
    return run_main(_main, argv)
