"""A bundle as an HTTP endpoint on this machine, until Ctrl-C."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rafce_ray.base.console import handled_signals, say
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.hardware import num_cores
from rafce_ray.base.storage import locate
from rafce_ray.serve.drain import DRAIN_S, drain, outcome
from rafce_ray.serve.fast_path import fast_path
from rafce_ray.service.config import ServiceConfig
from rafce_ray.service.keys import read_keys
from rafce_ray.service.live import Source
from rafce_ray.train.environment import check_ray, dashboard_line, ray_address

APPLICATION = "rafce"
READY_S = 120.0
POLL_S = 0.2
EXCEPTION = re.compile(
    r"^(?:\w+\.)*\w*(?:Error|Exception): (?P<message>.+(?:\n(?!\s*(?:The above|During|ray::|Traceback|\Z)).+)*)",
    re.MULTILINE,
)
OBJECT_STORE_BYTES = 100 * 2**20
"""Nothing is put there: a replica gets bytes and answers bytes."""


def serve_until_stopped(config: ServiceConfig, host: str, port: int, replicas: int, *, dashboard: bool) -> None:
    """Serve on ``host:port`` until SIGINT or SIGTERM; returns when everything is shut down.

    ``dashboard``: whether a cluster that starts here has one. UsageError where the bundle is missing or the port is
    taken; RafceError, with the replica's message, where no replica could be started.
    """
    if config.keys_file is not None:
        read_keys(Path(config.keys_file))
    target = Source(config.bundle, config.registry).look()
    what = locate(target.place).shown + ("" if target.version is None else f" (version {target.version})")
    check_port(host, port)
    check_ray()
    # The address of the host from this machine, as URLs write it.
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"
    number = f"{replicas} replica{'s' if replicas > 1 else ''}"
    say(f"serving {what} at {url} with {number}: starting Ray takes about 20 s; Ctrl-C ends it")
    stop = threading.Event()
    # Inside as well: Ray replaces the handler of SIGTERM when it starts.
    with _stopped_by_signals(stop), ray_serve(host, port, dashboard) as folder, _stopped_by_signals(stop):
        _deploy(config, replicas, stop)
        _wait_until_ready(url, stop)
        if not stop.is_set():
            _tell(config, url)
            stop.wait()
        say("shutting down: no new requests are accepted, those in work are answered")
        say(outcome(drain(folder), DRAIN_S))


def check_port(host: str, port: int) -> None:
    """UsageError where nothing can listen there."""
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            remedy = "Choose another port, or end the program."
            raise UsageError(f"--port {port}: another program listens there. {remedy}") from None
        raise UsageError(f"--host {host} --port {port}: cannot be listened on ({error}).") from None


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set ``stop``; a second one ends the process as usual."""

    def on_signal(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    with handled_signals(on_signal, (signal.SIGINT, signal.SIGTERM)):
        yield


@contextmanager
def ray_serve(host: str, port: int, dashboard: bool) -> Iterator[Path]:
    """HAProxy's folder of Serve, in a cluster of our own or that of RAY_ADDRESS. Serve ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="rafce", dir="/tmp"))
    try:
        environment = fast_path(folder, host=host)
        # A busy machine may need more than Ray's 30 s.
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
        # A user's own setting wins; Ray reads them all when it is imported.
        environment = {name: os.environ.setdefault(name, value) for name, value in environment.items()}
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        address = ray_address()
        # Processes of our own cluster inherit this one's environment.
        options: dict[str, Any] = (
            {"runtime_env": {"env_vars": environment}}
            if address
            else {"include_dashboard": dashboard, "object_store_memory": OBJECT_STORE_BYTES}
        )
        try:
            options |= {"job_config": ray.job_config.JobConfig(metadata={"job_name": "rafce serve"})}
            context = ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
            if context.dashboard_url:
                say(dashboard_line(context.dashboard_url, "serve", os.environ, started_here=not address))
            if address and serve.status().proxies:
                raise UsageError(f"RAY_ADDRESS={address}: Serve runs there already. Deploy to it with serve deploy.")
            # HAProxy alone takes requests from elsewhere: what Ray opens behind it stays on this machine.
            serve.start(http_options={"host": "127.0.0.1", "port": port})
        except RafceError:
            raise
        except Exception as error:
            # Ray has no class of its own for what can go wrong here.
            first_line, *_ = str(error).strip().splitlines() or [type(error).__name__]
            raise RafceError(f"Ray Serve could not be started: {first_line}") from None
        try:
            yield folder
        finally:
            # A cluster of our own ends whole, and 5 s sooner.
            if address:
                serve.shutdown()
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _deploy(config: ServiceConfig, replicas: int, stop: threading.Event) -> None:
    """Start the replicas and wait until they all run. RafceError, with the replica's error, where they do not."""
    import ray
    from ray import serve

    from rafce_ray.serve.deployment import bound

    threads = config.threads or max(1, num_cores() // replicas)
    actor: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}
    if config.engine in ("auto", "torch"):
        # Half of it, so that a new replica finds room next to the old one that it replaces.
        actor["num_gpus"] = round(min(1.0, ray.cluster_resources().get("GPU", 0) / (2 * replicas)), 4)
    config = config.model_copy(update={"threads": threads})
    application = bound(config, num_replicas=replicas, ray_actor_options=actor, max_constructor_retry_count=1)
    target = serve.RunTarget(application, name=APPLICATION, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    while not stop.wait(POLL_S):
        state = serve.status().applications[APPLICATION]
        if state.status == "RUNNING":
            return
        if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            messages = [*(each.message for each in state.deployments.values()), state.message]
            # The last exception of the first traceback is why a replica died.
            for message in messages:
                if found := list(EXCEPTION.finditer(message)):
                    raise RafceError(found[-1]["message"].strip())
            raise RafceError(f"no replica could be started: {' '.join(messages).strip()}")


def _wait_until_ready(url: str, stop: threading.Event) -> None:
    """Wait until the canary image is answered through the open port. RafceError after READY_S seconds."""
    deadline, last = time.monotonic() + READY_S, "nothing answers"
    # The environment may name a proxy, which does not reach this machine's own ports.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while not stop.wait(POLL_S):
        try:
            opener.open(f"{url}/readyz", timeout=10).close()
            return
        except urllib.error.HTTPError as error:
            last = f"status {error.code}: {error.read(1000).decode(errors='replace')}"
        except (OSError, http.client.HTTPException) as error:
            last = str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise RafceError(f"{url}/readyz did not answer 200 within {READY_S:.0f} s; the last answer: {last}")


def _tell(config: ServiceConfig, url: str) -> None:
    import ray

    key = "" if config.keys_file is None else " -H 'Authorization: Bearer KEY'"
    say(f"ready: {url} (page: {url}/, documentation: {url}/docs). Try:")
    say(f"  curl{key} -H 'Content-Type: image/jpeg' --data-binary @photo.jpg {url}/v1/predict")
    nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"] > 0]
    urls = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    say(f"metrics for Prometheus: {', '.join(urls)}")
    print(url, flush=True)
