"""Which trials of a study are still to run: those that an earlier start left, then new ones as they are proposed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from rafce_ray.base.console import say, to_json, warn
from rafce_ray.config import CARRIED_OUT_BY, Config, ConfigError, config_hash, flatten, with_values
from rafce_ray.data.loader import Prepared, Readings
from rafce_ray.run.state import Job
from rafce_ray.study.config import StudyConfig
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.plan import Shares
from rafce_ray.study.space import Observed, propose
from rafce_ray.study.trials import (
    ENDED,
    Role,
    Training,
    Trial,
    TrialPlan,
    best_first,
    conclude,
    prune_to_best,
    read_plan,
    read_trial,
    read_trials,
    write_table,
)
from rafce_ray.study.watch import SweepWatch
from rafce_ray.train.launch import provenance_of
from rafce_ray.tune.scheduler import STOPPED, Concluding, Control, Course, Unscheduled
from rafce_ray.tune.trials import Settings, run_on_tune, stoppable


class Sweep:
    """Hands out a study's trials; the same study in the same folder goes on where it was left."""

    def __init__(
        self, study: StudyConfig, folder: StudyFolder, shares: Shares, readings: Readings, scheduler: Concluding
    ) -> None:
        self._study, self._folder, self._shares, self._readings = study, folder, shares, readings
        # A trial that is left out would be trained again, with other values if the search learns from it.
        found = read_trials(folder, study.metric, role="sweep", all_of_them=True)
        self._known = {trial.name: trial for trial in found}
        self._pruned: set[str] = set()
        self._scheduler = scheduler
        left = [trial.name for trial in self._known.values() if not self._has_ended(trial)]
        self._left = [renewed(folder, name, study, shares, readings) for name in left]
        self._left_out: set[int] = set()
        # The start before may have been killed before it did this.
        self._bound_disk()

    @property
    def num_left(self) -> int:
        """Trials that an earlier start left unfinished."""
        return len(self._left)

    @property
    def num_ended(self) -> int:
        """Trials that ended in earlier starts."""
        return len(self._known) - len(self._left)

    def has_more(self) -> bool:
        """Whether a trial is still to run."""
        plan = self.next()
        if plan is not None:
            self._left.insert(0, plan)
        return plan is not None

    def next(self) -> TrialPlan | None:
        """The next trial, its folder ready; None where the study has no more."""
        if self._left:
            return self._left.pop(0)
        has_score = {*ENDED} - {"failed"}
        history = [
            Observed(one.plan.number, one.plan.values, one.score if one.status in has_score else None)
            for one in self._known.values()
        ]
        while True:
            taken = {trial.plan.number for trial in self._known.values()} | self._left_out
            # The first free number: a trial whose folder was deleted is created again.
            number = next(number for number in count() if number not in taken)
            values = propose(self._study, number, history)
            if values is None:
                return None
            try:
                return self._start(number, self._study.config_of(values), values)
            except ConfigError as error:
                self._left_out.add(number)
                warn(f"trial {number} is left out, its values do not go together: {error}")

    def ended(self, name: str) -> None:
        """Read what became of a trial, keep the best trials' models alone, and write the table."""
        trial = read_trial(self._folder.trial(name), self._study.metric)
        if trial is not None:
            self._known[name] = trial
        self._bound_disk()
        self.write_table()

    def write_table(self) -> None:
        """Write ``trials.jsonl``: trials that run are read again."""
        for name, trial in self._known.items():
            if trial.status not in ENDED:
                self._known[name] = read_trial(self._folder.trial(name), self._study.metric) or trial
        write_table(self._folder, sorted(self._known.values(), key=lambda one: one.plan.number))

    def _has_ended(self, trial: Trial) -> bool:
        """Whether a trial of an earlier start has ended, or ends now by what the scheduler makes of its epochs."""
        folder = self._folder.trial(trial.name)
        records = folder.metrics()
        if trial.status in ENDED:
            self._scheduler.take_over(trial.name, records)
            return True
        reason = self._scheduler.catch_up(trial.name, records)
        if reason is None:
            return False
        conclude(folder, self._study.metric, STOPPED, reason)
        self._known[trial.name] = read_trial(folder, self._study.metric) or trial
        return True

    def _start(self, number: int, config: Config, values: dict[str, Any]) -> TrialPlan:
        name = f"trial_{number:04d}"
        self._scheduler.forget(name)
        training = Training(name, number, None, config, values)
        plan = start_trial(self._folder, training, self._shares, self._readings.of(config.data))
        trial = read_trial(self._folder.trial(name), self._study.metric)
        assert trial is not None
        self._known[name] = trial
        return plan

    def _bound_disk(self) -> None:
        """Keep best checkpoint and bundle of the base and of the best ``keep`` ended trials; others keep figures only.

        Of those that failed, the last ``keep`` keep their checkpoints for ``--retry-failed``; the others would begin
        again.
        """
        ended = [one for one in self._known.values() if one.status in ENDED]
        failed = sorted((one for one in ended if one.status == "failed"), key=lambda one: one.plan.number)
        waiting = {one.name for one in failed[-self._study.keep :]}
        ended = [one for one in ended if one.name not in waiting]
        ranked = best_first([one for one in ended if one.status not in ("failed", "diverged")], self._study.metric)
        kept = [one.name for place, one in enumerate(ranked) if place < self._study.keep or one.plan.is_base]
        for one in ended:
            folder = self._folder.trial(one.name)
            if one.name in kept and one.best_epoch is not None:
                prune_to_best(folder.checkpoints, one.best_epoch)
            elif one.name not in self._pruned:
                self._pruned.add(one.name)
                folder.checkpoints.delete()
                folder.bundle.delete()


