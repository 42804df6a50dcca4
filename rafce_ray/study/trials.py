"""The trials of a sweep, read from its folder: the plan, progress, end and score of each, and ASHA's decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from rafce_ray.base.console import pretty_json, to_json, warn
from rafce_ray.base.errors import DamagedFile, RafceError
from rafce_ray.base.figures import FIGURES, OF_AN_EPOCH
from rafce_ray.base.storage import Location
from rafce_ray.config import Config, config_hash, flatten
from rafce_ray.run.checkpoint import list_checkpoints
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.state import Job
from rafce_ray.study.folder import StudyFolder

TRIAL_FILE = "trial.json"
TRIALS_TABLE = "trials.jsonl"

Role = Literal["sweep", "finalist"]

ENDED = ("finished", "stopped_early", "stopped_by_scheduler", "diverged", "failed")
"""Statuses of a trial that will not go on by itself."""


def metric_of(study: StudyFolder) -> str:
    """The metric by which the study compares its trials; of an ablation the score."""
    return str((study.settings() or {}).get("metric", "score"))


@dataclass(frozen=True)
class TrialPlan:
    """What one trial is to train, written down before it starts (``trials/NAME/trial.json``).

    ``values``: what was sampled, by dotted key; conditional keys that do not apply are absent. ``of``: for a finalist,
    the sweep's trial whose configuration it trains again; in an ablation, the arm. ``cpus``, ``gpus``: its share of the
    cluster, all workers together.
    """

    name: str
    number: int
    role: Role
    values: dict[str, Any]
    config_hash: str
    cpus: float
    gpus: float
    of: str | None = None

    @property
    def is_base(self) -> bool:
        """Whether it trains the study's base configuration, the first trial of every sweep."""
        return self.role == "sweep" and self.number == 0 and self.of is None

    def write(self, study: StudyFolder, job: Job) -> None:
        """Write the plan and the job that carries it out into the trial's folder."""
        record = asdict(self) | {"job": job.to_plain()}
        (study.trials / self.name / TRIAL_FILE).write_bytes(pretty_json(record))


@dataclass(frozen=True)
class Training:
    """What a trial is to train.

    ``of``: of one seed of an arm or of a finalist, the arm or the sweep's trial whose configuration it trains.
    ``values``: what makes that configuration of the base.
    """

    name: str
    number: int
    of: str | None
    config: Config
    values: Mapping[str, Any]


def read_plan(folder: RunFolder) -> tuple[TrialPlan, Job] | None:
    """A trial's plan and job; None where there is none (a run of its own). DamagedFile where it cannot be read."""
    file = folder.location / TRIAL_FILE
    remedy = (
        f"With it, remove the trial's folder, {folder.location.shown}: the study's command then trains the trial again."
    )
    try:
        record = file.read_record(remedy, keys=("job",))
        job = Job.from_plain(record.pop("job"))
        return TrialPlan(**record), job
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise file.damaged(error, remedy) from None


def check_sampled(plan: TrialPlan, job: Job) -> None:
    """RafceError unless what the job trains with is what was sampled, value by value and by its hash."""
    values = flatten(job.config)
    wrong = {key: (value, values[key]) for key, value in plan.values.items() if values[key] != value}
    found = config_hash(job.config)
    if wrong or found != plan.config_hash:
        listed = "; ".join(f"{key} {sampled!r} sampled, {there!r} there" for key, (sampled, there) in wrong.items())
        raise RafceError(
            f"trial {plan.name} would not train what was sampled: its configuration's hash is {found}, expected "
            f"{plan.config_hash}{f' ({listed})' if listed else ''}. Its {TRIAL_FILE} was altered, or written by "
            "another version of rafce_ray; delete the trial's folder, and the same command creates it again."
        )


@dataclass(frozen=True)
class Trial:
    """One trial as it stands.

    ``config``: what it trains. ``score``: the study's metric at its best epoch so far, as it is (not negated); None
    before the first epoch. ``curve``: (epoch, metric) of every epoch, None where undefined. ``figures``: OF_AN_EPOCH
    of validation at the best epoch. ``seconds``: of training. ``reason``: why it was stopped, or failed.
    """

    plan: TrialPlan
    config: Config
    status: str
    reason: str | None
    best_epoch: int | None
    score: float | None
    figures: dict[str, float | None]
    curve: tuple[tuple[int, float | None], ...]
    seconds: float

    @property
    def name(self) -> str:
        """Folder name under ``trials/``."""
        return self.plan.name

    @property
    def seed(self) -> int:
        """The seed that it trains with."""
        return self.config.run.seed

    @property
    def epochs(self) -> int:
        """Epochs that it has trained."""
        return len(self.curve)

    @property
    def max_epochs(self) -> int:
        """Epochs after which it ends by itself."""
        return self.config.optim.epochs

    @property
    def has_ended(self) -> bool:
        """Whether it will not go on by itself."""
        return self.status in ENDED

    @cached_property
    def row(self) -> dict[str, Any]:
        """The trial as a row of ``trials.jsonl``: OF_AN_EPOCH at the best epoch, sampled values by dotted key."""
        return {
            "trial": self.name,
            "role": self.plan.role,
            "of": self.plan.of,
            "status": self.status,
            "reason": self.reason,
            "best_epoch": self.best_epoch,
            "epochs": self.epochs,
            "max_epochs": self.max_epochs,
            **self.figures,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "cpus": self.plan.cpus,
            "gpus": self.plan.gpus,
            "config_hash": self.plan.config_hash,
            **self.plan.values,
        }


