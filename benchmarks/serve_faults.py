"""What the endpoint does where things go wrong: bad inputs, swaps of the model, a killed replica, overload, and a long
time.

Each part starts `rafce serve` with a resnet18 at 112 px, measures its capacity with 32 clients and then loads it at a
part of it:
  bad       10,000 bad inputs (tests/service/bad_inputs.py) as fast as two clients send them, beside valid requests at a
  third of capacity swap      five times 60 s at half of capacity, in which POST /v1/admin/promote makes another version
  live kill      kill -9 of one of two replicas at half of capacity overload  three times capacity for 60 s soak      20
  minutes at half of capacity: memory of every process

  python benchmarks/serve_faults.py [bad swap kill overload soak] [--seconds 60] [--soak-minutes 20] [--out
  benchmarks/results/serve_faults.json]
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import importlib.util
import json
import os
import random
import signal
import statistics
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from http_load import Connection, Reply, closed_loop, open_loop, post, quantile
from rich.console import Console
from serving import (
    CLIENTS,
    Server,
    free_port,
    keep_the_client_going,
    predictor_of,
    start_service,
    write_faces,
    write_model,
)

from rafce_ray.cli.bundle import main as bundle_command
from rafce_ray.faces.decode import decode_face
from rafce_ray.service.keys import new_key

ENGINE = "openvino"
NUM_BAD = 10_000
TOLERANCE = 1e-6
POLL_S = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="which of them, in this order")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each swap, and of the overload")
    parser.add_argument("--soak-minutes", type=float, default=20.0)
    parser.add_argument("--bad", type=int, default=NUM_BAD, help="how many bad inputs")
    parser.add_argument(
        "--out", type=Path, help="write the figures as JSON; parts that are not measured now stay as they are there"
    )
    arguments = parser.parse_args()
    keep_the_client_going()
    with tempfile.TemporaryDirectory(prefix="serve-faults-") as folder:
        material = Material(Path(folder))
        for part in arguments.parts:
            figures = PARTS[part](material, arguments)
            Console().print(f"{part}:", json.dumps(figures, indent=1))
            if arguments.out:
                before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
                arguments.out.write_text(json.dumps(before | {part: figures}, indent=1) + "\n")
    return 0


class Material:
    """Two bundles of other weights, faces to send, and the probabilities that each bundle gives each face."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bundles = [write_model(folder / "a", 0), write_model(folder / "b", 1)]
        self.faces = write_faces(folder)
        self.requests = [post("/v1/predict?faces=aligned", face, "image/jpeg") for face in self.faces]
        self.expected: dict[str, list[tuple[str, list[float]]]] = {}
        for bundle in self.bundles:
            predictor = predictor_of(str(bundle), ENGINE)
            pixels = np.stack([decode_face(face, predictor.bundle.preprocessing.stored_px) for face in self.faces])
            self.expected[predictor.bundle.weights_sha256] = [
                (found.emotion.label, [found.emotion.probability, *(unit.probability for unit in found.action_units)])
                for found in predictor.predict(pixels)
            ]

    def wrong(self, replies: Sequence[Reply]) -> int:
        """Answers that are not, to 1e-6, those of the model that they name for any one face that was sent."""
        return sum(not self._is_right(json.loads(reply.body)) for reply in replies if reply.status == 200)

    def _is_right(self, answer: dict[str, Any]) -> bool:
        (face,) = answer["results"][0]["faces"]
        found = np.array([face["emotion"]["probability"], *(unit["probability"] for unit in face["action_units"])])
        return any(
            face["emotion"]["label"] == label and float(np.abs(found - expected).max()) <= TOLERANCE
            for label, expected in self.expected[answer["model"]["sha256"]]
        )

    def serve(self, *more: str, environment: dict[str, str] | None = None) -> Server:
        return start_service("--bundle", str(self.bundles[0]), "--engine", ENGINE, *more, environment=environment)


def capacity(server: Server, requests: Sequence[bytes]) -> float:
    """Good answers a second with 32 clients, in the second of two windows."""
    asyncio.run(closed_loop(server.port, requests, CLIENTS, 5))
    began = time.monotonic()
    replies = asyncio.run(closed_loop(server.port, requests, CLIENTS, 8))
    return sum(reply.status == 200 for reply in replies) / (time.monotonic() - began)


