"""``rafce monitor``: the files that it writes, the programs that it starts, and that it ends only those."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest
import yaml
from serving import free_port

from rafce_ray.errors import RafceError, UsageError
from rafce_ray.monitoring import command
from rafce_ray.monitoring.configuration import DISCOVERY_FILE, ray_folder, read_targets, write_configuration
from rafce_ray.monitoring.dashboard import dashboard_line
from rafce_ray.monitoring.programs import Program, answers, check_free, find_grafana, find_prometheus, running

PROGRAM = """#!{python}
import sys, http.server
port = int(next(one for one in sys.argv if one.startswith("--web.listen-address=")).rpartition(":")[2])
pages = {{
    "/-/ready": b"",
    "/api/v1/targets?state=active": b'''{{"data": {{"activeTargets": [
        {{"health": "up", "lastError": ""}}, {{"health": "down", "lastError": "connection refused"}}]}}}}''',
}}
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path in pages else 404)
        self.end_headers()
        self.wfile.write(pages.get(self.path, b""))
print("listening", *sys.argv[1:], flush=True)
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""
"""Answers as Debian's Prometheus does when it is asked whether it is ready, and which ports it reads."""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def ray(tmp_path) -> Path:
    """Ray's folder as the head of a cluster leaves it."""
    folder = tmp_path / "ray"
    folder.mkdir()
    groups = [{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1", "127.0.0.1:2"]}]
    (folder / DISCOVERY_FILE).write_text(json.dumps(groups))
    return folder


@pytest.mark.parametrize(
    ("environment", "folder"),
    [({}, "/tmp/ray"), ({"TMPDIR": "/scratch"}, "/scratch/ray"), ({"TMPDIR": "/a", "RAY_TMPDIR": "/b"}, "/b/ray")],
)
def test_rays_folder_is_found_where_ray_puts_it(environment, folder):
    assert ray_folder(environment) == Path(folder)


def test_no_cluster_is_an_error_that_names_the_file_and_the_remedy(tmp_path):
    with pytest.raises(UsageError, match=rf"{DISCOVERY_FILE}: there is no such file.*--ray-folder"):
        read_targets(tmp_path)
    (tmp_path / DISCOVERY_FILE).write_text('{"targets": 3}')
    with pytest.raises(UsageError, match="not Ray's list of metrics ports"):
        read_targets(tmp_path)


def test_the_configuration_is_valid_and_names_files_that_are_there(ray, tmp_path):
    assert read_targets(ray) == ["127.0.0.1:1", "127.0.0.1:2"]
    written = write_configuration(tmp_path / "out", ray, prometheus_port=9091, grafana_port=3001)
    prometheus = yaml.safe_load(written.prometheus.read_text())
    [scrape] = prometheus["scrape_configs"]
    assert scrape["file_sd_configs"] == [{"files": [str(ray / DISCOVERY_FILE)], "refresh_interval": "10s"}]
    [pattern] = prometheus["rule_files"]
    rules = sorted(Path(pattern).parent.glob(Path(pattern).name))
    assert "alerts.yaml" in [file.name for file in rules]
    assert all(yaml.safe_load(file.read_text())["groups"] for file in rules)

    grafana = written.grafana.parent
    provisioning = Path(re.search(r"^provisioning = (.*)$", written.grafana.read_text(), re.MULTILINE)[1])
    assert provisioning == grafana / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "rafce.yaml").read_text())["datasources"]
    assert (source["name"], source["url"]) == ("Prometheus", "http://127.0.0.1:9091")
    providers = yaml.safe_load((provisioning / "dashboards" / "rafce.yaml").read_text())["providers"]
    ours, rays = (Path(one["options"]["path"]) for one in providers)
    uids = [json.loads(file.read_text())["uid"] for file in ours.glob("*.json")]
    assert [f"d/{uid}" for uid in sorted(uids)] == sorted(written.titles)
    assert rays == ray / "session_latest" / "metrics" / "grafana" / "dashboards"


def test_what_a_user_changed_is_moved_aside_and_what_a_user_added_stays(ray, tmp_path, capsys):
    def write() -> Path:
        return write_configuration(tmp_path / "out", ray, prometheus_port=9090, grafana_port=3000).prometheus

    prometheus = write()
    added = prometheus.parent / "rules" / "mine.yaml"
    added.write_text("groups: []\n")
    again = write()
    assert capsys.readouterr().err == ""
    assert not list(again.parent.glob("*.before-*"))
    prometheus.write_text("mine: 1\n")
    write()
    assert "prometheus.yml differed from what is written now: it is kept as prometheus.yml.before-1" in " ".join(
        capsys.readouterr().err.split()
    )
    assert prometheus.with_name("prometheus.yml.before-1").read_text() == "mine: 1\n"
    assert yaml.safe_load(prometheus.read_text())["scrape_configs"]
    assert added.read_text() == "groups: []\n"


