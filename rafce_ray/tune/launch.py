"""A study on Ray Tune, from its configuration to its best bundle. The same call continues an interrupted study."""

from __future__ import annotations

import importlib
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rafce_ray.base.claim import check_kind, claimed, repeated
from rafce_ray.base.console import pretty_json, progress_bar, say, to_json, warn
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.storage import locate
from rafce_ray.config import Config, DataConfig, build_config, identity_of, to_yaml, with_values
from rafce_ray.data.loader import Prepared, Readings, prepare
from rafce_ray.data.records import counted
from rafce_ray.report.study_page import write_study_report
from rafce_ray.run.weights import find_all_weights
from rafce_ray.study.config import StudyConfig, foreseen, study_yaml
from rafce_ray.study.finalists import Verdict, best_run, choose_finalists, final_name, judge, judge_sweep, sentences
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.on_test import measure_on_test
from rafce_ray.study.plan import Shares, share_out, tell_plan, tell_trials
from rafce_ray.study.space import planned_trials, propose
from rafce_ray.study.trials import Training, Trial, read_trials
from rafce_ray.study.watch import SweepWatch
from rafce_ray.train.environment import check_ray
from rafce_ray.train.launch import ray_cluster, tell_findings


def conclude_study(study: StudyConfig, folder: StudyFolder, finalists: Sequence[Trial]) -> dict[str, Any]:
    """Judge a study whose trials have ended; write its verdict, best configuration, bundle, test figures and report.

    It writes ``finalists.json``, ``best.yaml``, ``best/``, ``test.json`` and ``report.html``.

    Raises:
        RafceError: no trial gave a score.
    """
    trials = read_trials(folder, study.metric, role="sweep")
    failed = [one.name for one in trials if one.status in ("failed", "diverged")]
    if failed:
        warn(
            f"{len(failed)} of {len(trials)} trials failed or diverged: {', '.join(failed)} (rafce trials "
            f"{folder.location.command})"
        )
    if not any(one.score is not None for one in trials):
        raise RafceError(
            f"no trial of {folder.location} has a {study.metric}: nothing can be judged. Look at why: rafce trials "
            f"{folder.location.command}"
        )
    if finalists:
        base = next(one.name for one in trials if one.plan.is_base)
        verdict = judge(folder, study.metric, [one.name for one in finalists], base=base)
    else:
        verdict = judge_sweep(folder, study.metric, trials)
    (folder.location / "finalists.json").write_bytes(pretty_json(verdict.to_json()))
    write_best(study, folder, verdict)
    on_test = measure_on_test(folder, verdict, progress=progress_bar)
    report = write_study_report(folder, study.metric)
    for line in [*sentences(verdict), *([] if on_test is None else on_test.sentences())]:
        say(line)
    place, root = folder.location, shlex.quote(str(study.base_config.data.root))
    best, ray = (place / "best").command, (place / "ray").command
    curves = f"copy {ray} to a disk for TensorBoard" if place.local is None else f"tensorboard --logdir {ray}"
    say(
        f"made {place.command}: best/ (bundle), best.yaml, {report.name}, trials.jsonl; curves: {curves}\n"
        f"next: rafce train --config {(place / 'best.yaml').command}   or: rafce evaluate --bundle {best} "
        f"data.root={root}   or: rafce serve --bundle {best}   or: rafce predict --bundle {best} PHOTO...   or: rafce "
        f"trials {place.command}"
    )
    return {
        "study": str(place),
        "verdict": verdict.to_json(),
        "test": None if on_test is None else on_test.to_json(),
        "bundle": str(place / "best"),
        "report": str(report),
    }


def write_best(study: StudyConfig, folder: StudyFolder, verdict: Verdict) -> None:
    """``best.yaml``: the winner's configuration, ready to train with; ``best/``: the bundle of its best run.

    ``best/`` is there whole or not at all: the same command then makes it.
    """
    run, best = best_run(folder, verdict), folder.location / "best"
    plain = folder.trial(verdict.winner).config().model_dump(mode="json")
    # A trial's share of the machine is not the share of a run of its own.
    plain["run"] |= {"name": None, "storage": study.storage, "cpus_per_worker": None}
    head = (
        f"# The winner of study {study.name}: {verdict.winner}.\n#   rafce train --config "
        f"{(folder.location / 'best.yaml').command}\n"
    )
    (folder.location / "best.yaml").write_bytes((head + to_yaml(build_config(plain))).encode())
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / "bundle"
        run.bundle.download(copy)
        best.delete()
        best.upload(copy)


ELAPSED_FILE = "elapsed.json"
REMOVED_SCHEDULER_KEYS = {"perturbation_interval": 4, "quantile_fraction": 0.25, "resample_probability": 0.25}
"""Defaults of keys that no longer exist: ``study.json`` of earlier studies has them, and these studies must go on."""