def read_trial(folder: RunFolder, metric: str) -> Trial | None:
    """A trial as its folder tells it; None where the folder has no plan.

    ``metric``: the study's, a figure of validation.
    """
    found = read_plan(folder)
    if found is None:
        return None
    plan, job = found
    return trial_as_it_stands(folder, metric, plan, job.config)


def trial_as_it_stands(folder: RunFolder, metric: str, plan: TrialPlan, config: Config) -> Trial:
    """A trial of this plan that trains this configuration, with what its folder says of its progress."""
    records, result = folder.metrics(), folder.result() or {}
    best = best_record(records, metric)
    validation = {} if best is None else best["validation"]
    return Trial(
        plan=plan,
        config=config,
        status=str(result.get("status", "interrupted" if records else "waiting")),
        reason=result.get("reason"),
        best_epoch=None if best is None else int(best["epoch"]),
        score=None if best is None else float(validation[metric]),
        figures={name: validation.get(name) for name in OF_AN_EPOCH},
        curve=tuple((int(record["epoch"]), record["validation"].get(metric)) for record in records),
        seconds=float(records[-1]["elapsed_s"]) if records else 0.0,
    )


def read_trials(study: StudyFolder, metric: str, *, role: Role | None = None, all_of_them: bool = False) -> list[Trial]:
    """The trials of a role, by number and name; of both roles if it is None.

    A trial that neither ended nor runs is ``interrupted``.
    A trial whose files cannot be read is left out with a warning; ``all_of_them``: DamagedFile instead.
    """
    found = []
    for name in study.trial_names():
        try:
            trial = read_trial(study.trial(name), metric)
            if trial is not None and role in (None, trial.plan.role):
                found.append(trial)
        except DamagedFile as error:
            if all_of_them:
                raise
            warn(f"trial {name} is left out. {error}")
    return sorted(found, key=lambda one: (one.plan.role, one.plan.number, one.name))


def best_record(records: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The epoch record with the best defined metric, the earliest among equals; None where it is nowhere defined."""
    sign = FIGURES[metric].direction
    defined = [record for record in records if record["validation"].get(metric) is not None]
    return max(defined, key=lambda record: (sign * record["validation"][metric], -record["epoch"]), default=None)


def best_first(trials: Iterable[Trial], metric: str) -> list[Trial]:
    """Trials that have a score, the best first, the lowest number among equals."""
    scored = [(-FIGURES[metric].direction * one.score, one.plan.number, one) for one in trials if one.score is not None]
    return [one for *_, one in sorted(scored, key=lambda each: each[:2])]


def write_table(study: StudyFolder, trials: Sequence[Trial]) -> None:
    """Write ``trials.jsonl``, one line a trial."""
    text = "".join(to_json(one.row) + "\n" for one in trials)
    (study.location / TRIALS_TABLE).write_bytes(text.encode())


def conclude(folder: RunFolder, metric: str, status: str, reason: str) -> None:
    """End a trial from outside: its result says why, and of its checkpoints the best one stays.

    Its model is not calibrated and has no bundle: only a trial that comes to its own end is measured whole.
    """
    records = folder.metrics()
    best = best_record(records, metric)
    checkpoint = None if best is None else prune_to_best(folder.checkpoints, int(best["epoch"]))
    folder.write_result(
        {
            "status": status,
            "reason": reason,
            "run_dir": str(folder.location),
            "bundle": None,
            "checkpoint": checkpoint,
            "best_epoch": None if best is None else best["epoch"],
            "weights_sha256": None,
            "metrics": {} if best is None else best["validation"],
            "monitor": metric,
            "epochs": len(records),
            "elapsed_s": records[-1]["elapsed_s"] if records else 0.0,
        }
    )
    folder.add_event(status, message=reason, epochs=len(records))


def prune_to_best(checkpoints: Location, best_epoch: int) -> str | None:
    """Delete all checkpoints but the best epoch's; its name.

    None, and nothing deleted, where there is none of that epoch.
    """
    found, _ = list_checkpoints(checkpoints)
    kept = [one for one in found if one.epoch == best_epoch and one.step == 0]
    if not kept:
        # Its epoch was recorded but not saved, as on a full disk: a trial that is tried again goes on from the others.
        return None
    for one in found:
        if one not in kept:
            one.location.delete()
    return kept[0].name


def is_finite(value: float | None) -> bool:
    """Whether a figure is there and finite."""
    return value is not None and math.isfinite(value)


RUNGS_FILE = "rungs.jsonl"


@dataclass(frozen=True)
class RungEntry:
    """One decision on a trial at the rung of epoch ``milestone``.

    ``score``: the trial's, higher is better. ``cutoff``: of the scores that were there before it, None for the first.
    ``action``: ``continue`` or ``stop``.
    """

    trial: str
    bracket: int
    milestone: float
    epoch: int
    score: float
    cutoff: float | None
    action: str


def read_rungs(study: StudyFolder) -> list[RungEntry]:
    """All decisions so far; none where nothing was decided. DamagedFile where one cannot be read."""
    file, remedy = study.location / RUNGS_FILE, "The study's command then makes that decision again; all others stay."
    try:
        return [RungEntry(**record) for record in file.read_records(remedy)]
    except TypeError as error:
        raise file.damaged(error, "The study's command then makes all decisions again.") from None


def write_rungs(study: StudyFolder, entries: Sequence[RungEntry]) -> None:
    """Replace the file, whole or not at all."""
    (study.location / RUNGS_FILE).write_bytes("".join(to_json(asdict(one)) + "\n" for one in entries).encode())