def renewed(folder: StudyFolder, name: str, study: StudyConfig, shares: Shares, readings: Readings) -> TrialPlan:
    """A trial that an earlier start left, with the study's present workers, time limits and place of images."""
    found = read_plan(folder.trial(name))
    assert found is not None
    plan, job = found
    now = flatten(study.base_config)
    config = with_values(job.config, {key: now[key] for key in CARRIED_OUT_BY - {"run.name", "run.storage"}})
    # None of these keys is in the hash.
    plan = replace(plan, cpus=shares.workers * shares.cpus, gpus=shares.workers * shares.gpus)
    plan.write(folder, replace(job, config=config, store=readings.of(config.data).store_uri))
    return plan


def train_seeds(
    folder: StudyFolder, trainings: Sequence[Training], settings: Settings, readings: Readings, role: Role
) -> None:
    """Train configurations with several seeds each, every one to its end; the same call again runs only what is left.

    A training that fails does not stop the others. Those that have ended keep their bundles; their checkpoints are
    deleted.

    Raises:
        KeyboardInterrupt: after Ctrl-C; what was trained is kept.
    """
    plans = []
    for one in trainings:
        plan = start_trial(folder, one, settings.shares, readings.of(one.config.data), role)
        if folder.trial(one.name).result() is None:
            plans.append(plan)
    if plans:
        curves = f"curves: tensorboard --logdir {(folder.location / 'ray').shown}"
        say(f"{len(plans)} of {len(trainings)} trainings to do, {settings.shares.shown}; {curves}")
        metric, control = trainings[0].config.optim.monitor, Control()
        last_epoch = max(one.config.optim.epochs for one in trainings)
        scheduler = Unscheduled(Course(folder, metric, last_epoch, control))
        with SweepWatch(folder, metric, len(trainings), role=role), stoppable(control):
            run_on_tune(plans, scheduler, settings)
        if control.stop is not None:
            say(f"stopped: {folder.location.shown} keeps what was trained; the same command goes on")
            raise KeyboardInterrupt
    for one in trainings:
        if folder.trial(one.name).result() is not None:
            # The checkpoints of a hundred finished trainings would fill a disk.
            folder.trial(one.name).checkpoints.delete()


def start_trial(
    folder: StudyFolder, training: Training, shares: Shares, prepared: Prepared, role: Role = "sweep"
) -> TrialPlan:
    """Write the plan of a trial and the job that trains it; an existing trial of this name stays as it is."""
    name = training.name
    config = with_values(training.config, {"run.name": name, "run.storage": str(folder.trials)})
    trained, run_folder = flatten(config), folder.trial(name)
    values = {key: json.loads(to_json(trained[key])) for key in training.values}
    cpus, gpus = shares.workers * shares.cpus, shares.workers * shares.gpus
    plan = TrialPlan(name, training.number, role, values, config_hash(config), cpus, gpus, training.of)
    weights = folder.weights().get(config.model.backbone, "auto") if config.model.weights == "auto" else None
    provenance = provenance_of(config, prepared, weights or config.model.weights)
    job = Job(config, prepared.store_uri, prepared.taxonomy, run_folder.place, provenance, weights)
    if run_folder.result() is None:
        plan.write(folder, job)
    if not run_folder.exists():
        run_folder.start(config, job.provenance, prepared.audit.to_json())
    return plan
