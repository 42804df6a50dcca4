"""Prediction of large folders on Ray beside one process: images per second, and memory by the number of files.

Throughput, windows in turn, all at the niceness of Ray's workers, aligned JPEG faces of 112 px, a resnet18 of random
weights:
  limit      decode and batched forward in one process as `rafce predict` does it, nothing written
  1 worker   `rafce predict --ray` with one worker, which has all CPUs
  2 workers  the same with two, which share them
A window of the sides on Ray is a run of its own; its rate is that from the first finished shards on (`whole`: with the
start of the workers).

Memory: the command in processes of its own; the largest sum of what they hold (PSS: a page shared by three counts a
third for each), by part.

  python benchmarks/predict.py --throughput [--windows 5] [--images 4000] [--out benchmarks/results/predict.json]
  python benchmarks/predict.py --memory 2000 50000 [--out benchmarks/results/predict.json]
What `--out` holds already is kept: the parts may be measured one after the other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from serving import write_faces, write_model

from rafce_ray.bundle.bundle import load_bundle
from rafce_ray.bundle.model import Predictor, predict_files
from rafce_ray.config import load_config
from rafce_ray.faces import MIN_FACE_SCORE
from rafce_ray.faces.files import find_images, load_ahead, load_file
from rafce_ray.train.launch import ray_cluster
from rafce_ray.train.predict import predict_on_ray

NICENESS_OF_RAY_WORKERS = 15
BATCH = 64
SHARD_FILES = 100
MEMORY_SHARD_FILES = 500
LOOK_EVERY_S = 0.5
MAX_GROWTH = 1.10
PARTS = (("rafce_ray.predict", "driver"), ("ShardPredictor", "workers"), ("", "Ray"))
"""Marks in a command line, the first that fits, and what such a process is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--windows", type=int, default=5, help="windows of each side, after one to warm up")
    parser.add_argument("--images", type=int, default=4000, help="files of a window")
    parser.add_argument("--image-px", type=int, default=56, help="side of the network's input: what the model costs")
    parser.add_argument("--memory", type=int, nargs="+", metavar="FILES", default=[], help="numbers of files")
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.out and arguments.out.exists():
        figures = json.loads(arguments.out.read_text())
    with tempfile.TemporaryDirectory(prefix="predict-benchmark-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        bundle = write_model(folder / "bundle", image_px=arguments.image_px)
        write_faces(folder)
        if arguments.throughput:
            images = multiply(folder, arguments.images)
            figures["throughput"] = throughput(folder, bundle, images, arguments.windows) | {
                "images": arguments.images,
                "image_px": arguments.image_px,
                "cpus": os.cpu_count(),
            }
        for size in arguments.memory:
            figures.setdefault("memory", {})[str(size)] = memory(folder, bundle, multiply(folder, size))
    show(figures)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def multiply(folder: Path, size: int) -> Path:
    """A folder of ``size`` names that are hard links to the drawn faces."""
    place, drawn = folder / f"images-{size}", sorted((folder / "faces").iterdir())
    place.mkdir()
    for number in range(size):
        os.link(drawn[number % len(drawn)], place / f"{number:06d}.jpg")
    return place


def serve_limit(bundle: str, images: str, threads: int, pipe: Connection) -> None:
    """Images per second of one process, whenever asked."""
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS_OF_RAY_WORKERS)
    predictor = Predictor(load_bundle(bundle))
    torch.set_num_threads(max(1, threads - 1))
    px = predictor.bundle.preprocessing.stored_px
    while pipe.recv():
        began = time.perf_counter()
        loaded = load_ahead(lambda path: load_file(path, finder=None, px=px), find_images([images]), min(8, threads))
        num_images = sum(1 for _ in predict_files(predictor, loaded, batch_size=BATCH, top_k=14))
        pipe.send(num_images / (time.perf_counter() - began))