def read_corpus() -> Any:
    """The tests' module of bad inputs."""
    file = Path(__file__).parents[1] / "tests" / "service" / "bad_inputs.py"
    spec = importlib.util.spec_from_file_location("bad_inputs", file)
    corpus = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corpus)
    return corpus


def bad_inputs(material: Material, arguments: argparse.Namespace) -> dict[str, Any]:
    corpus = read_corpus()
    server = material.serve()
    try:
        rate = capacity(server, material.requests) / 3
        inputs = list(corpus.bad_inputs(arguments.bad))
        # What the first of each kind leaves in memory is no growth.
        asyncio.run(send_bad(server, corpus, random.Random(0).sample(inputs, min(500, len(inputs)))))
        alone = asyncio.run(open_loop(server.port, material.requests, rate, 20))
        memory, processes = memory_mb(server), sorted(server.pids("replica"))
        began = time.monotonic()
        (faults, slowest), valid = asyncio.run(send_bad_beside_valid(server, corpus, inputs, material.requests, rate))
        took = time.monotonic() - began
        after = memory_mb(server)
        return {
            "bad inputs": len(inputs),
            "bad a second": round(len(inputs) / took, 1),
            "not as documented": len(faults),
            "the first of them": faults[:3],
            "slowest bad, s": round(slowest, 3),
            "valid a second offered": round(rate, 1),
            "valid sent": len(valid),
            "valid by status": statuses(valid),
            "goodput": round(sum(reply.status == 200 for reply in valid) / len(valid), 4),
            "valid answers that are wrong": material.wrong(valid),
            "valid p50, p99 in ms alone": quantiles(alone),
            "valid p50, p99 in ms beside bad": quantiles(valid),
            "restarts": int(processes != sorted(server.pids("replica"))),
            "memory in MB before, after, growth": growth(memory, after),
        }
    finally:
        server.stop()


async def send_bad_beside_valid(
    server: Server, corpus: Any, inputs: Sequence[Any], requests: Sequence[bytes], rate: float
) -> tuple[tuple[list[str], float], list[Reply]]:
    done, valid = asyncio.Event(), []

    async def send_valid() -> None:
        while not done.is_set():
            valid.extend(await open_loop(server.port, requests, rate, 2))

    async def send_all_bad() -> tuple[list[str], float]:
        try:
            return await send_bad(server, corpus, inputs)
        finally:
            done.set()

    found, _ = await asyncio.gather(send_all_bad(), send_valid())
    return found, valid


async def send_bad(server: Server, corpus: Any, inputs: Sequence[Any], clients: int = 2) -> tuple[list[str], float]:
    """What was answered that is not documented, and the seconds of the slowest answer."""
    following, faults, slowest = iter(inputs), [], 0.0

    async def client() -> None:
        nonlocal slowest
        connection = Connection(server.port)
        for bad in following:
            path = f"/v1/predict?{bad.query}" if bad.query else "/v1/predict"
            headers = [(name, value) for name, value in bad.all_headers().items() if name != "content-type"]
            request = post(path, bad.body, bad.content_type or "", headers)
            if bad.content_type is None:
                request = request.replace(b"Content-Type: \r\n", b"", 1)
            reply = await connection.ask(request, time.monotonic())
            slowest = max(slowest, reply.seconds)
            fault = "no answer" if not reply.status else corpus.fault(bad, reply.status, reply.body)
            if fault is not None:
                faults.append(f"{bad.name}: {fault}")
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return faults, slowest


