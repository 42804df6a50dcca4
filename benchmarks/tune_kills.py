"""kill -9 of a study's driver at random moments: trials run again, epochs repeated, and ASHA's rungs against the
undisturbed study's.

Both studies are the command itself, one trial at a time, so that reports come in one order. The disturbed one is killed
at random moments and given again until it ends. An epoch counts as repeated when Ray Tune was told of it twice. Run:
python benchmarks/tune_kills.py [--kills 5] [--seed 0] [--out benchmarks/results/tune_kills.json]
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rafce_drawing.labelled import synthesize
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import read_rungs, read_trials

NUM_FACES = 400
NUM_TRIALS = 8
METRIC = "emotion_loss"
SETTLE_S = 10.0
"""What a killed driver started lives on for some seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tune-kills-"))
    synthesize(folder / "faces", NUM_FACES)
    reference, took = run_undisturbed(folder)
    study, kills = run_disturbed(folder, arguments.kills, random.Random(arguments.seed), took)
    figures = compare(reference, study, kills)
    show(figures, kills)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures | {"kills": kills}, indent=1) + "\n")
    return 0 if figures["rungs_equal"] and not figures["trials_run_again"] else 1


def command(folder: Path, name: str) -> list[str]:
    study = {
        "name": name,
        "storage": str(folder / "runs"),
        "base": {
            "data": {"root": str(folder / "faces"), "store_dir": str(folder / "stores")},
            "model": {"backbone": "mobilenet_v3_small", "weights": "none", "image_px": 32},
            "optim": {"epochs": 6, "warmup_epochs": 0, "batch_size": 16, "gap_images": 32},
        },
        "space": {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "model.dropout": {"uniform": [0.1, 0.6]}},
        "num_trials": NUM_TRIALS,
        "metric": METRIC,
        "scheduler": {"type": "asha", "grace_period": 1, "reduction_factor": 2},
        "resources": {"concurrent": 1},
        "finalists": {"k": 0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return [sys.executable, "-m", "rafce_ray.tune", "--config", str(file)]


def run_undisturbed(folder: Path) -> tuple[StudyFolder, float]:
    start = time.monotonic()
    subprocess.run(command(folder, "undisturbed"), check=True)
    return StudyFolder(str(folder / "runs" / "undisturbed")), time.monotonic() - start


def run_disturbed(
    folder: Path, num_kills: int, moments: random.Random, took: float
) -> tuple[StudyFolder, list[dict[str, float]]]:
    """The study killed ``num_kills`` times, each time some random seconds after an epoch was reported since its
    start.
    """
    study = StudyFolder(str(folder / "runs" / "disturbed"))
    kills = []
    for _ in range(num_kills):
        before = epochs_done(study)
        driver = subprocess.Popen(command(folder, "disturbed"))
        while driver.poll() is None and epochs_done(study) == before:
            time.sleep(0.05)
        time.sleep(moments.uniform(0.0, took / num_kills / 3))
        if driver.poll() is not None:
            break
        results = ended(study)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        time.sleep(SETTLE_S)
        kills.append({"trials_ended": len(results), "epochs_done": epochs_done(study)})
    subprocess.run(command(folder, "disturbed"), check=True)
    return study, kills


def epochs_done(study: StudyFolder) -> int:
    return sum(len(study.trial(name).metrics()) for name in study.trial_names())


def ended(study: StudyFolder) -> set[str]:
    return {name for name in study.trial_names() if study.trial(name).result() is not None}


def compare(reference: StudyFolder, study: StudyFolder, kills: list[dict[str, float]]) -> dict:
    reports = Counter(
        (file.parent.name.split("/")[0], record["epoch"])
        for file in study.location.local.glob("ray/*/*/result.json")
        for record in map(json.loads, file.read_text().splitlines())
        if "epoch" in record
    )
    finishes = Counter(
        name
        for name in study.trial_names()
        for event in study.trial(name).events()
        if event["event"] in ("finished", "stopped_early", "stopped_by_scheduler", "diverged")
    )
    mine, theirs = read_trials(study, METRIC), read_trials(reference, METRIC)
    return {
        "num_kills": len(kills),
        "trials": len(mine),
        "trials_run_again": sum(count - 1 for count in finishes.values()),
        "epochs": sum(one.epochs for one in mine),
        "epochs_reported_twice": sum(count - 1 for count in reports.values()),
        "rung_entries": len(read_rungs(study)),
        "rungs_equal": read_rungs(study) == read_rungs(reference),
        "curves_equal": [one.curve for one in mine] == [one.curve for one in theirs],
    }


def show(figures: dict, kills: list[dict[str, float]]) -> None:
    console = Console()
    table = Table("kill", "trials ended", "epochs done")
    for number, kill in enumerate(kills, start=1):
        table.add_row(str(number), str(kill["trials_ended"]), str(kill["epochs_done"]))
    console.print(table)
    for key, value in figures.items():
        console.print(f"{key.replace('_', ' ')}: {value}")


if __name__ == "__main__":
    raise SystemExit(main())
