"""`serve deploy serve/production.yaml` on a cluster: keys, replicas by load, another version by user_config, and a typo
that harms nobody.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_load import Reply, closed_loop, open_loop, post
from processes import kill_all
from serving import free_port

from rafce_ray.serve.fast_path import fast_path
from rafce_ray.service.keys import new_key

pytestmark = pytest.mark.ray

FILE = Path(__file__).parents[2] / "serve" / "production.yaml"
PROGRAMS = Path(sys.executable).parent
START_S = 180


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a cluster of one machine, started by `ray start` as the file's first lines say."""
    folder = Path(f"/tmp/r{os.getpid()}")
    port, dashboard = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= fast_path(folder) | {"RAFCE_SERVE_HOST": "127.0.0.1", "RAY_AUTH_MODE": "disabled"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    argv = [PROGRAMS / "ray", "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder / 'ray'}"]
    argv += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    argv += ["--ray-client-server-port", str(free_port()), "--dashboard-agent-listen-port", str(free_port())]
    head = subprocess.Popen(
        argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    yield environment
    kill_all(head)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def deployed(cluster: dict[str, str], registry: Path, tmp_path_factory: pytest.TempPathFactory):
    """The production file with places of this machine, two replicas: its port, a key, and ``deploy(changes)``, which
    deploys it again.
    """
    folder = tmp_path_factory.mktemp("deployed")
    key = new_key(folder / "keys.json", "test", frozenset(("predict",)))
    config = yaml.safe_load(FILE.read_text())
    config["http_options"]["port"] = free_port()
    (application,) = config["applications"]
    application["args"] |= {
        "registry": str(registry),
        "keys_file": str(folder / "keys.json"),
        "engine": "torch",
    }
    (deployment,) = application["deployments"]
    as_written = deployment["autoscaling_config"] | {"min_replicas": 2, "max_replicas": 2}
    arguments = application["args"]
    deployment["ray_actor_options"]["num_cpus"] = 1

    def deploy(version: str = "", autoscaling: Mapping[str, float] | None = None, **args: str) -> None:
        deployment["user_config"]["version"] = version
        deployment["autoscaling_config"] = as_written | (autoscaling or {})
        application["args"] = arguments | args
        (folder / "production.yaml").write_text(yaml.safe_dump(config))
        run([PROGRAMS / "serve", "deploy", folder / "production.yaml"], cluster)

    deploy()
    return config["http_options"]["port"], key, deploy


def run(argv: list[Any], environment: dict[str, str]) -> str:
    """Output of a command that may have to wait for the cluster's dashboard."""
    deadline = time.monotonic() + START_S
    while True:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=START_S, check=False)
        if done.returncode == 0 or time.monotonic() > deadline:
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout
        time.sleep(1)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def status_of(port: int, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_the_production_file_serves_changes_its_version_and_survives_a_typo(deployed, cluster, photograph: Path):
    port, key, deploy = deployed
    wait_for(lambda: status_of(port, "/readyz") == 200, "the file was deployed, but nothing is ready")
    image = photograph.read_bytes()
    with_key = [post("/v1/predict?faces=aligned", image, "image/png", bearer(key))]
    without = [post("/v1/predict?faces=aligned", image, "image/png")]
    assert {reply.status for reply in asyncio.run(open_loop(port, without, 5, 1))} == {401}
    assert versions(asyncio.run(open_loop(port, with_key, 5, 1))) == {"first"}

    async def deploy_under_load(**args: str) -> list[Reply]:
        deploying = asyncio.create_task(asyncio.to_thread(deploy, **args))
        replies: list[Reply] = []
        while not deploying.done() or len(replies) < 150:
            replies += await open_loop(port, with_key, 10, 1)
        await deploying
        return replies

    replies = asyncio.run(deploy_under_load(version="second"))
    assert {reply.status for reply in replies} == {200}
    wait_for(lambda: versions_or_none(port, with_key) == {"second"}, "the version stays the first")

    replies = asyncio.run(deploy_under_load(version="second", engin="torch"))
    assert {reply.status for reply in replies} == {200}
    wait_for(lambda: "DEPLOY_FAILED" in run([PROGRAMS / "serve", "status"], cluster), "the typo is accepted")
    assert "did you mean 'engine'" in " ".join(run([PROGRAMS / "serve", "status"], cluster).split())
    assert versions(asyncio.run(open_loop(port, with_key, 5, 1))) == {"second"}


@pytest.mark.long
def test_replicas_come_with_load_and_go_without_it(deployed, cluster, photograph: Path):
    port, key, deploy = deployed
    request = [post("/v1/predict?faces=aligned", photograph.read_bytes(), "image/png", bearer(key))]
    quick = {"upscale_delay_s": 1, "downscale_delay_s": 10, "look_back_period_s": 2, "metrics_interval_s": 0.5}
    deploy("second", {"min_replicas": 1, "target_ongoing_requests": 1} | quick)

    async def until(num_replicas: int, load: Callable[[], Awaitable[list[Reply]]]) -> list[Reply]:
        replies, deadline = [], time.monotonic() + START_S
        while time.monotonic() < deadline:
            # Without a pause of the load, in which replicas would go again.
            counting = asyncio.create_task(asyncio.to_thread(num_running, cluster))
            replies += await load()
            if await counting == num_replicas:
                return replies
        raise AssertionError(f"there are never {num_replicas} replicas")

    wait_for(lambda: versions_or_none(port, request) == {"second"}, "the second version was deployed, and is not ready")
    light, heavy = (lambda: open_loop(port, request, 2, 3)), (lambda: closed_loop(port, request, 16, 10))
    for num_replicas, load in ((1, light), (2, heavy), (1, light)):
        replies = asyncio.run(until(num_replicas, load))
        assert {reply.status for reply in replies} == {200}, num_replicas


def num_running(cluster: dict[str, str]) -> int:
    """0 while the application is deployed anew, when its deployments are not told."""
    status = yaml.safe_load(run([PROGRAMS / "serve", "status"], cluster))
    (application,) = status["applications"].values()
    deployments = application["deployments"]
    return deployments["rafce"]["replica_states"].get("RUNNING", 0) if deployments else 0


def bearer(key: str) -> list[tuple[str, str]]:
    return [("Authorization", f"Bearer {key}")]


def versions_or_none(port: int, requests: list[bytes]) -> set[str] | None:
    """None where one was not answered with 200."""
    replies = asyncio.run(open_loop(port, requests, 5, 1))
    return versions(replies) if {reply.status for reply in replies} == {200} else None


def versions(replies: list[Reply]) -> set[str]:
    assert {reply.status for reply in replies} == {200}, [reply.body for reply in replies]
    return {json.loads(reply.body)["model"]["version"] for reply in replies}