def swap(material: Material, arguments: argparse.Namespace) -> dict[str, Any]:
    registry, keys = material.folder / "registry", material.folder / "keys.json"
    key = new_key(keys, "benchmark", frozenset(("predict", "admin")))
    versions = [bundle.name for bundle in material.bundles]
    for bundle in material.bundles:
        bundle_command(["add", str(registry), str(bundle), "--as", bundle.name])
    bundle_command(["promote", str(registry), versions[0], "--force", "--why", "the first"])
    bearer = [("Authorization", f"Bearer {key}")]
    requests = [post("/v1/predict?faces=aligned", face, "image/jpeg", bearer) for face in material.faces]
    server = start_service("--registry", str(registry), "--engine", ENGINE, "--keys", str(keys))
    try:
        half, rounds = capacity(server, requests) / 2, []
        for number in range(5):
            body = json.dumps(
                {"version": versions[(number + 1) % 2], "force": True, "why": "a swap under load"}
            ).encode()
            promote = post("/v1/admin/promote", body, "application/json", bearer)
            replies, switched = asyncio.run(_swap_under_load(server, requests, half, arguments.seconds, promote))
            models = Counter(json.loads(reply.body)["model"]["version"] for reply in replies if reply.status == 200)
            during = [reply for reply in replies if switched.due <= reply.due <= switched.due + switched.seconds]
            rounds.append({
                "promotion": f"{switched.status} in {switched.seconds:.1f} s",
                "requests": len(replies),
                "failed": sum(reply.status != 200 for reply in replies),
                "mixed": material.wrong(replies),
                "answers by model": dict(models),
                "p50, p99 in ms beside the swap": quantiles([reply for reply in replies if reply not in during]),
                "p50, p99 in ms during it": quantiles(during),
            })  # fmt: skip
        return {"requests a second": round(half, 1), "rounds": rounds}
    finally:
        server.stop()


async def _swap_under_load(
    server: Server, requests: Sequence[bytes], rate: float, seconds: float, promote: bytes
) -> tuple[list[Reply], Reply]:
    async def after_a_while() -> Reply:
        await asyncio.sleep(seconds / 3)
        return await Connection(server.port).ask(promote, time.monotonic())

    replies, switched = await asyncio.gather(open_loop(server.port, requests, rate, seconds), after_a_while())
    return replies, switched


def kill(material: Material, arguments: argparse.Namespace) -> dict[str, Any]:
    stats = free_port()
    server = material.serve("--replicas", "2", environment={"RAY_SERVE_HAPROXY_STATS_PORT": str(stats)})
    try:
        half = capacity(server, material.requests) / 2
        victim = server.pids("replica")[0]
        found: dict[str, float] = {}

        async def murder() -> None:
            await asyncio.sleep(10)
            found["killed"] = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            while not await asyncio.to_thread(has_two_again, server, victim, stats):
                await asyncio.sleep(POLL_S)
            found["again"] = time.monotonic()

        async def both() -> list[Reply]:
            replies, _ = await asyncio.gather(open_loop(server.port, material.requests, half, 60), murder())
            return replies

        replies = asyncio.run(both())
        in_flight = [reply for reply in replies if reply.due <= found["killed"] <= reply.due + reply.seconds]
        return {
            "requests a second": round(half, 1),
            "requests": len(replies),
            "by status": statuses(replies),
            "failed": sum(reply.status != 200 for reply in replies),
            "in flight when it was killed, both replicas": len(in_flight),
            "wrong answers": material.wrong(replies),
            "two replicas again after, s": round(found["again"] - found["killed"], 1),
            "p50, p99 in ms": quantiles([reply for reply in replies if reply.status == 200]),
        }
    finally:
        server.stop()


def has_two_again(server: Server, victim: int, stats: int) -> bool:
    """Whether another process is in the killed one's place, and HAProxy's own checks find two replicas up."""
    processes = server.pids("replica")
    return victim not in processes and len(processes) == 2 and num_up(stats) == 2


def num_up(stats: int) -> int:
    """Replicas that HAProxy's own checks find up."""
    servers = [row for row in _statistics(stats) if row["svname"] not in ("FRONTEND", "BACKEND") and row["bck"] == "0"]
    return sum(row["status"] == "UP" for row in servers)


def num_in_work(stats: int) -> int:
    """Requests that replicas have or will get, as HAProxy counts them."""
    backends = [row for row in _statistics(stats) if row["svname"] == "BACKEND" and row["pxname"].startswith("http-")]
    return sum(int(row["scur"]) + int(row["qcur"]) for row in backends)