def tune(study: StudyConfig, *, dry_run: bool = False, retry_failed: bool = False) -> dict[str, Any] | None:
    """Run what is missing of a study, judge it, and return its results; None after a dry run.

    Raises:
        UsageError: the folder cannot be written, is another program's or holds something else, or a trial can never run
            on this cluster or fit its disk.
        GateError: the data may not be trained on.
        KeyboardInterrupt: after Ctrl-C; the same call goes on.
        RafceError: no trial gave a score.
    """
    check_ray()
    folder, base = StudyFolder(str(locate(study.storage) / study.name)), study.base_config
    if dry_run:
        folder.location.check_reachable()
        check_kind(folder.location, "study", key="name")
    else:
        locate(study.storage).check_writable()
    # What is not installed is reported before the data are read.
    propose(study, 1)
    check_mlflow(study)
    weights = weights_of(study, folder)
    readings = Readings(partial(prepare, progress=progress_bar))
    prepared = readings.of(base.data)
    readings.prepare_all(ways_of_reading(study))
    tell_findings(prepared, base)
    plan, resources = claim_of(study, prepared), study.resources
    with nullcontext() if dry_run else claimed(folder.location, "study", key="name"):
        if dry_run:
            folder.check(plan)
        else:
            folder.claim(plan)
            folder.write_weights(weights)
            (folder.location / "study.yaml").write_bytes(study_yaml(study).encode())
        if retry_failed and not dry_run:
            reopen_failed(folder, study.metric)
        command, per_worker = f"rafce tune {study.name}", resources.gpus_per_worker
        with shares_of(base, command, concurrent=resources.concurrent, gpus_per_worker=per_worker) as shares:
            tell_plan(study, folder, shares, prepared)
            if dry_run:
                tell_trials(study)
                return None
            sweep(study, folder, shares, readings)
            finalists = train_finalists(study, folder, shares, readings)
        return conclude_study(study, folder, finalists)


@contextmanager
def shares_of(
    base: Config, command: str, *, concurrent: int | None, gpus_per_worker: float | None = None
) -> Iterator[Shares]:
    """Connect to a cluster while the block lasts; what each trial gets of it.

    UsageError where a trial can never run on it.
    """
    with ray_cluster(base, command, nested=base.run.most_workers > 1):
        # Ray reads its environment when it is imported: ray_cluster has set it by now.
        from rafce_ray.tune.trials import cluster_nodes

        yield share_out(base.run, cluster_nodes(), concurrent=concurrent, gpus_per_worker=gpus_per_worker)


def ways_of_reading(study: StudyConfig) -> dict[str, DataConfig]:
    """Every way in which trials will read the data, named by the values that make the difference."""
    searched = [key for key in study.space if key.startswith("data.")]
    keys = [key for key in searched if key.removeprefix("data.") not in DataConfig.NOT_READING]
    combinations = product(*(study.space[key].values() for key in keys)) if keys else ()
    found = [dict(zip(keys, values, strict=True)) for values in combinations]
    return {to_json(values): study.config_of(values).data for values in found}


def claim_of(study: StudyConfig, prepared: Prepared) -> dict[str, Any]:
    """What makes the study the one that it is: with anything of it changed, its trials would not belong together."""
    plain, base = study.model_dump(mode="json"), identity_of(study.base_config)
    kept = {key: plain[key] for key in ("search", "seed", "metric", "scheduler")}
    kept["scheduler"] |= REMOVED_SCHEDULER_KEYS
    # With the order of its keys: trial n of a grid follows from it.
    kept["space"] = [[key, domain] for key, domain in plain["space"].items()]
    return {"kind": "tune", "base": base, **kept, "data_fingerprint": prepared.fingerprint, "may_grow": {}}


def reopen_failed(folder: StudyFolder, metric: str) -> None:
    """Let failed trials run again, each from its best checkpoint if it has one."""
    failed = [one.name for one in read_trials(folder, metric) if one.status in ("failed", "diverged")]
    for name in failed:
        folder.trial(name).reopen()
    say(f"trying again: {', '.join(failed)}" if failed else "--retry-failed: no trial has failed or diverged")


def sweep(study: StudyConfig, folder: StudyFolder, shares: Shares, readings: Readings) -> None:
    """Run the trials that are still to run; KeyboardInterrupt after Ctrl-C."""
    from rafce_ray.tune.scheduler import Control, Course, build_scheduler
    from rafce_ray.tune.sweep import Sweep
    from rafce_ray.tune.trials import run_on_tune, stoppable

    control = Control()
    scheduler = build_scheduler(study, Course(folder, study.metric, study.base_config.optim.epochs, control))
    supply = Sweep(study, folder, shares, readings, scheduler)
    total, spent = planned_trials(study), read_elapsed(folder)
    ended, left = supply.num_ended, supply.num_left
    if not supply.has_more():
        say(f"all {ended} trials have ended in an earlier start")
        supply.write_table()
        return
    if ended or left:
        say(f"going on: {ended} trials have ended, {left} go on from their newest checkpoint")
    if study.time_budget_s is not None and spent >= study.time_budget_s:
        say(
            f"the time budget of {study.time_budget_s:.0f} s is spent: no further trial of the sweep is started. Raise "
            "time_budget_s to go on with it."
        )
        return
    settings = settings_of(study, shares, shares.at_once if study.search == "optuna" else study.resources.concurrent)
    watch = SweepWatch(folder, study.metric, total, elapsed_before_s=spent, budget_s=study.time_budget_s)
    with elapsed(folder, spent, study.time_budget_s, control), watch, stoppable(control):
        try:
            run_on_tune(iter(supply.next, None), scheduler, settings, supply.ended)
        except OSError as error:
            raise RafceError(
                f"{folder.location} could not be read or written: {error}. The same command goes on."
            ) from error
    supply.write_table()
    if control.stop == "interrupted":
        say(f"stopped: {folder.location.shown} keeps every trial; the same command goes on from the saved epochs")
        raise KeyboardInterrupt
    if control.stop is not None:
        say(f"the time budget of {study.time_budget_s:.0f} s is spent; with a higher one the same command goes on")


