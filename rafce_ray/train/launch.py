"""One run on Ray Train, from a folder of labelled faces to a bundle; and the Ray cluster of every command."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rafce_ray.base.claim import check_unclaimed, claimed
from rafce_ray.base.console import progress_bar, say, warn
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.hardware import describe_software
from rafce_ray.base.storage import locate
from rafce_ray.config import LONGEST_NAME, Config, build_config, config_hash, differences
from rafce_ray.data.audit import audit_command
from rafce_ray.data.loader import Prepared, prepare
from rafce_ray.data.records import counted
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.replay import Plan
from rafce_ray.run.state import Job
from rafce_ray.run.watch import RunWatch
from rafce_ray.run.weights import find_weights
from rafce_ray.train.environment import check_ray, dashboard_line, not_started, ray_address

if TYPE_CHECKING:
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.callback import RayTrainCallback

HEALTH_CHECK_INTERVAL_S = 0.2
"""Each ``train.report`` waits for one poll of Ray's controller: 2 s by default, measured."""

ELASTIC_START_TIMEOUT_S = 10
"""Seconds that a group of workers waits for room which the cluster was thought to have; 60 by default."""


def launch(config: Config, *, resume: bool = False) -> dict[str, Any]:
    """Train on Ray and return the run's result; the same call again continues an interrupted run.

    Raises:
        GateError: the data may not be trained on.
        UsageError: the storage cannot be written, another program works on the run, or its name is taken by a finished
            run, by one with another configuration, or by something else.
        RafceError: training failed; its checkpoints stay and the same call goes on from them.
    """
    check_ray()
    locate(config.run.storage).check_writable()
    config = named(config)
    folder = RunFolder(str(locate(config.run.storage) / str(config.run.name)))
    if folder.study is not None:
        check_unclaimed(folder.location.parent.parent)
    with claimed(folder.location, "run", key="run.name"):
        return _launch(folder, config, resume=resume)


def _launch(folder: RunFolder, config: Config, *, resume: bool) -> dict[str, Any]:
    # Without weights nothing is trained, and no data need be read.
    weights = _starting_weights(folder, config)
    prepared = prepare(config.data, progress=progress_bar)
    tell_findings(prepared, config)
    _claim(folder, config, prepared, resume=resume)
    provenance = provenance_of(config, prepared, weights)
    job = Job(config, prepared.store_uri, prepared.taxonomy, folder.place, provenance, weights)
    if not folder.exists() or resume:
        folder.start(config, job.provenance, prepared.audit.to_json())
    with ray_cluster(config, f"rafce train {config.run.name}") as num_cpus_and_gpus:
        outcome = _fit(job, *num_cpus_and_gpus)
    if outcome is None:
        raise RafceError(
            f"training ended without a result; look at {folder.location / 'events.jsonl'}, then give the same command "
            "again."
        )
    if "error" in outcome:
        raise error_of(outcome)
    # Plots take a second to import, which a study or an ablation need not wait for.
    from rafce_ray.report.page import write_report

    try:
        write_report(folder, store=prepared.store_uri)
    except RafceError as error:
        warn(f"the report could not be written: {error} Write it with: rafce report {folder.location.command}")
    return outcome


def _starting_weights(folder: RunFolder, config: Config) -> str:
    """What the run starts from; where it has begun from what auto meant then, that again."""
    weights = config.model.weights
    if weights == "auto" and folder.exists() and folder.has_trained():
        started = folder.provenance().get("weights", {})
        weights = started["source"] if started.get("asked") == "auto" else weights
    return find_weights(config.model.model_copy(update={"weights": weights}))


def build_trainer(
    job: Job, num_cpus: float, num_gpus: float, *, max_failures: int, callbacks: Sequence[RayTrainCallback] = ()
) -> TorchTrainer:
    """Ray Train's trainer of a job on a cluster of so many CPUs and GPUs; ``max_failures``: restarts of its workers."""
    # Ray reads its environment when it is imported: ray_cluster has set it by now.
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from rafce_ray.train.worker import train_worker

    run, folder = job.config.run, RunFolder(job.run_dir)
    storage = folder.location / "ray"
    return TorchTrainer(
        train_worker,
        train_loop_config=job.to_plain(),
        torch_config=TorchConfig(timeout_s=math.ceil(run.collective_timeout_s)),
        scaling_config=_scaling(job.config, num_cpus, num_gpus),
        run_config=RunConfig(
            # As the dashboard shows it, which has the trials of all studies in one list.
            name=folder.label.replace("/", "-"),
            storage_path=storage.path,
            storage_filesystem=None if storage.local is not None else storage.filesystem,
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=list(callbacks),
        ),
    )


