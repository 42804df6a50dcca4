"""The configuration of Prometheus and Grafana for a Ray cluster: which nodes to ask, alert rules, Ray's own dashboards and ours."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rafce_ray.console import say
from rafce_ray.errors import UsageError

HERE = Path(__file__).parent
DISCOVERY_FILE = "prom_metrics_service_discovery.json"
"""Ray's head writes it every five seconds: the metrics ports of all nodes. The one in Ray's folder is the newest cluster's."""

RAY_DASHBOARDS = Path("session_latest", "metrics", "grafana", "dashboards")
DATASOURCE = "Prometheus"
"""Its name, which Ray's dashboards expect."""

SCRAPE_INTERVAL = "10s"
"""As often as Ray's processes export."""

HEAD_REMARK = "# Written by `rafce monitor`; a file that was changed is moved aside before it is written again.\n"


@dataclass(frozen=True)
class Written:
    """Where the configuration lies. ``titles``: of our dashboards, by the path of their URL."""

    folder: Path
    prometheus: Path
    grafana: Path
    titles: Mapping[str, str]


def ray_folder(environment: Mapping[str, str]) -> Path:
    """Ray's folder of temporary files on this machine, as Ray chooses it."""
    system = environment.get("RAY_TMPDIR")
    if system is None and sys.platform.startswith("linux"):
        system = environment.get("TMPDIR")
    return Path(system or "/tmp") / "ray"


def read_targets(folder: Path) -> list[str]:
    """host:port of every metrics port of the cluster whose files lie in Ray's ``folder``.

    Raises:
        UsageError: no cluster was started there, or not on this machine.
    """
    file = folder / DISCOVERY_FILE
    try:
        groups = json.loads(file.read_bytes())
        return [str(target) for group in groups for target in group["targets"]]
    except OSError:
        raise UsageError(
            f"{file}: there is no such file, so no Ray cluster with a dashboard was started with this folder on this machine. Start it first, give "
            "the command on the cluster's head node, or name Ray's folder with --ray-folder (`ray start --temp-dir`, RAY_TMPDIR)."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: not Ray's list of metrics ports ({error}). Is --ray-folder right?") from None


def write_configuration(out: Path, ray: Path, *, prometheus_port: int, grafana_port: int) -> Written:
    """Write everything that both programs need into ``out``.

    ``ray``: Ray's folder. Files of other names in ``prometheus/rules`` and ``grafana/dashboards`` are the user's, and are read too.
    """
    out, ray = out.absolute(), ray.absolute()
    prometheus, grafana = out / "prometheus", out / "grafana"
    for rules in sorted(HERE.glob("alerts*.yaml")):
        _write(prometheus / "rules" / rules.name, rules.read_text())
    _write(prometheus / "prometheus.yml", _yaml(_prometheus(prometheus / "rules", ray / DISCOVERY_FILE)))
    titles = {}
    for dashboard in sorted((HERE / "grafana").glob("*.json")):
        content = dashboard.read_text()
        _write(grafana / "dashboards" / dashboard.name, content)
        described = json.loads(content)
        titles[f"d/{described['uid']}"] = str(described["title"])
    provisioning = grafana / "provisioning"
    url = f"http://127.0.0.1:{prometheus_port}"
    _write(provisioning / "datasources" / "rafce.yaml", _yaml(_datasource(url)))
    folders = {"rafce": grafana / "dashboards", "Ray": ray / RAY_DASHBOARDS}
    _write(provisioning / "dashboards" / "rafce.yaml", _yaml(_providers(folders)))
    _write(grafana / "grafana.ini", HEAD_REMARK.replace("#", ";", 1) + _grafana_ini(grafana, grafana_port))
    return Written(out, prometheus / "prometheus.yml", grafana / "grafana.ini", titles)


def _prometheus(rules: Path, discovery: Path) -> dict[str, Any]:
    # A link to a file of Ray's session, of whose changes Prometheus is not told.
    nodes = {"files": [str(discovery)], "refresh_interval": SCRAPE_INTERVAL}
    return {
        "global": {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL},
        "rule_files": [str(rules / "*.yaml")],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [nodes]}],
    }


def _datasource(url: str) -> dict[str, Any]:
    source = {"name": DATASOURCE, "type": "prometheus", "access": "proxy", "url": url, "isDefault": True}
    return {"apiVersion": 1, "datasources": [source]}


def _providers(folders: Mapping[str, Path]) -> dict[str, Any]:
    providers = [
        {"name": name, "folder": name, "type": "file", "options": {"path": str(folder)}}
        for name, folder in folders.items()
    ]
    return {"apiVersion": 1, "providers": providers}


def _grafana_ini(grafana: Path, port: int) -> str:
    """Readable without a login, and only from this machine; Ray's dashboard shows panels of it in a frame."""
    sections: dict[str, dict[str, object]] = {
        "server": {"http_addr": "127.0.0.1", "http_port": port},
        "paths": {"data": grafana / "data", "logs": grafana / "log", "provisioning": grafana / "provisioning"},
        "auth.anonymous": {"enabled": "true", "org_role": "Viewer"},
        "security": {"allow_embedding": "true"},
        "analytics": {"reporting_enabled": "false", "check_for_updates": "false", "check_for_plugin_updates": "false"},
    }
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
        for section, values in sections.items()
    )


def _yaml(content: dict[str, Any]) -> str:
    return HEAD_REMARK + yaml.safe_dump(content, sort_keys=False)


def _write(file: Path, content: str) -> None:
    """Write a file anew; one with other content, which a user may have made, is moved aside first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.read_text() != content:
        number = next(number for number in range(1, sys.maxsize) if not _aside(file, number).exists())
        file.rename(_aside(file, number))
        say(f"{file} differed from what is written now: it is kept as {_aside(file, number).name}")
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(content)
    os.replace(beside, file)


def _aside(file: Path, number: int) -> Path:
    # With another ending neither program reads it.
    return file.with_name(f"{file.name}.before-{number}")
