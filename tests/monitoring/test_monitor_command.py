"""``rafce monitor --write``: the compose file, the configuration that it mounts, and what a user changed."""

import json
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import yaml

from rafce_ray.cli.monitor import main
from rafce_ray.monitoring.compose import DISCOVERY_FILE


@pytest.fixture
def ray(tmp_path) -> Path:
    """Ray's folder as the head of a cluster leaves it."""
    folder = tmp_path / "ray"
    folder.mkdir()
    (folder / DISCOVERY_FILE).write_text(json.dumps([{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]))
    return folder


def written(folder: Path, *options: str) -> Path:
    assert main(["--write", str(folder), *options]) == 0
    return folder


def read(file: Path) -> dict:
    return yaml.safe_load(file.read_text())


def mounts(folder: Path, service: str) -> dict[str, Path]:
    """Path in the container -> path on this machine."""
    volumes = read(folder / "compose.yaml")["services"][service]["volumes"]
    assert all(volume["type"] == "bind" and not volume["bind"]["create_host_path"] for volume in volumes)
    return {volume["target"]: folder / volume["source"] for volume in volumes}


def on_this_machine(path: str, mounted: dict[str, Path]) -> Path:
    """The file that a container sees at ``path``."""
    target = max((one for one in mounted if PurePosixPath(path).is_relative_to(one)), key=len)
    return mounted[target] / PurePosixPath(path).relative_to(target)


def test_the_compose_file_starts_pinned_images_on_loopback_and_mounts_what_is_there(ray, tmp_path):
    folder = written(tmp_path / "out", "--ray-folder", str(ray), "--prometheus-port=9091", "--grafana-port=3001")
    compose = read(folder / "compose.yaml")
    assert compose.keys() == {"services"}
    images = {name: service["image"] for name, service in compose["services"].items()}
    assert images.keys() == {"prometheus", "grafana"}
    assert all(image.rpartition(":")[2].lstrip("v").count(".") == 2 for image in images.values())
    for name, service in compose["services"].items():
        assert service["network_mode"] == "host"
        assert all(place.exists() for place in mounts(folder, name).values())
    prometheus, grafana = compose["services"]["prometheus"], compose["services"]["grafana"]
    assert "--web.listen-address=127.0.0.1:9091" in prometheus["command"]
    assert (grafana["environment"]["GF_SERVER_HTTP_ADDR"], grafana["environment"]["GF_SERVER_HTTP_PORT"]) == (
        "127.0.0.1",
        "3001",
    )
    [config] = [one.partition("=")[2] for one in prometheus["command"] if one.startswith("--config.file=")]
    assert on_this_machine(config, mounts(folder, "prometheus")) == folder / "prometheus" / "prometheus.yml"


def test_prometheus_reads_rays_ports_and_the_alert_rules(ray, tmp_path):
    folder = written(tmp_path / "out", "--ray-folder", str(ray))
    prometheus = read(folder / "prometheus" / "prometheus.yml")
    [scrape] = prometheus["scrape_configs"]
    [discovery] = scrape["file_sd_configs"]
    assert on_this_machine(discovery["files"][0], mounts(folder, "prometheus")) == ray / DISCOVERY_FILE
    [pattern] = prometheus["rule_files"]
    rules = sorted((folder / "prometheus").glob(pattern))
    assert [file.name for file in rules] == ["alerts.yaml", "alerts_serve.yaml"]
    assert all(read(file)["groups"] for file in rules)


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("cluster", [False, True])
def test_prometheus_itself_takes_the_configuration(ray, tmp_path, cluster):
    place = ["--cluster", "10.0.0.5:8265"] if cluster else ["--ray-folder", str(ray)]
    config = written(tmp_path / "out", *place) / "prometheus" / "prometheus.yml"
    done = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rules found") == 2


def test_grafana_gets_prometheus_our_dashboards_and_rays(ray, tmp_path):
    folder = written(tmp_path / "out", "--ray-folder", str(ray), "--prometheus-port=9091")
    mounted = mounts(folder, "grafana")
    provisioning = on_this_machine("/etc/grafana/provisioning", mounted)
    [source] = read(provisioning / "datasources" / "rafce.yaml")["datasources"]
    assert (source["name"], source["url"]) == ("Prometheus", "http://127.0.0.1:9091")
    providers = read(provisioning / "dashboards" / "rafce.yaml")["providers"]
    ours, rays = (on_this_machine(one["options"]["path"], mounted) for one in providers)
    assert {json.loads(file.read_text())["uid"] for file in ours.glob("*.json")} == {"rafceServe", "rafceTrainTune"}
    assert rays == ray / "session_latest" / "metrics" / "grafana" / "dashboards"


def test_another_machines_cluster_is_asked_through_its_dashboard(tmp_path, capsys):
    token = tmp_path / "token"
    token.write_text("secret")
    folder = written(tmp_path / "out", "--cluster", "http://10.0.0.5:8265/", "--token-file", str(token))
    [scrape] = read(folder / "prometheus" / "prometheus.yml")["scrape_configs"]
    [asked] = scrape["http_sd_configs"]
    assert asked["url"] == "http://10.0.0.5:8265/api/prometheus/sd"
    assert on_this_machine(asked["authorization"]["credentials_file"], mounts(folder, "prometheus")) == token
    assert "secret" not in "".join(file.read_text() for file in folder.rglob("*") if file.is_file())
    assert len(read(folder / "grafana" / "provisioning" / "dashboards" / "rafce.yaml")["providers"]) == 1
    assert "no Ray cluster" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--cluster", "head"], "--cluster head: expected HOST:PORT"),
        (["--cluster", "head:8265", "--token-file", "gone"], "--token-file gone: there is no such file"),
        (["--token-file", "gone"], "--token-file is for --cluster"),
    ],
)
def test_an_option_that_cannot_be_is_refused_and_nothing_is_written(tmp_path, capsys, options, reason):
    assert main(["--write", str(tmp_path / "out"), *options]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_what_a_user_changed_or_added_stays(ray, tmp_path, capsys):
    folder, options = tmp_path / "out", ("--ray-folder", str(ray))
    prometheus = written(folder, *options) / "prometheus" / "prometheus.yml"
    added = prometheus.parent / "rules" / "mine.yaml"
    added.write_text("groups: []\n")
    original = prometheus.read_text()
    written(folder, *options)
    assert "was kept" not in capsys.readouterr().err
    assert not list(folder.rglob("*.new"))
    prometheus.write_text("mine: 1\n")
    written(folder, *options)
    said = " ".join(capsys.readouterr().err.split())
    assert "prometheus.yml has other content and was kept. The new content is in prometheus.yml.new" in said
    assert prometheus.read_text() == "mine: 1\n"
    assert prometheus.with_name("prometheus.yml.new").read_text() == original
    assert added.read_text() == "groups: []\n"


def test_the_next_command_is_printed_and_a_missing_cluster_is_a_warning(tmp_path, capsys):
    folder = written(tmp_path / "my out", "--ray-folder", str(tmp_path / "none"), "--grafana-port=3001")
    said = " ".join(capsys.readouterr().err.split())
    assert f"docker compose -f '{folder}/compose.yaml' up -d" in said
    assert f"{DISCOVERY_FILE} does not exist: no Ray cluster" in said
    assert "http://127.0.0.1:3001/d/rafceTrainTune" in said
    assert "RAY_GRAFANA_HOST=http://127.0.0.1:3001" in said
