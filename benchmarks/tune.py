"""What a trial costs beyond its training: seconds from the end of one trial to the first step of the next, and memory.

Each side is a real study by the command itself, one trial at a time, several studies of each, interleaved; figures come
from the trials' own events. ``in process``: one worker, inside the Tune trial, processes reused. ``nested``: two
workers through Ray Train. ``freed``: seconds from the scheduler's stop until all CPUs of the cluster are free again.
Memory is what each of two trials that run at a time adds (USS: pages of its own; the decoded images are shared pages).
Run: python benchmarks/tune.py [--runs 3] [--trials 6] [--out benchmarks/results/tune.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from rafce_drawing.labelled import synthesize
from rafce_ray.config import config_hash, load_config
from rafce_ray.data.loader import prepare
from rafce_ray.run.state import Job
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import TrialPlan
from rafce_ray.train.launch import ray_cluster

NUM_FACES = 160
GOAL_S = 0.5
SIDES = {
    "in process": {"workers": 1, "concurrent": 1},
    "nested": {"workers": 2, "concurrent": 1},
    "two at a time": {"workers": 1, "concurrent": 2},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="studies of each side")
    parser.add_argument("--trials", type=int, default=6, help="trials of each study")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--stop", nargs=3, metavar=("FOLDER", "NAME", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stop:
        return stop_one(Path(arguments.stop[0]), arguments.stop[1], int(arguments.stop[2]))
    folder = Path(tempfile.mkdtemp(prefix="tune-benchmark-"))
    synthesize(folder / "faces", NUM_FACES)
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for number in range(arguments.runs):
        for side, resources in SIDES.items():
            found[side].append(measure(folder, f"{side.replace(' ', '-')}-{number}", resources, arguments.trials))
    figures = {side: summarise(runs) for side, runs in found.items()}
    for side in ("in process", "nested"):
        freed = [measure_stop(folder, number, SIDES[side]["workers"]) for number in range(arguments.runs)]
        figures[side]["freed_s"] = round(statistics.median(freed), 2)
        figures[side]["freed_worst_s"] = round(max(freed), 2)
    show(figures)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(folder: Path, name: str, resources: dict[str, int], num_trials: int) -> dict:
    """One study: seconds before the first trial and between trials, and the memory of its trials' processes."""
    study = {
        "name": name,
        "storage": str(folder / "runs"),
        "base": {
            "data": {"root": str(folder / "faces"), "store_dir": str(folder / "stores")},
            "model": {"backbone": "mobilenet_v3_small", "weights": "none", "image_px": 32},
            "optim": {"epochs": 2, "warmup_epochs": 0, "batch_size": 16, "gap_images": 16},
        },
        "space": {"optim.lr": {"loguniform": [1e-4, 1e-2]}},
        "num_trials": num_trials,
        "scheduler": {"type": "none"},
        "resources": resources,
        "finalists": {"k": 0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    driver = subprocess.Popen(
        [sys.executable, "-m", "rafce_ray.tune", "--config", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    found = StudyFolder(str(folder / "runs" / name))
    done, ready, memory = threading.Event(), [], {}
    watcher = threading.Thread(target=watch_memory, args=(found, done, memory))
    watcher.start()
    for line in driver.stderr or []:
        if line.startswith("disk:"):
            ready.append(time.time())
    driver.wait()
    done.set()
    watcher.join()
    if driver.returncode:
        raise SystemExit(f"the study {name} failed")
    spans = sorted(span(found, trial) for trial in found.trial_names())
    starts, ends = sorted(start for start, _ in spans), sorted(end for _, end in spans)
    at_once = resources["concurrent"]
    gaps = [start - ends[place] for place, start in enumerate(starts[at_once:])]
    return {
        "first_s": spans[0][0] - ready[0],
        "following_s": gaps,
        "uss_bytes": list(memory.values()),
        "processes": len(memory),
    }


def measure_stop(folder: Path, number: int, workers: int) -> float:
    """Seconds from the stop of a trial after its second epoch until the cluster's CPUs are free, in a process of its
    own.
    """
    name = f"stop-{workers}-{number}"
    command = [sys.executable, __file__, "--stop", str(folder), name, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def stop_one(folder: Path, name: str, workers: int) -> int:
    config = load_config(
        overrides=[
            f"data.root={folder / 'faces'}",
            f"data.store_dir={folder / 'stores'}",
            "model.backbone=mobilenet_v3_small",
            "model.weights=none",
            "model.image_px=32",
            "optim.epochs=200",
            f"run.num_workers={workers}",
            "run.cpus_per_worker=1",
            f"run.name={name}",
            f"run.storage={folder / 'stops' / name / 'trials'}",
        ]
    )
    study, prepared = StudyFolder(str(folder / "stops" / name)), prepare(config.data)
    job = Job(config, prepared.store_uri, prepared.taxonomy, study.trial(name).place, {})
    plan = TrialPlan(name, 0, "sweep", {}, config_hash(config), float(workers), 0.0)
    plan.write(study, job)
    study.trial(name).start(config, {}, {})
    with ray_cluster(config, "benchmark", nested=workers > 1) as (num_cpus, _):
        import ray

        from rafce_ray.study.plan import share_out
        from rafce_ray.tune.scheduler import Control, Course, Unscheduled
        from rafce_ray.tune.trials import Settings, cluster_nodes, run_on_tune

        class StopsAfterTwo(Unscheduled):
            stopped_at = 0.0

            def judge(self, name: str, epoch: int, score: float | None) -> str | None:
                if epoch < 2:
                    return None
                StopsAfterTwo.stopped_at = time.monotonic()
                return "two epochs are enough"

        shares = share_out(config.run, cluster_nodes(), concurrent=1, gpus_per_worker=None)
        scheduler, freed = StopsAfterTwo(Course(study, "macro_f1", 200, Control())), []

        def watch() -> None:
            while not StopsAfterTwo.stopped_at or ray.available_resources().get("CPU", 0) < num_cpus:
                time.sleep(0.05)
            freed.append(time.monotonic() - StopsAfterTwo.stopped_at)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        run_on_tune([plan], scheduler, Settings(shares, max_failures=0, limit=1))
        watcher.join(timeout=60)
    print(freed[0] if freed else "inf")
    return 0


def span(study: StudyFolder, trial: str) -> tuple[float, float]:
    """When a trial was about to take its first step, and when its end was written down."""
    times = {event["event"]: event["time"] for event in study.trial(trial).events()}
    return times["started"], max(times.values())


def watch_memory(study: StudyFolder, done: threading.Event, memory: dict[int, int]) -> None:
    """Keep the largest USS of every process that trains a trial."""
    while not done.wait(0.5):
        for name in study.trial_names():
            for event in study.trial(name).events():
                if event["event"] != "started":
                    continue
                try:
                    uss = psutil.Process(event["pid"]).memory_full_info().uss
                except psutil.Error:
                    continue
                memory[event["pid"]] = max(uss, memory.get(event["pid"], 0))


def summarise(runs: list[dict]) -> dict[str, float | int]:
    following = [gap for run in runs for gap in run["following_s"]]
    return {
        "first_s": round(statistics.median(run["first_s"] for run in runs), 2),
        "following_s": round(statistics.median(following), 2),
        "following_worst_s": round(max(following), 2),
        "uss_mb": round(statistics.median(uss for run in runs for uss in run["uss_bytes"]) / 1e6),
        "processes": statistics.median(run["processes"] for run in runs),
        "runs": len(runs),
    }


def show(figures: dict[str, dict[str, float | int]]) -> None:
    columns = ("first_s", "following_s", "following_worst_s", "freed_s", "freed_worst_s", "uss_mb", "processes")
    table = Table("", *columns)
    for side, one in figures.items():
        table.add_row(side, *(str(one.get(key, "")) for key in columns))
    console = Console()
    console.print(table)
    mine, nested = figures["in process"]["following_s"], figures["nested"]["following_s"]
    console.print(
        f"A following trial starts {mine:g} s after the one before it (goal: {GOAL_S} s); nested {nested:g} s, "
        f"{nested / mine:.1f} times that."
    )


if __name__ == "__main__":
    raise SystemExit(main())
