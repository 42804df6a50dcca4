"""The metrics of training and tuning: names, tags and meanings, and how they follow from an epoch record or a study.

Ray puts ``ray_`` before each name. Undefined values are NaN, which Ray does not export: such a series is absent, never
0. Tags have few values each: a run's or a study's name, a task, a split, an AU. A run's series exist only while it
trains, so their number depends on the runs that train at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from rafce_ray.base.figures import HEADLINES


class Metric(NamedTuple):
    """One metric: name without Ray's prefix, what it means, the names of its tags."""

    name: str
    description: str
    tags: tuple[str, ...]


class Sample(NamedTuple):
    """One value of a gauge, its tags in the metric's order."""

    metric: Metric
    tags: tuple[str, ...]
    value: float


def _of_run(name: str, description: str, *tags: str) -> Metric:
    return Metric(f"rafce_train_{name}", description, ("run", *tags))


def _of_study(name: str, description: str, *tags: str) -> Metric:
    return Metric(f"rafce_tune_{name}", description, ("study", *tags))


MAX_EPOCHS = _of_run("max_epochs", "Epochs that the run trains at most (optim.epochs).")
LOSS = _of_run("loss", "Mean loss of the epoch, nats; task total is the weighted sum.", "split", "task")
METRIC = _of_run(
    "metric", "A headline figure of the epoch, 0 to 1, in evaluation mode at threshold 0.5.", "split", "name"
)
AU_F1 = _of_run("au_f1", "F1 of an action unit on validation at threshold 0.5; absent without positives.", "au")
GAP = _of_run("gap", "Train minus validation of a figure, both in evaluation mode on natural images.", "name")
GRAD_NORM = _of_run(
    "grad_norm",
    "Norm of the gradient: of the whole loss before clipping, mean over steps; of each task's unweighted loss at the "
    "trunk.",
    "task",
)
LAST_STEP = _of_run(
    "last_step_timestamp_seconds", "When the last step ended, Unix time; when the worker started, before the first."
)
COMMAND = _of_run("command_running", "1 while the command that started the run waits for it.")
RESTARTS = _of_run("restarts_total", "Starts of the run after its first, by Ray or by the same command.")
INVALID_CHECKPOINTS = _of_run("invalid_checkpoints_total", "Checkpoints that were found missing, cut short or altered.")

TRIALS = _of_study("trials", "Trials by what became of them.", "role", "state")
STUDY_BEST = _of_study("best_score", "Best figure of any trial so far, as it is: a loss is not negated.", "metric")
LAST_REPORT = _of_study(
    "last_report_timestamp_seconds", "When a trial last ended an epoch, Unix time; when the sweep started, before that."
)
TRIAL_RESTARTS = _of_study("trial_restarts_total", "Trials that failed and were started again.")
TRIAL_SECONDS = _of_study("trial_seconds", "Time of training of the trials that ended.")

TRIAL_SECONDS_BOUNDARIES = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0, 86400.0)
"""Upper bounds of the histogram of TRIAL_SECONDS."""

SPLITS = ("train", "train_natural", "validation")
"""Groups of an epoch record: as trained on; the train split's natural images; validation."""

LOSSES = {"loss": "total", "emotion_loss": "emotion", "au_loss": "action_units", "votes_loss": "votes"}
"""Key in an epoch record -> value of the tag ``task``."""

GRADIENT_NORMS = {"train/grad_norm": "total", "gradient/emotion_norm": "emotion", "gradient/au_norm": "action_units"}
AU_F1_PREFIX = "validation/au_f1/"

ONE_OF_A_RUN = {
    "epoch": _of_run("epoch", "Epochs that are done."),
    "images_per_s": _of_run("images_per_s", "Images trained a second in the epoch, all workers together."),
    "data_wait": _of_run("data_wait_ratio", "Share of the epoch in which training waited for images, 0 to 1."),
    "gradient/cosine": _of_run("gradient_cosine", "Cosine between both tasks' gradients at the trunk, -1 to 1."),
    "lr": _of_run("learning_rate", "Learning rate of the epoch's last step."),
    "best_score": _of_run("best_score", "Best monitored figure so far; negated where less is better."),
    "best_epoch": _of_run("best_epoch", "Epoch of the best monitored figure."),
    "checkpoint/seconds": _of_run("checkpoint_seconds", "Time that writing the epoch's checkpoint took."),
    "checkpoint/bytes": _of_run("checkpoint_bytes", "Size of the epoch's checkpoint."),
}
"""Keys of an epoch record that are one gauge each."""

STATES = ("waiting", "running", "finished", "stopped_by_scheduler", "stopped_early", "diverged", "failed")
"""States of a trial."""


def epoch_samples(run: str, record: Mapping[str, float | None]) -> list[Sample]:
    """The gauges of an epoch record with flat keys; None is undefined, and a figure that is missing has no gauge."""
    gauges: list[tuple[Metric, str, tuple[str, ...]]] = [(metric, key, ()) for key, metric in ONE_OF_A_RUN.items()]
    for split in SPLITS:
        gauges += [(LOSS, f"{split}/{key}", (split, task)) for key, task in LOSSES.items()]
        gauges += [(METRIC, f"{split}/{name}", (split, name)) for name in HEADLINES]
    gauges += [(GAP, f"gap/{name}", (name,)) for name in HEADLINES]
    gauges += [(GRAD_NORM, key, (task,)) for key, task in GRADIENT_NORMS.items()]
    gauges += [(AU_F1, key, (key.removeprefix(AU_F1_PREFIX),)) for key in record if key.startswith(AU_F1_PREFIX)]
    return [Sample(metric, (run, *tags), _number(record[key])) for metric, key, tags in gauges if key in record]


def study_samples(
    study: str, states: Counter[tuple[str, str]], metric: str, best: float | None, last_report: float
) -> list[Sample]:
    """The gauges of a study.

    ``states``: trials by (role, state); ``best``: of ``metric``, None before any; ``last_report``: Unix time.
    """
    roles = sorted({"sweep", *(role for role, _ in states)})
    return [
        *(Sample(TRIALS, (study, role, state), float(states[role, state])) for role in roles for state in STATES),
        Sample(STUDY_BEST, (study, metric), _number(best)),
        Sample(LAST_REPORT, (study,), last_report),
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
