"""ASHA against the full grid of the same 24 configurations: share of the epochs spent, and the score of the winner.

Both sides are real studies run by the same command, one with ``scheduler.type=none`` and one with ``asha``; the same
seed makes a configuration's epochs the same on both. Run: python benchmarks/asha.py --faces FOLDER [--out
benchmarks/results/asha.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.trials import Trial, best_first, read_trials

METRIC = "score"
STUDY = {
    "base": {
        "model": {"backbone": "mobilenet_v3_small", "weights": "none", "image_px": 64, "dropout": 0.3},
        "optim": {"epochs": 20, "patience": 20, "lr": 1e-3, "weight_decay": 1e-4, "gap_images": 128},
    },
    "space": {
        "model.dropout": {"grid": [0.3, 0.5]},
        "optim.weight_decay": {"grid": [1e-4, 5e-3]},
        "loss.label_smoothing": {"grid": [0.0, 0.1]},
        "optim.lr": {"grid": [3e-4, 1e-3, 3e-3]},
    },
    "search": "grid",
    "metric": METRIC,
    "finalists": {"k": 0},
}
SCHEDULERS = {
    "full grid": {"type": "none"},
    "ASHA": {"type": "asha", "grace_period": 2, "reduction_factor": 4},
}
NAMES = {"full grid": "grid", "ASHA": "asha"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=Path, required=True, help="folder of labelled faces")
    parser.add_argument(
        "--folder", type=Path, help="where the studies go; what is there goes on (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="asha-"))
    folder.mkdir(parents=True, exist_ok=True)
    sides = {side: run(side, folder, arguments.faces) for side in SCHEDULERS}
    figures = compare(sides)
    show(figures)
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def run(side: str, folder: Path, faces: Path) -> list[Trial]:
    """One study, or what is left of it."""
    name = NAMES[side]
    study = {"name": name, "storage": str(folder / "runs"), **STUDY, "scheduler": SCHEDULERS[side]}
    study["base"] = {**STUDY["base"], "data": {"root": str(faces), "store_dir": str(folder / "stores")}}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    subprocess.run([sys.executable, "-m", "rafce_ray.tune", "--config", str(file)], check=True)
    return read_trials(StudyFolder(str(folder / "runs" / name)), METRIC)


def compare(sides: dict[str, list[Trial]]) -> dict[str, dict[str, float | int | str]]:
    figures = {}
    for side, trials in sides.items():
        best = best_first(trials, METRIC)[0]
        figures[side] = {
            "trials": len(trials),
            "epochs": sum(one.epochs for one in trials),
            "seconds": round(sum(one.seconds for one in trials), 1),
            "winner": json.dumps(best.plan.values),
            "score": round(float(best.score or 0.0), 4),
        }
    grid, asha = figures["full grid"], figures["ASHA"]
    figures["ratio"] = {
        "epochs": round(asha["epochs"] / grid["epochs"], 3),
        "seconds": round(asha["seconds"] / grid["seconds"], 3),
        "score_difference": round(asha["score"] - grid["score"], 4),
    }
    return figures


def show(figures: dict[str, dict[str, float | int | str]]) -> None:
    table = Table("", "trials", "epochs", "seconds", "winner's score", "winner")
    for side in SCHEDULERS:
        one = figures[side]
        table.add_row(side, *(str(one[key]) for key in ("trials", "epochs", "seconds", "score", "winner")))
    console = Console()
    console.print(table)
    ratio = figures["ratio"]
    console.print(
        f"ASHA spent {ratio['epochs']:.1%} of the epochs ({ratio['seconds']:.1%} of the seconds); "
        f"its winner scores {ratio['score_difference']:+.4f} against the grid's best. Goals: at most 30 %, within 0.01."
    )


if __name__ == "__main__":
    raise SystemExit(main())
