"""The plan of a study, reported before it starts: trials, shares of the cluster, disk, and whether all of it fits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import torch

from rafce_ray.base.console import say, warn
from rafce_ray.base.errors import UsageError
from rafce_ray.base.storage import Location
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.config import Config, ConfigError, RunConfig
from rafce_ray.data.loader import Prepared, batch_remark, num_steps, open_dataset
from rafce_ray.data.records import counted
from rafce_ray.model.network import build_architecture, build_model
from rafce_ray.run.state import choose_splits
from rafce_ray.study.config import StudyConfig, foreseen
from rafce_ray.study.folder import StudyFolder
from rafce_ray.study.space import identity, planned_trials, propose
from rafce_ray.study.trials import read_trials
from rafce_ray.study.watch import plain

NESTED_MEMORY_BYTES = 2**20
"""What Tune reserves for a trial of several workers, as it wants something. Ray Train reserves the CPUs."""


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine of the cluster."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Shares:
    """``cpus`` and ``gpus`` of each of a trial's ``workers``; ``at_once``: trials at a time of ``fitting`` possible."""

    workers: int
    cpus: float
    gpus: float
    at_once: int
    fitting: int

    @property
    def reserved(self) -> dict[str, float]:
        """What Tune reserves for one trial."""
        if self.workers > 1:
            return {"cpu": 0, "memory": NESTED_MEMORY_BYTES}
        return {"cpu": self.cpus} | ({"gpu": self.gpus} if self.gpus else {})

    @property
    def shown(self) -> str:
        """``2 at a time, each 1 worker with 1 CPU and 0.5 GPU``."""
        gpu = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.at_once} at a time, each {counted(self.workers, 'worker')} with {self.cpus:g} CPU{gpu}"


def share_out(
    run: RunConfig, nodes: Sequence[Node], *, concurrent: int | None, gpus_per_worker: float | None
) -> Shares:
    """The shares of trials that are all alike.

    ``concurrent``: trials at a time; None: as many as fit. ``gpus_per_worker``: None: where there are GPUs and
    ``run.use_gpu`` is not false a whole one, or a fraction where more one-worker trials at a time than GPUs are asked
    for.

    Raises:
        UsageError: one trial, or ``concurrent`` of them, can never run on this cluster, or ``run.use_gpu`` contradicts
            ``gpus_per_worker``.
    """
    workers, cpus = run.most_workers, float(run.cpus_per_worker or 1)
    total = Node(sum(node.cpus for node in nodes), sum(node.gpus for node in nodes))
    if gpus_per_worker is not None and run.use_gpu not in (None, gpus_per_worker > 0):
        raise UsageError(
            f"base.run.use_gpu={str(run.use_gpu).lower()} and resources.gpus_per_worker={gpus_per_worker:g} contradict "
            "each other. Leave one of them out."
        )
    gpus = gpus_per_worker or 0.0
    if gpus_per_worker is None and (run.use_gpu if run.use_gpu is not None else total.gpus > 0):
        crowded = workers == 1 and concurrent is not None and concurrent > total.gpus > 0
        gpus = 1 / math.ceil(concurrent / total.gpus) if crowded and concurrent else 1.0
    slots = sum(_slots(node, cpus, gpus) for node in nodes)
    fitting = slots // workers
    wanted = f"{counted(workers, 'worker')} x {cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")
    has = (
        f"the cluster has {total.cpus:g} CPUs and {total.gpus:g} GPUs on {counted(len(nodes), 'machine')}, with "
        f"room for {counted(slots, 'such worker')}"
    )
    if fitting < 1:
        raise UsageError(
            f"a trial wants {wanted}; {has}. Lower resources.workers, resources.cpus_per_worker or "
            "resources.gpus_per_worker, or set base.run.use_gpu=false."
        )
    if concurrent is not None and concurrent > fitting:
        raise UsageError(
            f"{concurrent} trials at a time x {wanted} = {concurrent * workers} workers; {has}. Lower the number of "
            "trials at a time (resources.concurrent, --concurrent) or what each of them gets."
        )
    return Shares(workers, cpus, gpus, concurrent or fitting, fitting)