def _fit(job: Job, num_cpus: float, num_gpus: float) -> dict[str, Any] | None:
    from ray.train import TrainingFailedError

    from rafce_ray.train.worker import ChangesCallback, command_shown, root_cause

    run, folder = job.config.run, RunFolder(job.run_dir)
    trainer = build_trainer(job, num_cpus, num_gpus, max_failures=run.max_failures, callbacks=[ChangesCallback(job)])
    with (
        command_shown(folder),
        RunWatch(folder, job.config),
        interruptible(f"the same command goes on from the newest checkpoint in {folder.checkpoints}"),
    ):
        try:
            outcome: dict[str, Any] | None = trainer.fit().return_value
        except TrainingFailedError as error:
            raise RafceError(
                f"training failed {counted(run.max_failures + 1, 'time')}, the last time with: {root_cause(error)}\n"
                f"Its checkpoints are in {folder.checkpoints}; the same command goes on from the newest valid one."
            ) from error
    return outcome


@contextmanager
def interruptible(what_then: str) -> Iterator[None]:
    """Let Ctrl-C say ``what_then`` and end the block as KeyboardInterrupt. Ray's handler exits silently with 0."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        say(f"interrupted: {what_then}")
        raise KeyboardInterrupt from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def ray_cluster(config: Config, name: str, *, nested: bool = False) -> Iterator[tuple[float, float]]:
    """A Ray cluster for one command: the one of RAY_ADDRESS or this process, else a local one that ends with the block.

    ``name``: of the command, as the Jobs page of Ray's dashboard shows it. ``nested``: trainers will run inside trials.
    Ray's cleaner of their placement groups asks the cluster's state and must find this very cluster where several run
    on a machine. Yields the cluster's CPUs and GPUs.

    Raises:
        UsageError: RAY_ADDRESS or RAY_TMPDIR cannot be used, with the reason.
        RafceError: Ray could not be started or joined.
    """
    for variable, value in {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(HEALTH_CHECK_INTERVAL_S),
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(math.ceil(config.run.hang_timeout_s)),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Tune's own tables go to standard output, which is for results.
        "RAY_AIR_NEW_OUTPUT": "0",
        # Ctrl-C is ours to handle: Tune would kill trials in mid-epoch.
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        # A trial's last word says how it ended and has no figures.
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
        # A range of workers is started where there is room by all that is known; where that is out of date, they are
        # soon counted again.
        **({"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(ELASTIC_START_TIMEOUT_S)} if config.run.is_elastic else {}),
    }.items():
        os.environ.setdefault(variable, value)
    import ray

    own = not ray.is_initialized()
    if own:
        check_ray()
        address = ray_address()
        say("starting Ray" if address is None else f"connecting to Ray at {address}")
        at_sigterm = signal.getsignal(signal.SIGTERM)
        with _address_known(nested and address is None) as runtime_env:
            try:
                context = ray.init(
                    address=address or "local",
                    runtime_env=runtime_env,
                    job_config=ray.job_config.JobConfig(metadata={"job_name": name}),
                    log_to_driver=False,
                    logging_level="ERROR",
                )
            except Exception as error:
                # Ray raises a bare Exception where its processes do not start in time.
                raise not_started(error) from error
        if callable(at_sigterm) and threading.current_thread() is threading.main_thread():
            # Ray has set its own, which ends the process without a word.
            signal.signal(signal.SIGTERM, at_sigterm)
        if context.dashboard_url:
            say(dashboard_line(context.dashboard_url, "jobs", os.environ, started_here=address is None))
    try:
        resources = ray.cluster_resources()
        yield float(resources.get("CPU", 0)), float(resources.get("GPU", 0))
    finally:
        if own:
            ray.shutdown()


@contextmanager
def _address_known(wanted: bool) -> Iterator[dict[str, Any] | None]:
    """A runtime environment that gives every process the address of the coming local cluster; None unless wanted."""
    if not wanted:
        yield None
        return
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    try:
        yield {"env_vars": {"RAY_ADDRESS": f"{ray.util.get_node_ip_address()}:{port}"}}
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


def _scaling(config: Config, num_cpus: float, num_gpus: float) -> ray.train.ScalingConfig:
    """Workers and their share of the cluster; UsageError with the arithmetic where it can never fit."""
    from ray.train import ScalingConfig

    run = config.run
    least = run.least_workers
    use_gpu = run.use_gpu if run.use_gpu is not None else num_gpus >= least
    cpus = run.cpus_per_worker or max(1, math.floor(num_cpus / run.most_workers))
    wanted, wanted_gpus = cpus * least, least if use_gpu else 0
    if wanted > num_cpus or wanted_gpus > num_gpus:
        raise UsageError(
            f"{counted(least, 'worker')} x {counted(cpus, 'CPU')}{' x 1 GPU' if use_gpu else ''} = {wanted} CPUs and "
            f"{wanted_gpus} GPUs; the cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs. Lower run.num_workers or "
            "run.cpus_per_worker, or set run.use_gpu=false."
        )
    return ScalingConfig(
        num_workers=run.num_workers,
        elastic_resize_monitor_interval_s=run.resize_interval_s,
        use_gpu=use_gpu,
        resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
    )


def named(config: Config, prefix: str = "") -> Config:
    """The configuration with its run named. The same command gives the same name and so finds its own run again."""
    if config.run.name is not None:
        return config
    data = re.sub(r"[^A-Za-z0-9]+", "-", locate(str(config.data.root)).name).strip("-") or "data"
    values = config.model_dump()
    rest = f"-{config.model.backbone}-{config_hash(config)}"
    values["run"]["name"] = f"{prefix}{data}"[: LONGEST_NAME - len(rest)] + rest
    return build_config(values)


def _claim(folder: RunFolder, config: Config, prepared: Prepared, *, resume: bool) -> None:
    """Make sure that the run folder is free, or holds this very run, interrupted."""
    if not folder.exists():
        if resume:
            raise UsageError(
                f"--resume: there is no run in {folder.location}. Leave --resume out to start one, or set run.name."
            )
        return
    if not folder.has_trained():
        # It failed before its first step, for example without its weights. A changed configuration may fix that.
        folder.forget()
        return
    result = folder.result()
    if result is not None and not resume:
        raise UsageError(
            f"{folder.location} holds a run that has ended ({result['status']}, best epoch {result['best_epoch']}). "
            "Choose another run.name, or go on with --resume and a higher optim.epochs."
        )
    changed = differences(folder.config(), config)
    if resume:
        changed = {key: values for key, values in changed.items() if key not in ("optim.epochs", "optim.patience")}
    if changed:
        lines = "\n".join(f"  {key}: {before!r} there, {now!r} here" for key, (before, now) in sorted(changed.items()))
        raise UsageError(
            f"{folder.location} holds a run with another configuration:\n{lines}\nChoose another run.name, or give the "
            "same values."
        )
    trained = max((int(record["epoch"]) for record in folder.metrics()), default=0)
    if config.optim.epochs < trained:
        raise UsageError(
            f"{folder.location} has trained {trained} epoch{'s' if trained > 1 else ''}, more than "
            f"optim.epochs={config.optim.epochs}: nothing was changed. To go on, give "
            f"optim.epochs={trained + 1} or more."
        )
    provenance = folder.provenance()
    if provenance["data_fingerprint"] != prepared.fingerprint:
        raise UsageError(
            f"the data of {folder.location} have changed since it started (fingerprint "
            f"{provenance['data_fingerprint'][:12]} there, {prepared.fingerprint[:12]} now). Choose another run.name "
            "to train on the new data, or restore the old ones."
        )
    if result is not None:
        folder.reopen()


def tell_findings(prepared: Prepared, config: Config) -> None:
    """Say what the audit of the labels found that a person should know before hours of training."""
    notable = [finding for finding in prepared.audit.findings if finding.level != "info"]
    for finding in notable:
        warn(f"{finding.message.rstrip('.')}. {finding.remedy}".strip())
    if notable:
        say(f"for the evidence, and the images looked at: {audit_command(config.data)}")


def provenance_of(config: Config, prepared: Prepared, weights: str) -> dict[str, Any]:
    """Where a run comes from: configuration, data, seed, starting weights as they were found, versions and commit."""
    return {
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "data_fingerprint": prepared.fingerprint,
        "seed": config.run.seed,
        "weights": {"asked": config.model.weights, "source": weights},
        "software": describe_software(),
    }


def error_of(outcome: Mapping[str, Any]) -> RafceError:
    """The error that a worker returned as ``error`` and ``exit_code`` instead of raising it."""
    error = RafceError(str(outcome["error"]))
    error.exit_code = int(outcome["exit_code"])
    return error


def train_again(plan: Plan) -> RunFolder:
    """Train the replay on as many threads as the original had, or as there are; returns its folder."""
    with ray_cluster(plan.config, f"rafce replay {plan.config.run.name}") as (num_cpus, num_gpus):
        values = plan.config.model_dump()
        run = values["run"]
        most = max(1, math.floor(num_cpus / run["num_workers"]))
        if (run["cpus_per_worker"] or 1) > most:
            warn(
                f"the original had {run['cpus_per_worker']} threads a worker, here are {most}: the last digits of "
                "figures depend on it."
            )
            run["cpus_per_worker"] = most
        if run["use_gpu"] and num_gpus < run["num_workers"]:
            warn(
                f"the original had a GPU for each of {counted(run['num_workers'], 'worker')}, here are {num_gpus:g}: "
                "training on the CPU."
            )
            run["use_gpu"] = False
        config = build_config(values)
        launch(config)
    return RunFolder(str(locate(config.run.storage) / str(config.run.name)))
