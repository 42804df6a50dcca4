"""What a trial costs beyond its training: seconds from the end of one trial to the first step of the next, and memory.

Each side is a real study by the command itself, one trial at a time, several studies of each, interleaved; figures come from the
trials' own events. ``in process``: one worker, inside the Tune trial, processes reused. ``nested``: two workers through Ray Train.
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

from rafce_ray.data.synthetic import synthesize
from rafce_ray.study_folder import StudyFolder

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
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tune-benchmark-"))
    synthesize(folder / "faces", NUM_FACES)
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for number in range(arguments.runs):
        for side, resources in SIDES.items():
            found[side].append(measure(folder, f"{side.replace(' ', '-')}-{number}", resources, arguments.trials))
    figures = {side: summarise(runs) for side, runs in found.items()}
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
            "model": {"backbone": "mobilenet_v3_small", "image_px": 32},
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
    table = Table("", "first trial, s", "following, s (median)", "worst, s", "MB a process", "processes")
    for side, one in figures.items():
        table.add_row(
            side,
            *(str(one[key]) for key in ("first_s", "following_s", "following_worst_s", "uss_mb", "processes")),
        )
    console = Console()
    console.print(table)
    mine, nested = figures["in process"]["following_s"], figures["nested"]["following_s"]
    console.print(
        f"A following trial starts {mine:g} s after the one before it (goal: {GOAL_S} s); nested {nested:g} s, {nested / mine:.1f} times that."
    )


if __name__ == "__main__":
    raise SystemExit(main())