def _statistics(stats: int) -> list[dict[str, str]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{stats}/stats;csv", timeout=5) as answer:
        return list(csv.DictReader(answer.read().decode().removeprefix("# ").splitlines()))


def overload(material: Material, arguments: argparse.Namespace) -> dict[str, Any]:
    server = material.serve()
    try:
        most = capacity(server, material.requests)
        calm = statistics.median(
            reply.seconds for reply in asyncio.run(closed_loop(server.port, material.requests, 1, 5))
        )
        replies = asyncio.run(open_loop(server.port, material.requests, 3 * most, arguments.seconds))
        ended = time.monotonic()

        async def until_calm() -> None:
            connection, row = Connection(server.port), 0
            while row < 5:
                reply = await connection.ask(material.requests[0], time.monotonic())
                row = row + 1 if reply.status == 200 and reply.seconds < 1.5 * calm else 0

        asyncio.run(until_calm())
        recovered = time.monotonic() - ended
        good = [reply for reply in replies if reply.status == 200]
        refused = [reply for reply in replies if reply.status == 429]
        return {
            "capacity a second": round(most, 1),
            "offered a second": round(3 * most, 1),
            "by status": statuses(replies),
            "good a second": round(len(good) / arguments.seconds, 1),
            "good p50, p99 in ms": quantiles(good),
            "refused p50, p99 in ms": quantiles(refused) if refused else None,
            "wrong answers": material.wrong(replies),
            "recovered after, s (five answers in less than 1.5 times a calm one)": round(recovered, 2),
        }
    finally:
        server.stop()


def soak(material: Material, arguments: argparse.Namespace) -> dict[str, Any]:
    server = material.serve()
    try:
        half = capacity(server, material.requests) / 2
        by_status: Counter[int] = Counter()
        wrong, slow, samples = 0, [], defaultdict(list)
        begin = time.monotonic()
        while (now := time.monotonic()) < begin + 60 * arguments.soak_minutes:
            replies = asyncio.run(open_loop(server.port, material.requests, half, 10))
            by_status.update(reply.status for reply in replies)
            wrong += material.wrong(replies)
            slow.append(quantile(replies, 0.99) * 1000)
            for part, mb in memory_mb(server).items():
                samples[part].append(((now - begin) / 60, mb))
        return {
            "requests a second": round(half, 1),
            "minutes": arguments.soak_minutes,
            "by status": dict(by_status),
            "wrong answers": wrong,
            "p99 in ms of 10 s, median and worst": [round(statistics.median(slow), 1), round(max(slow), 1)],
            "memory": {part: slope(points) for part, points in samples.items()},
        }
    finally:
        server.stop()


def slope(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """MB at first and last, and MB an hour by least squares over the time after the first tenth."""
    settled = np.array(points[len(points) // 10 :])
    per_minute = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] if len(settled) > 1 else 0.0
    return {
        "MB at first": round(points[0][1], 1),
        "at last": round(points[-1][1], 1),
        "MB an hour": round(60 * per_minute, 2),
    }


def memory_mb(server: Server) -> dict[str, float]:
    """Memory of a part's own (USS), MB; what has ended meanwhile is left out."""
    found: dict[str, float] = defaultdict(float)
    for process, part in server.parts():
        with suppress(psutil.Error):
            found[part] += process.memory_full_info().uss / 1e6
    return dict(found)


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, list[Any]]:
    return {
        part: [round(before[part], 1), round(after[part], 1), f"{after[part] / before[part] - 1:+.1%}"]
        for part in before
        if part in after
    }


def statuses(replies: Sequence[Reply]) -> dict[str, int]:
    return {str(status): number for status, number in sorted(Counter(reply.status for reply in replies).items())}


def quantiles(replies: Sequence[Reply]) -> list[float]:
    return [round(quantile(replies, share) * 1000, 1) for share in (0.5, 0.99)]


PARTS: dict[str, Callable[[Material, argparse.Namespace], dict[str, Any]]] = {
    "bad": bad_inputs,
    "swap": swap,
    "kill": kill,
    "overload": overload,
    "soak": soak,
}

if __name__ == "__main__":
    raise SystemExit(main())
