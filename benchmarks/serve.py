"""The endpoint beside what it could be: requests a second, latency, and CPU milliseconds a request by process.

Sides, all started before the first window and loaded in turn (the others are suspended), with the same bundle (a
resnet18), threads and niceness:
  limit     decode and batched forward in one process, without HTTP
  raw       `rafce serve`, an image a request as its body
  form      the same as a multipart form
  litserve  LitServe with the same engine, batches and decoder; a multipart form
  fastapi   FastAPI and torch, one request at a time; a multipart form
  python    `rafce serve` behind Ray Serve's default proxy, which is written in Python; raw body
  constant  Ray Serve on the path of `rafce serve`, with an application that reads the body and answers the same bytes
  to all
Beside them, windows with one client (`single`), at half of the capacity that was measured before (`half`), and with
eight images a request.

  python benchmarks/serve.py [--windows 5] [--seconds 8] [--engine openvino] [--out benchmarks/results/serve.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from http_load import Reply, closed_loop, form, open_loop, post, quantile
from rich.console import Console
from rich.table import Table
from serving import (
    BATCH,
    CLIENTS,
    Server,
    keep_the_client_going,
    side_command,
    start_service,
    start_side,
    write_faces,
    write_model,
)

from rafce_ray.base.console import progress_bar
from rafce_ray.base.hardware import choose_device, describe_hardware

ALIGNED = (("faces", "aligned"),)
JPEG = "image/jpeg"
WARM_S = 1.5
OTHERS = ("litserve", "fastapi", "python", "constant")
GOALS_BESIDE = (("raw", "litserve", 1.25), ("form", "litserve", 1.1), ("raw", "fastapi", 5), ("raw", "python", 4))
Load = Callable[[int, list[bytes]], Awaitable[list[Reply]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=5, help="windows of each side, interleaved")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each window")
    parser.add_argument("--image-px", type=int, default=112, help="side of the network's input: what the model costs")
    parser.add_argument("--engine", default="openvino", help="of all sides but fastapi, which has torch")
    parser.add_argument("--beside", nargs="*", default=OTHERS, choices=OTHERS, help="other servers to compare with")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    keep_the_client_going()
    with tempfile.TemporaryDirectory(prefix="serve-benchmark-") as folder, ExitStack() as running:
        bench = Bench(Path(folder), arguments, running)
        with progress_bar("windows", arguments.windows) as advance:
            for _ in range(arguments.windows):
                bench.window_of_each()
                advance(1)
        figures = bench.figures()
    show(figures)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


class Bench:
    """The servers, and what was measured of each so far."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, running: ExitStack) -> None:
        self.seconds, self.image_px = arguments.seconds, arguments.image_px
        self.engine = engine = arguments.engine
        bundle, self.faces = str(write_model(folder / "bundle", image_px=self.image_px)), write_faces(folder)
        self.limit = subprocess.Popen(
            [*side_command("limit"), bundle, engine, str(folder / "faces")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        running.callback(self.limit.kill)
        ours = start_service("--bundle", bundle, "--engine", engine)
        running.callback(ours.stop)
        assert self.limit.stdout.readline() == "ready\n"
        raw = [post("/v1/predict?faces=aligned", face, JPEG) for face in self.faces]
        ours_form = [post("/v1/predict", *form(face, options=ALIGNED)) for face in self.faces]
        theirs = [post("/predict", *form(face)) for face in self.faces]
        self.sides: dict[str, tuple[Server, list[bytes]]] = {"raw": (ours, raw), "form": (ours, ours_form)}
        others: dict[str, tuple[Callable[[], Server], list[bytes]]] = {
            "litserve": (lambda: start_side("litserve", bundle, engine), theirs),
            "fastapi": (lambda: start_side("fastapi", bundle, "torch"), theirs),
            # A user's own setting wins over the fast path's.
            "python": (
                lambda: start_service(
                    "--bundle", bundle, "--engine", engine, environment={"RAY_SERVE_ENABLE_HA_PROXY": "0"}
                ),
                raw,
            ),
            "constant": (lambda: start_side("constant"), raw),
        }
        for name in arguments.beside:
            start, requests = others[name]
            self.sides[name] = start(), requests
            running.callback(self.sides[name][0].stop)
        self.eight = [post("/v1/predict", *form(*self.faces[at : at + 8], options=ALIGNED)) for at in range(0, 32, 8)]
        self.windows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for server, requests in self.sides.values():
            warm(server, requests)
        for server, _ in self.sides.values():
            server.pause()

    def window_of_each(self) -> None:
        """One window of every side, in turn."""
        self.windows["limit"].append(self.ask_limit(BATCH))
        for name in self.sides:
            self.window(name, name, lambda port, requests: closed_loop(port, requests, CLIENTS, self.seconds))
        self.window("single", "raw", lambda port, requests: closed_loop(port, requests, 1, self.seconds))
        half = self.windows["raw"][-1]["per_s"] / 2
        self.window("half", "raw", lambda port, requests: open_loop(port, requests, half, self.seconds))
        self.window("eight", "raw", lambda port, _: closed_loop(port, self.eight, 1, self.seconds))
        self.windows["limit of eight"].append(self.ask_limit(8))

    def window(self, name: str, side: str, load: Load) -> None:
        """One window of a side, which alone runs, after some warming up."""
        server, requests = self.sides[side]
        server.resume()
        try:
            warm(server, requests)
            self.windows[name].append(measured(server, lambda: load(server.port, requests)))
        finally:
            server.pause()

    def ask_limit(self, batch: int) -> dict[str, Any]:
        self.limit.stdin.write(f"{batch} {self.seconds}\n")
        self.limit.stdin.flush()
        per_s, cpu_s, forward_s = map(float, self.limit.stdout.readline().split())
        return {"per_s": per_s, "cpu_ms": {"process": cpu_s * 1000}, "forward_ms": forward_s * 1000}

    def figures(self) -> dict[str, Any]:
        """Medians over the windows, and the ratios that the goals are about."""
        sides = {name: summary(windows) for name, windows in self.windows.items()}
        rate = {name: side["per_s"] for name, side in sides.items()}
        cpu_limit = sum(sides["limit"]["cpu_ms"].values())
        server_cpu = sum(ms for part, ms in sides["raw"]["cpu_ms"].items() if part != "client")
        ratios = {
            "raw / limit": (rate["raw"] / rate["limit"], ">= 0.90"),
            **{
                f"{ours} / {theirs}": (rate[ours] / rate[theirs], f">= {goal}")
                for ours, theirs, goal in GOALS_BESIDE
                if theirs in rate
            },
            f"p99 / p50 with {CLIENTS} clients": (sides["raw"]["p99_ms"] / sides["raw"]["p50_ms"], "<= 2"),
            "p99 at half / p50 of one client": (sides["half"]["p99_ms"] / sides["single"]["p50_ms"], "<= 3"),
            "CPU beside the model / the model's": (server_cpu / cpu_limit - 1, "<= 0.10"),
            "8 images: request / model": (sides["eight"]["p50_ms"] / sides["limit of eight"]["forward_ms"], "<= 1.2"),
        }
        return {
            "machine": f"{len(os.sched_getaffinity(0))} CPU cores, {describe_hardware(choose_device())['name']}",
            "payload": f"JPEG faces of 112 px, {statistics.mean(map(len, self.faces)) / 1000:.1f} kB",
            "model": f"resnet18 at {self.image_px} px",
            "engine": self.engine,
            "windows": len(self.windows["raw"]),
            "seconds": self.seconds,
            "sides": sides,
            "ratios": {name: {"measured": round(value, 3), "goal": goal} for name, (value, goal) in ratios.items()},
        }


def warm(server: Server, requests: list[bytes]) -> None:
    """Ask until all is answered: HAProxy asks a replica that was suspended only when it has seen it answer.

    SystemExit after a minute.
    """
    deadline = time.monotonic() + 60
    while any(reply.status != 200 for reply in asyncio.run(closed_loop(server.port, requests, CLIENTS, WARM_S))):
        if time.monotonic() > deadline:
            raise SystemExit("a server that was suspended does not answer any more")


def measured(server: Server, load: Callable[[], Awaitable[list[Reply]]]) -> dict[str, Any]:
    """One window: requests a second, quantiles, failures, and CPU milliseconds a request by part of the server."""
    before, client, began = server.cpu_s(), time.process_time(), time.monotonic()
    replies = asyncio.run(load())
    took, client = time.monotonic() - began, time.process_time() - client
    after = server.cpu_s()
    good = [reply for reply in replies if reply.status == 200]
    cpu = {part: seconds - before.get(part, 0.0) for part, seconds in after.items()} | {"client": client}
    return {
        "per_s": len(good) / took,
        "failed": len(replies) - len(good),
        "p50_ms": quantile(good, 0.5) * 1000,
        "p99_ms": quantile(good, 0.99) * 1000,
        "cpu_ms": {part: 1000 * seconds / len(good) for part, seconds in cpu.items()},
    }


def summary(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure; of requests a second the least and the most, too."""
    found: dict[str, Any] = {
        key: round(statistics.median(window[key] for window in windows), 3) for key in windows[0] if key != "cpu_ms"
    }
    parts = sorted({part for window in windows for part in window["cpu_ms"]})
    found["cpu_ms"] = {
        part: round(statistics.median(window["cpu_ms"].get(part, 0.0) for window in windows), 3) for part in parts
    }
    rates = [window["per_s"] for window in windows]
    return {**found, "per_s_least": round(min(rates), 1), "per_s_most": round(max(rates), 1)}


def show(figures: dict[str, Any]) -> None:
    title = (
        f"{figures['model']}, {figures['engine']}, {figures['payload']}, {figures['windows']} windows of "
        f"{figures['seconds']:g} s"
    )
    table = Table(title=title)
    for column in ("side", "requests/s", "least-most", "p50 ms", "p99 ms", "not 200", "CPU ms a request"):
        table.add_column(column)
    for name, side in figures["sides"].items():
        cpu = ", ".join(
            f"{part} {ms:.2f}" for part, ms in sorted(side["cpu_ms"].items(), key=lambda one: -one[1]) if ms >= 0.01
        )
        spread = f"{side['per_s_least']:.0f}-{side['per_s_most']:.0f}"
        quantiles = [f"{side[key]:.1f}" if key in side else "" for key in ("p50_ms", "p99_ms")]
        table.add_row(name, f"{side['per_s']:.1f}", spread, *quantiles, str(side.get("failed", "")), cpu)
    ratios = Table("ratio", "measured", "goal")
    for name, ratio in figures["ratios"].items():
        ratios.add_row(name, f"{ratio['measured']:.3f}", ratio["goal"])
    Console(width=160).print(table, ratios)


if __name__ == "__main__":
    raise SystemExit(main())