def _slots(node: Node, cpus: float, gpus: float) -> int:
    """Workers that one machine can hold.

    A worker never spans two GPUs' fractions, so each GPU is counted for itself.
    """
    by_cpu = math.floor(node.cpus / cpus + 1e-9)
    if not gpus:
        return by_cpu
    by_gpu = math.floor(node.gpus / gpus + 1e-9) if gpus >= 1 else math.floor(node.gpus) * math.floor(1 / gpus + 1e-9)
    return min(by_cpu, by_gpu)


OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "sgd": 1}
"""Values that an optimizer keeps for each weight."""

FLOAT_BYTES = 4
LIVE_CHECKPOINTS = 3
"""Checkpoints of a trial that runs: the best, the latest two."""

SIZING = ("model.backbone", "model.au_attention", "optim.optimizer", "optim.ema_decay")
"""Keys on which the size of a checkpoint depends by more than a few values."""

SHOWN_TRIALS = 8


def first_line(study: StudyConfig, folder: StudyFolder) -> str:
    """What is about to happen and where results go."""
    config, total = study.base_config, planned_trials(study)
    stopping = "no early stopping" if study.scheduler.type == "none" else study.scheduler.type.upper()
    return (
        f"study {study.name}: {study.search} search over {len(study.space)} keys, {total} trials (the base first) of "
        f"up to {config.optim.epochs} epochs of {config.model.backbone} at {config.model.image_px} px on "
        f"{config.data.root}, {stopping}; results go to {folder.location.shown}"
    )


def tell_plan(study: StudyConfig, folder: StudyFolder, shares: Shares, prepared: Prepared) -> None:
    """Say all that is known before anything trains; UsageError where the disk cannot hold it."""
    total, config = planned_trials(study), study.base_config
    ended = sum(one.has_ended for one in read_trials(folder, study.metric, role="sweep"))
    say(f"trials: {total}, of which {ended} have ended; {shares.shown} (the cluster holds {shares.fitting} at a time)")
    epochs = total * config.optim.epochs
    finals = study.finalists
    retrained = "" if finals.k == 0 else f", then up to {finals.k + 1} finalists x {finals.seeds} seeds to the end"
    scheduler, stopping = study.scheduler, ""
    if scheduler.type == "asha":
        later = f" (the first of {scheduler.brackets} brackets; the others later)" if scheduler.brackets > 1 else ""
        rungs = asha_rungs(scheduler.grace_period, scheduler.reduction_factor, config.optim.epochs)
        stopping = (
            f"; ASHA compares trials after epochs {', '.join(f'{one:g}' for one in rungs)}{later} and lets about the "
            f"best 1/{scheduler.reduction_factor:g} of each rung go on"
        )
    say(f"epochs: at most {epochs}{stopping}{retrained}")
    tell_disk(study, folder.location, shares, prepared.taxonomy)
    dataset = open_dataset(prepared.store, prepared.taxonomy, config.data.null_policy)
    tell_batches(study, len(choose_splits(dataset, config).train))


def tell_batches(study: StudyConfig, num_images: int) -> None:
    """Warn of batch sizes that give the same number of steps an epoch, and of trials that are therefore the same.

    ``num_images``: of the base's train split.
    """
    key = "optim.batch_size"
    searched = study.space[key].ends() if key in study.space else ()
    sizes: dict[int, list[int]] = {}
    for size in sorted({study.base_values[key], *(int(one) for one in searched)}):
        sizes.setdefault(num_steps(num_images, size), []).append(size)
    for steps, alike in sizes.items():
        if len(alike) > 1:
            warn(
                f"{key} {_listed(alike)} come to the same on {num_images} train images: {steps} "
                f"step{'s' if steps > 1 else ''} an epoch."
            )
        elif (remark := batch_remark(num_images, alike[0])) is not None:
            warn(remark)
    if not searched or study.search == "optuna":
        return
    trials: dict[Any, list[str]] = {}
    for number, values in zip(range(planned_trials(study)), chain([{}], foreseen(study)), strict=False):
        trained = study.base_values | values
        steps = num_steps(num_images, int(trained.pop(key)))
        trials.setdefault((steps, identity(trained)), []).append(f"trial_{number:04d}")
    for names in trials.values():
        if len(names) > 1:
            warn(f"{_listed(names)} train the same and will get the same figures. Search one of their batch sizes.")


