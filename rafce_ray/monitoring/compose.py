"""The configuration of Prometheus and Grafana for a Ray cluster, with a compose file that starts both.

Both containers use the host's network, since Ray's metrics ports may listen on loopback alone, and both listen on
loopback. Ray's folder is mounted at its own path, so that ``prometheus.yml`` also works for a Prometheus outside of a
container.
"""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

HERE = Path(__file__).parent
DISCOVERY_FILE = "prom_metrics_service_discovery.json"
"""In Ray's folder: the metrics ports of all nodes."""

_TEMPLATES = Environment(
    loader=PackageLoader("rafce_ray.monitoring", "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def configuration(
    ray: Path | None, cluster: str | None, token_file: Path | None, *, prometheus_port: int, grafana_port: int
) -> dict[str, str]:
    """Every file by its path below the folder: compose file, scraping, alert rules, provisioning and dashboards.

    ``ray``: folder of Ray's temporary files on the head node; None: ask the dashboard at ``cluster`` (HOST:PORT) for
    the metrics ports, with the token in ``token_file`` where the cluster needs one.
    """
    places = {"ray": None if ray is None else str(ray), "token_file": None if token_file is None else str(token_file)}
    ports = {"prometheus_port": prometheus_port, "grafana_port": grafana_port}
    told = {**places, **ports, "cluster": cluster, "user": f"{os.getuid()}:{os.getgid()}"}
    return {
        **{
            name.removesuffix(".j2"): _TEMPLATES.get_template(name).render(told) for name in _TEMPLATES.list_templates()
        },
        **{f"prometheus/rules/{file.name}": file.read_text() for file in sorted(HERE.glob("alerts*.yaml"))},
        **{f"grafana/dashboards/{file.name}": file.read_text() for file in sorted((HERE / "grafana").glob("*.json"))},
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