def test_a_program_is_there_for_the_block_and_gone_after_it(tmp_path):
    binary = executable(tmp_path / "bin" / "prometheus", PROGRAM.format(python=sys.executable))
    port = free_port()
    program = Program("Prometheus", (str(binary), f"--web.listen-address=:{port}"), port, "-/ready", tmp_path / "log")
    with running(program) as process:
        assert answers(f"{program.url}/-/ready")
        with pytest.raises(UsageError, match=f"--prometheus-port {port}: another program listens there"):
            check_free(program, "--prometheus-port")
    assert process.poll() is not None
    assert not answers(f"{program.url}/-/ready")
    check_free(program, "--prometheus-port")


def test_a_program_that_does_not_come_up_is_an_error_with_its_last_words(tmp_path):
    binary = executable(tmp_path / "grafana", "#!/bin/sh\necho no such folder: /usr/share >&2\nexit 3\n")
    program = Program("Grafana", (str(binary),), free_port(), "api/health", tmp_path / "log")
    with (
        pytest.raises(RafceError, match=r"(?s)Grafana ended with code 3.*no such folder: /usr/share"),
        running(program),
    ):
        pytest.fail("it is not up")


def test_programs_are_found_on_the_path_and_given_what_was_written(ray, tmp_path, monkeypatch):
    written = write_configuration(tmp_path / "out", ray, prometheus_port=1, grafana_port=2)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_prometheus(written, 1) is None
    assert find_grafana(written, 2, None) is None
    for name in ("prometheus", "grafana"):
        executable(tmp_path / "bin" / name, "")
    assert f"--config.file={written.prometheus}" in find_prometheus(written, 1).command
    found = find_grafana(written, 2, tmp_path / "home")
    assert found.command[1:] == ("server", f"--config={written.grafana}", f"--homepath={tmp_path / 'home'}")


def test_the_command_says_what_is_missing_and_how_to_get_it(ray, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--ray-folder", str(ray), "--out", str(tmp_path / "out")]
    assert command.main([*arguments, "--write-only"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "none of the cluster's 2 metrics ports answers" in said
    assert "Prometheus is not on the PATH. Get it: apt-get install prometheus" in said
    assert f"grafana server --config={tmp_path / 'out' / 'grafana' / 'grafana.ini'}" in said
    assert command.main(arguments) == 1
    assert "nothing was started" in capsys.readouterr().err


def test_the_command_starts_what_is_there_and_ends_only_that(ray, tmp_path):
    executable(tmp_path / "bin" / "prometheus", PROGRAM.format(python=sys.executable))
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "rafce_ray.cli",
            "monitor",
            "--ray-folder",
            str(ray),
            "--out",
            "out",
            f"--prometheus-port={port}",
        ],
        cwd=tmp_path,
        env=os.environ | {"PATH": str(tmp_path / "bin"), "PYTHONPATH": str(Path(command.__file__).parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not answers(f"http://127.0.0.1:{port}/-/ready"):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said = []
        for line in process.stderr:
            said.append(line)
            if "metrics ports:" in line:
                break
        assert "Prometheus reads 1 of 2 metrics ports: connection refused" in said[-1]
        [curves] = [line for line in said if "  training:" in line]
        assert urllib.parse.parse_qs(curves.partition("?")[2].strip())["g0.expr"] == [command.CURVES["training"][0]]
        assert any(f"alerts: http://127.0.0.1:{port}/classic/alerts" in line for line in said)
    finally:
        process.send_signal(signal.SIGTERM)
    with process.stderr:
        assert process.wait(30) == 0, process.stderr.read()
    assert not answers(f"http://127.0.0.1:{port}/-/ready")


def test_the_dashboards_line_says_how_to_get_past_what_guards_it():
    plain = dashboard_line("127.0.0.1:8265", "jobs", {"RAY_AUTH_MODE": "disabled"}, started_here=True)
    assert plain == "dashboard: http://127.0.0.1:8265/#/jobs; curves: rafce monitor"
    guarded = dashboard_line("127.0.0.1:8265", "jobs", {"RAY_AUTH_MODE": "token"}, started_here=False)
    assert "#/jobs (it asks for a token: ray get-auth-token prints it; " in guarded
    assert "ssh -N -L 8265:127.0.0.1:8265 HEAD-NODE" in guarded
    assert "ssh" not in dashboard_line("10.0.0.7:8265", "jobs", {}, started_here=False)