def _listed(parts: Sequence[object]) -> str:
    """``16, 48 and 64``; of many, the first."""
    texts = [str(part) for part in parts]
    if len(texts) > SHOWN_TRIALS:
        return f"{', '.join(texts[:SHOWN_TRIALS])} and {len(texts) - SHOWN_TRIALS} more"
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def asha_rungs(grace_period: int, reduction_factor: float, epochs: int) -> list[float]:
    """Epochs at which ASHA compares trials; none at the last, where nothing is left to save."""
    last = max(grace_period, epochs - 1)
    # Ray's count, its rounding included: of 1, 3, ..., 243 it leaves the last out.
    rungs = int(math.log(last / grace_period) / math.log(reduction_factor) + 1)
    return [float(grace_period * reduction_factor**place) for place in range(rungs)]


def tell_disk(study: StudyConfig, place: Location, shares: Shares, taxonomy: Taxonomy) -> None:
    """Say what the study will need on disk at most; UsageError where a local disk has less."""
    bundle, checkpoint = largest_model_bytes(study, taxonomy)
    kept = study.keep + 1
    finals = (study.finalists.k + 1) * study.finalists.seeds if study.finalists.k else 0
    running = shares.at_once * LIVE_CHECKPOINTS * checkpoint
    needed = running + kept * (bundle + checkpoint) + (finals + 2) * bundle
    line = (
        f"disk: at most about {shown_bytes(needed)}: {shares.at_once} running x {LIVE_CHECKPOINTS} checkpoints of "
        f"{shown_bytes(checkpoint)}, the best {study.keep} trials and the base, {finals} finalists' bundles of "
        f"{shown_bytes(bundle)}"
    )
    local = place.local
    if local is None:
        say(line)
        return
    existing = next(parent for parent in (local, *local.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    say(f"{line}; {shown_bytes(free)} free")
    # What an earlier start has written is part of what the study needs.
    written = sum(info.size or 0 for info in place.list(recursive=True))
    if needed > free + written:
        raise UsageError(
            f"the study needs about {shown_bytes(needed)} in {local}, which has {shown_bytes(free)} free. Lower keep "
            "or resources.concurrent, or set storage to a larger disk."
        )


def largest_model_bytes(study: StudyConfig, taxonomy: Taxonomy) -> tuple[int, int]:
    """Bytes of a bundle and of a checkpoint of the largest model that the study may train."""
    searched = {key: study.space[key].ends() for key in SIZING if key in study.space}
    sizes = [model_bytes(study.base_config, taxonomy)]
    for combination in product(*searched.values()) if searched else ():
        # What does not go together is not trained.
        with suppress(ConfigError):
            sizes.append(model_bytes(study.config_of(dict(zip(searched, combination, strict=True))), taxonomy))
    bundles, checkpoints = zip(*sizes, strict=True)
    return max(bundles), max(checkpoints)


def model_bytes(config: Config, taxonomy: Taxonomy) -> tuple[int, int]:
    """Bytes of a bundle and of a checkpoint of the configuration's model."""
    architecture = build_architecture(config.model, taxonomy, au_stop_gradient=config.loss.au_stop_gradient)
    with torch.device("meta"):
        model = build_model(architecture)
    weights = sum(value.numel() for value in model.state_dict().values()) * FLOAT_BYTES
    copies = OPTIMIZER_COPIES[config.optim.optimizer] + (1 if config.optim.ema_decay else 0)
    return weights, weights * (1 + copies)


def tell_trials(study: StudyConfig) -> None:
    """Say what the first trials will train; of an adaptive search only its random start is known."""
    total = planned_trials(study)
    for number in range(min(total, SHOWN_TRIALS)):
        values = propose(study, number)
        if values is None:
            break
        shown = ", ".join(f"{key} {plain(value)}" for key, value in values.items())
        say(f"  trial_{number:04d}: {shown or 'the base'}")
    if total > SHOWN_TRIALS:
        say(f"  ... and {total - SHOWN_TRIALS} more")


def shown_bytes(count: float) -> str:
    """``45 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
