"""Trials on Ray Tune: many runs side by side, each in a run folder of its own, each taken up again where it was left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rafce_ray.config import Config
from rafce_ray.console import say, warn
from rafce_ray.errors import UsageError
from rafce_ray.session import Job
from rafce_ray.study_folder import StudyFolder
from rafce_ray.train import interruptible, ray_cluster
from rafce_ray.watch import StudyWatch

REUSED_PROCESSES = True
"""A fresh process costs about 6 s (imports, first model), a reused one 0.2 s."""


def run_trials(study: StudyFolder, jobs: Sequence[Job], *, concurrent: int | None = None) -> dict[str, str]:
    """Train every job that has no result yet, one process each; returns the reasons of those that failed, by name.

    Trials that were interrupted have no result and are no failures.

    Each job's run folder lies in ``study.trials`` under ``run.name`` and was started; ``run.cpus_per_worker`` is its number of
    threads. ``concurrent``: trials at a time; None: one per GPU, or as many as fit the CPUs. One trial that fails does not stop the others; the
    same call again runs only what is left.

    Raises:
        UsageError: a trial wants more than the cluster has.
        KeyboardInterrupt: after Ctrl-C; what was trained is kept.
    """
    waiting = {str(job.config.run.name): job for job in jobs if study.trial(str(job.config.run.name)).result() is None}
    if not waiting:
        return {}
    config = next(iter(waiting.values())).config
    with ray_cluster(config) as (num_cpus, num_gpus):
        resources, at_once = _shares(config, num_cpus, num_gpus, concurrent)
        say(
            f"{len(waiting)} trials to run, {min(at_once, len(waiting))} at a time with {resources['cpu']:g} CPU(s)"
            f"{' and a share of a GPU' if 'gpu' in resources else ''} each; curves: tensorboard --logdir {(study.location / 'ray').shown}"
        )
        with (
            StudyWatch(study, {name: job.config.optim.epochs for name, job in waiting.items()}),
            interruptible(f"finished trials in {study.trials} are kept, the others go on from their newest checkpoint"),
        ):
            failures = _fit(study, waiting, resources, at_once)
    for name, reason in failures.items():
        warn(f"trial {name} failed: {reason}")
    return failures


def _fit(study: StudyFolder, waiting: dict[str, Job], resources: dict[str, float], at_once: int) -> dict[str, str]:
    from ray import tune

    from rafce_ray.worker import trial_worker

    jobs = {name: job.to_plain() for name, job in waiting.items()}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial_worker, jobs=jobs), resources),
        param_space={"trial": tune.grid_search(list(jobs))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once,
            reuse_actors=REUSED_PROCESSES,
            trial_name_creator=lambda trial: str(trial.config["trial"]),
            trial_dirname_creator=lambda trial: str(trial.config["trial"]),
        ),
        run_config=tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(study.location / "ray"),
            failure_config=tune.FailureConfig(max_failures=next(iter(waiting.values())).config.run.max_failures),
            verbose=0,
        ),
    )
    results = tuner.fit()
    failures = {}
    for result in results:
        name = str((result.config or {}).get("trial"))
        metrics = result.metrics or {}
        if result.error is not None:
            failures[name] = f"{type(result.error).__name__}: {str(result.error).strip().splitlines()[-1]}"
        elif metrics.get("status") == "failed":
            failures[name] = str(metrics["error"])
    return failures


def _shares(config: Config, num_cpus: float, num_gpus: float, concurrent: int | None) -> tuple[dict[str, float], int]:
    """What a trial gets, and how many run at a time; UsageError with the arithmetic where one can never fit."""
    use_gpu = config.run.use_gpu if config.run.use_gpu is not None else num_gpus >= 1
    cpus = config.run.cpus_per_worker or 1
    if cpus > num_cpus or (use_gpu and num_gpus < 1):
        raise UsageError(
            f"a trial wants {cpus} CPU(s){' and a GPU' if use_gpu else ''}; the cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs. "
            "Lower run.cpus_per_worker, or set run.use_gpu=false."
        )
    fitting = math.floor(num_cpus / cpus)
    at_once = concurrent or (min(fitting, math.floor(num_gpus)) if use_gpu else fitting)
    if at_once > fitting:
        raise UsageError(
            f"{at_once} trials at a time x {cpus} CPU(s) = {at_once * cpus} CPUs; the cluster has {num_cpus:g}. Lower --concurrent or run.cpus_per_worker."
        )
    return {"cpu": float(cpus)} | ({"gpu": min(1.0, num_gpus / at_once)} if use_gpu else {}), at_once