def throughput(folder: Path, bundle: Path, images: Path, windows: int) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe()
    threads = len(os.sched_getaffinity(0))
    limit = multiprocessing.get_context("spawn").Process(
        target=serve_limit, args=(str(bundle), str(images), threads, theirs), daemon=True
    )
    limit.start()
    rates: dict[str, list[float]] = defaultdict(list)
    with ray_cluster(load_config(), "benchmark"):
        for window in range(windows + 1):
            ours.send(True)
            found = {"limit": ours.recv()}
            for workers in (1, 2):
                out = folder / f"out-{workers}-{window}"
                rate, whole = measure_on_ray(bundle, images, out, workers)
                name = f"{workers} worker{'s' if workers > 1 else ''}"
                found |= {name: rate, f"{name}, whole": whole}
            if window:
                for side, value in found.items():
                    rates[side].append(value)
    ours.send(False)
    limit.join()
    ratios = {
        f"{side} / limit": statistics.median(
            one / other for one, other in zip(rates[side], rates["limit"], strict=True)
        )
        for side in ("1 worker", "2 workers")
    }
    return {
        "images_per_s": {side: [round(value, 1) for value in values] for side, values in rates.items()},
        "ratios": ratios,
    }


def measure_on_ray(bundle: Path, images: Path, out: Path, workers: int) -> tuple[float, float]:
    """Images per second once each worker has a shard behind it, by the times of the files written, and of the whole
    call.
    """
    began = time.time()
    predict_on_ray(
        [str(images)],
        bundle=str(bundle),
        out=str(out),
        faces="aligned",
        face_model=None,
        min_face_score=MIN_FACE_SCORE,
        top_k=3,
        batch_size=BATCH,
        shard_files=SHARD_FILES,
        workers=workers,
        use_gpu=False,
    )
    took = time.time() - began
    ends = sorted(path.stat().st_mtime for path in (out / "predictions").iterdir())
    following = len(ends) - workers
    return following * SHARD_FILES / (ends[-1] - ends[workers - 1]), len(ends) * SHARD_FILES / took


def memory(folder: Path, bundle: Path, images: Path) -> dict[str, Any]:
    """Peak memory of all processes of one command, in MiB, by part and in all; the peaks need not be at the same
    moment.
    """
    command = [sys.executable, "-m", "rafce_ray.predict", str(images), "--bundle", str(bundle), "--faces", "aligned"]
    command += [
        "--ray",
        "--out",
        str(folder / f"out-{images.name}"),
        "--shard-files",
        str(MEMORY_SHARD_FILES),
        "--workers",
        "2",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+") as told,
        subprocess.Popen(command, env=environment, stderr=told, start_new_session=True) as driver,
    ):
        peaks: dict[str, float] = defaultdict(float)
        while driver.poll() is None:
            held = pss_mib(psutil.Process(driver.pid))
            for part, mib in [*held.items(), ("all", sum(held.values()))]:
                peaks[part] = max(peaks[part], mib)
            time.sleep(LOOK_EVERY_S)
        if driver.returncode:
            told.seek(0)
            raise SystemExit(f"the command failed:\n{told.read()}")
    return {"peak_mib": {part: round(mib) for part, mib in peaks.items()}, "took_s": round(time.monotonic() - began, 1)}


def pss_mib(driver: psutil.Process) -> dict[str, float]:
    """What the driver and all processes below it hold now, by part."""
    held: dict[str, float] = defaultdict(float)
    with suppress(psutil.Error):
        for process in [driver, *driver.children(recursive=True)]:
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                part = next(part for mark, part in PARTS if mark in line)
                held[part] += process.memory_full_info().pss / 2**20
    return dict(held)


def show(figures: dict[str, Any]) -> None:
    console = Console()
    if "throughput" in figures:
        table = Table("side", "images/s (median)", "lowest", "highest", title="throughput")
        for side, values in figures["throughput"]["images_per_s"].items():
            table.add_row(side, *(f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))))
        console.print(table)
        for name, ratio in figures["throughput"]["ratios"].items():
            console.print(f"{name}: {ratio:.3f}")
    by_size = {int(size): one for size, one in figures.get("memory", {}).items()}
    if by_size:
        parts = list(dict.fromkeys(part for one in by_size.values() for part in one["peak_mib"]))
        table = Table("files", *(f"{part}, MiB" for part in parts), "seconds", title="peak memory (PSS)")
        for size, one in sorted(by_size.items()):
            table.add_row(f"{size:,}", *(str(one["peak_mib"].get(part, "")) for part in parts), str(one["took_s"]))
        console.print(table)
        small, large = (by_size[size]["peak_mib"]["all"] for size in (min(by_size), max(by_size)))
        console.print(f"peak memory, largest to smallest: {large / small:.3f} (goal: at most {MAX_GROWTH})")


if __name__ == "__main__":
    raise SystemExit(main())
