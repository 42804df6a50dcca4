"""The configuration of Prometheus and Grafana for a Ray cluster, with a compose file that starts both.

Both containers use the host's network, since Ray's metrics ports may listen on loopback alone, and both listen on
loopback. Ray's folder is mounted at its own path, so that ``prometheus.yml`` also works for a Prometheus outside of a
container.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
IMAGES = {"prometheus": "prom/prometheus:v3.5.0", "grafana": "grafana/grafana:12.0.2"}
DISCOVERY_FILE = "prom_metrics_service_discovery.json"
"""Ray's head writes the metrics ports of all nodes into it every five seconds.

The one in Ray's folder is the newest cluster's.
"""

RAY_DASHBOARDS = Path("session_latest", "metrics", "grafana", "dashboards")
DATASOURCE = "Prometheus"
"""Ray's dashboards expect this name."""

SCRAPE_INTERVAL = "10s"
"""As often as Ray's processes export."""


def configuration(
    ray: Path | None, cluster: str | None, token_file: Path | None, *, prometheus_port: int, grafana_port: int
) -> dict[str, str]:
    """Every file by its path below the folder: compose file, scraping, alert rules, provisioning and dashboards.

    ``ray``: folder of Ray's temporary files on the head node; None: ask the dashboard at ``cluster`` (HOST:PORT) for
    the metrics ports, with the token in ``token_file`` where the cluster needs one.
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
        # Without create_host_path, docker creates a missing source as a folder of root's.
        place = {"type": "bind", "source": source, "target": target}
        return {**place, "read_only": read_only, "bind": {"create_host_path": False}}

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