def read_elapsed(folder: StudyFolder) -> float:
    """Seconds that earlier starts spent on the sweep."""
    remedy = "The study's time budget then counts from now."
    try:
        return float((folder.location / ELAPSED_FILE).read_record(remedy, keys=("sweep_s",))["sweep_s"])
    except FileNotFoundError:
        return 0.0


@contextmanager
def elapsed(folder: StudyFolder, spent: float, budget_s: float | None, control: Any) -> Iterator[None]:
    """Keep account of the sweep's time over its starts, and end it when its budget is spent."""
    start = time.monotonic()

    def total() -> float:
        return spent + time.monotonic() - start

    def write() -> None:
        (folder.location / ELAPSED_FILE).write_bytes(to_json({"sweep_s": round(total(), 1)}).encode())

    def keep_account() -> None:
        if budget_s is not None and total() >= budget_s and control.stop is None:
            control.stop = "time budget"
        write()

    try:
        with repeated(keep_account, 5.0 if budget_s is None else min(5.0, max(0.1, budget_s / 100))):
            yield
    finally:
        write()


def train_finalists(study: StudyConfig, folder: StudyFolder, shares: Shares, readings: Readings) -> list[Trial]:
    """Train the best trials and the base again with other seeds; return the chosen trials, the best first."""
    from rafce_ray.tune.sweep import train_seeds

    trials = read_trials(folder, study.metric, role="sweep")
    if study.finalists.k == 0 or not any(one.score is not None for one in trials):
        return []
    chosen = choose_finalists(trials, study.finalists.k, study.metric)
    say(
        f"finalists: {', '.join(one.name for one in chosen)} (the base among them), each trained to its end with "
        f"{counted(study.finalists.seeds, 'other seed')}"
    )
    trainings = []
    for trial in chosen:
        for seed in range(trial.seed + 1, trial.seed + 1 + study.finalists.seeds):
            plan, seeded = trial.plan, with_values(trial.config, {"run.seed": seed})
            trainings.append(Training(final_name(trial, seed), plan.number, trial.name, seeded, plan.values))
    settings = settings_of(study, shares, study.resources.concurrent)
    train_seeds(folder, trainings, settings, readings, "finalist")
    return chosen


def check_mlflow(study: StudyConfig) -> None:
    """UsageError where the study asks for MLflow, and it is not installed or its tracking server does not answer."""
    if study.mlflow is None:
        return
    try:
        mlflow = importlib.import_module("mlflow")
    except ImportError:
        raise UsageError(
            "mlflow is set, but MLflow is not installed. Install it with: pip install 'rafce_ray[mlflow]'."
        ) from None
    try:
        mlflow.MlflowClient(study.mlflow).search_experiments(max_results=1)
    except Exception as error:
        # Every kind of store has errors of its own kind.
        raise UsageError(
            f"mlflow={study.mlflow}: MLflow cannot be used there: {str(error).rstrip('.')}. Give the address of a "
            "tracking server, such as http://host:5000."
        ) from error


def weights_of(study: StudyConfig, folder: StudyFolder) -> dict[str, str]:
    """What ``model.weights=auto`` means in the study's trials, by backbone, as its first start found it.

    Raises:
        UsageError: the weights of a trial cannot be had, with what helps.
    """
    models = [study.base_config.model]
    if study.space.keys() & {"model.weights", "model.backbone"}:
        models += [study.config_of(values).model for values in foreseen(study)]
    return find_all_weights(models, folder.weights())


def settings_of(study: StudyConfig, shares: Shares, limit: int | None) -> Any:
    """The study's :class:`rafce_ray.tune.trials.Settings`, with Ray's MLflow logger where the study asks for one."""
    from rafce_ray.tune.trials import Settings

    callbacks: tuple[Any, ...] = ()
    if study.mlflow is not None:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks = (MLflowLoggerCallback(tracking_uri=study.mlflow, experiment_name=study.name),)
    return Settings(shares, study.base_config.run.max_failures, limit, study.start_timeout_s, callbacks)
