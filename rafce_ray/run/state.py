"""The state of a run: its network, optimizer, data and progress, and how it is built, saved and restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from rafce_ray.base.errors import GateError
from rafce_ray.base.figures import FIGURES, monitor_for
from rafce_ray.base.hardware import resolve_precision
from rafce_ray.base.taxonomy import Taxonomy
from rafce_ray.bundle.bundle import read_weights, save_bundle
from rafce_ray.config import Config, build_config
from rafce_ray.data.audit import audit_command
from rafce_ray.data.loader import Batch, Dataset, ImageSource, TrainLoader, check_shares, open_dataset
from rafce_ray.faces.preprocess import Preprocessing, build_augmentation, resize_and_normalise, to_unit
from rafce_ray.metrics.calibration import Calibration
from rafce_ray.model.backbones import normalisation_of
from rafce_ray.model.losses import Objective, build_loss, class_weights
from rafce_ray.model.network import (
    build_architecture,
    build_model,
    freeze_stages,
    initialise_au_bias,
)
from rafce_ray.model.optim import build_ema, build_optimizer
from rafce_ray.run.checkpoint import BUNDLE, Checkpoint, InvalidCheckpoint, read_trainer_state, save_checkpoint
from rafce_ray.run.folder import RunFolder
from rafce_ray.run.weights import load_starting_weights


@dataclass(frozen=True)
class Job:
    """All that a worker needs: configuration, decoded store, resolved taxonomy, run folder and provenance.

    ``weights``: what ``model.weights`` were found to mean before the workers started; None: each finds them itself.
    """

    config: Config
    store: str
    taxonomy: Taxonomy
    run_dir: str
    provenance: dict[str, Any]
    weights: str | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain JSON values, which Ray Train carries to the workers and shows on its dashboard."""
        return {**vars(self), "config": self.config.model_dump(mode="json"), "taxonomy": asdict(self.taxonomy)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Job:
        """The job that :meth:`to_plain` wrote."""
        taxonomy = TypeAdapter(Taxonomy).validate_python(plain["taxonomy"])
        return cls(**plain | {"config": build_config(plain["config"]), "taxonomy": taxonomy})


class Session(Protocol):
    """One worker's view of the group that trains together."""

    rank: int
    num_workers: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose gradients are averaged over workers."""

    def sum(self, values: Tensor) -> Tensor:
        """Sum of values (N,) over workers, of the same shape and dtype, on the CPU; every worker must call it."""

    def broadcast(self, value: str | None) -> str | None:
        """Rank 0's value; every worker must call it."""

    def share_buffers(self, module: nn.Module) -> None:
        """Give every worker rank 0's buffers (batch-norm statistics), in place."""

    def alive(self) -> None:
        """Called after every step: a worker that stops calling it counts as hung."""

    def report(self, record: dict[str, Any]) -> None:
        """Publish one finished epoch; plain floats, ints, strings and None only."""


class LocalSession:
    """A session of this process alone: for tests, benchmarks and machines without Ray."""

    rank = 0
    num_workers = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.records: list[dict[str, Any]] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module itself."""
        return module

    def sum(self, values: Tensor) -> Tensor:
        """The values (N,) themselves, of the same shape and dtype, on the CPU."""
        return values.detach().cpu()

    def broadcast(self, value: str | None) -> str | None:
        """The value itself."""
        return value

    def share_buffers(self, module: nn.Module) -> None:
        """Nothing to share."""

    def alive(self) -> None:
        """Nobody watches."""

    def report(self, record: dict[str, Any]) -> None:
        """Keep the record in ``records``."""
        self.records.append(record)


NUM_LOSS_SUMS = 5
"""Sums over an epoch's steps: total loss, the losses of emotions, action units and votes, and the gradient norm."""


@dataclass
class Progress:
    """The progress of a run: ``epoch`` whole epochs, ``step`` steps of the next; and what early stopping needs.

    ``loss_sums`` and ``images_used`` (a tally) are of all workers' steps of the unfinished epoch.
    """

    epoch: int = 0
    step: int = 0
    best_score: float | None = None
    best_epoch: int | None = None
    epochs_without_improvement: int = 0
    elapsed_s: float = 0.0
    loss_sums: list[float] = field(default_factory=lambda: [0.0] * NUM_LOSS_SUMS)
    images_used: list[int] = field(default_factory=lambda: [0, 0])


@dataclass(frozen=True)
class Splits:
    """Rows of the dataset (int64): all train rows, all validation rows, and the train rows that measure the gap.

    The gap's images keep the labels that training sees: where ``data.evaluation_null_policy`` reads null otherwise, the
    gap of AU figures includes that difference.
    """

    train: np.ndarray
    validation: np.ndarray
    gap: np.ndarray


class Training:
    """All of a run that outlives a step; every worker builds it, and only rank 0 writes."""

    def __init__(self, job: Job, session: Session) -> None:
        config = job.config
        self.job, self.config, self.session = job, config, session
        self.folder = RunFolder(job.run_dir)
        self.dataset = open_for_training(job)
        self.splits = choose_splits(self.dataset, config)
        self.preprocessing = Preprocessing(
            self.dataset.images.stored_px, config.model.image_px, *normalisation_of(config.model.backbone)
        )
        self.precision = resolve_precision(config.run.precision, session.device)
        self.augment = build_augmentation(config.data.augmentation)

        torch.manual_seed(config.run.seed)
        self.architecture = build_architecture(
            config.model, job.taxonomy, au_stop_gradient=config.loss.au_stop_gradient
        )
        self.model = build_model(self.architecture)
        targets, train = self.dataset.targets, self.splits.train
        emotion, action_units = targets.emotion[train], targets.action_units[train]
        positives, negatives = (action_units == 1).sum(axis=0), (action_units == 0).sum(axis=0)
        with np.errstate(invalid="ignore"):
            initialise_au_bias(self.model, positives / (~np.isnan(action_units)).sum(axis=0))
        start = job.weights or config.model.weights
        self.weights_report = load_starting_weights(self.model, start, job.taxonomy)
        self.provenance = job.provenance | {
            "weights": {"asked": config.model.weights, "source": start, "report": asdict(self.weights_report)}
        }
        freeze_stages(self.model, None if config.model.freeze_backbone else config.model.frozen_stages)
        counts, weights = np.bincount(emotion[emotion >= 0], minlength=job.taxonomy.num_emotions), None
        if config.loss.imbalance == "class_weights" and job.taxonomy.num_emotions:
            weights = class_weights(counts, config.loss.class_weight_beta)
        loss = build_loss(
            config.loss,
            job.taxonomy,
            class_counts=counts,
            class_weights=weights,
            au_positives=positives,
            au_negatives=negatives,
        )
        self.objective = Objective(self.model, loss, num_workers=session.num_workers).to(session.device)
        if config.run.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.ema = build_ema(self.model, config.optim.ema_decay)
        self.optimizer = build_optimizer(
            self.objective, config.optim.optimizer, lr=config.optim.lr, weight_decay=config.optim.weight_decay
        )
        # A run that may grow must fail now if it cannot, not hours later.
        check_shares(len(self.splits.train), config.optim.batch_size, config.run.most_workers)
        self.loader = TrainLoader(
            self.dataset,
            self.splits.train,
            batch_size=config.optim.batch_size,
            seed=config.run.seed,
            oversample=config.loss.imbalance == "oversampling",
            class_weights=weights,
            rank=session.rank,
            num_workers=session.num_workers,
            device=session.device,
        )
        self.progress = Progress()
        self._evaluation_images: dict[str, ImageSource] = {}

    @cached_property
    def audit(self) -> dict[str, Any] | None:
        """The findings in the labels before training."""
        return self.folder.audit()

    @cached_property
    def targets(self) -> dict[str, Any]:
        """The targets that training sees, by split."""
        return describe_targets(self.dataset, self.splits)

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated and goes into bundles: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.module

    def prepare(self, stored: Batch) -> Batch:
        """A batch of stored images (B, S, S, 3) uint8, augmented, resized and normalised to (B, 3, P, P) float32."""
        images = resize_and_normalise(self.augment(to_unit(stored.images)), self.preprocessing)
        return stored._replace(images=self.in_memory_format(images))

    def in_memory_format(self, images: Tensor) -> Tensor:
        """Images (B, 3, P, P) float32 in the memory format of the network."""
        return images.contiguous(memory_format=torch.channels_last) if self.config.run.channels_last else images

    def images_of(self, split: str, indices: np.ndarray) -> ImageSource:
        """The stored images (N, S, S, 3) uint8 of a split, cached so that they may stay on the device."""
        if split not in self._evaluation_images:
            self._evaluation_images[split] = ImageSource(self.dataset, indices, self.session.device)
        return self._evaluation_images[split]

    def au_weight(self, epoch: int) -> float:
        """The AU loss weight of an epoch (0-based) under the curriculum."""
        loss = self.config.loss
        ramp = (epoch - loss.au_start_epoch + 1) / max(loss.au_ramp_epochs, 1)
        return loss.au_weight * min(1.0, max(0.0, ramp))

    def save(self, metrics: dict[str, Any], score: float | None) -> Checkpoint:
        """Write a checkpoint of the current state; rank 0 only."""
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "loss": self.objective.loss.state_dict(),
            "progress": asdict(self.progress),
        }
        if self.ema is not None:
            # The bundle holds the averaged weights, so the raw ones go here.
            state["ema"] = {"num_averaged": self.ema.n_averaged.clone(), "raw_model": self.model.state_dict()}

        # A canary costs a copy of the model per epoch; the run's own bundle gets one at the end.
        save_weights = partial(
            save_bundle,
            model=self.evaluated_model,
            architecture=self.architecture,
            taxonomy=self.job.taxonomy,
            preprocessing=self.preprocessing,
            calibration=Calibration.uncalibrated(self.job.taxonomy.num_action_units),
            metrics=metrics,
            provenance=self.provenance,
            with_canary=False,
        )
        place, epoch, step = self.folder.checkpoints, self.progress.epoch, self.progress.step
        return save_checkpoint(place, epoch=epoch, step=step, score=score, state=state, save_bundle=save_weights)

    def tell_invalid(self, invalid: list[InvalidCheckpoint]) -> None:
        """Record an event for each checkpoint that cannot be used."""
        for one in invalid:
            message = f"checkpoint {one.name} cannot be used: {one.reason}"
            self.folder.add_event("invalid_checkpoint", message=message, checkpoint=one.name)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the state of a valid checkpoint."""
        state = read_trainer_state(checkpoint)
        with (checkpoint.location / BUNDLE).local_copy() as bundle:
            weights = read_weights(bundle)
        self.evaluated_model.load_state_dict(weights)
        if self.ema is not None:
            self.model.load_state_dict(state["ema"]["raw_model"])
            self.ema.n_averaged.copy_(state["ema"]["num_averaged"])
        self.objective.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        if self.session.rank != 0:
            # Rank 0 holds the sums of all workers.
            self.progress.loss_sums, self.progress.images_used = [0.0] * NUM_LOSS_SUMS, [0, 0]


def open_for_training(job: Job) -> Dataset:
    """The job's dataset: train rows as training sees them, the others as they are measured.

    Null is read by ``data.null_policy`` in train and by ``data.evaluation_null_policy`` in the other splits.
    With ``data.action_unit_targets=all_zero`` no known AU of the train split is present, as in the seed.
    """
    data = job.config.data
    dataset = open_dataset(job.store, job.taxonomy, data.null_policy, data.null_policy_in_evaluation)
    if data.action_unit_targets == "labels":
        return dataset
    action_units, train = dataset.targets.action_units.copy(), dataset.indices("train")
    action_units[train] = np.where(np.isnan(action_units[train]), np.nan, 0.0)
    return replace(dataset, targets=replace(dataset.targets, action_units=action_units))


def describe_targets(dataset: Dataset, splits: Splits) -> dict[str, Any]:
    """Per split: ``num_images``, images per class, and known elements and positives per action unit (by code).

    Train has the targets that training sees, validation and test those that the model is measured on.
    """
    described = {}
    rows = {"train": splits.train, "validation": splits.validation, "test": dataset.indices("test")}
    for split, indices in rows.items():
        emotion, action_units = dataset.targets.emotion[indices], dataset.targets.action_units[indices]
        classes = np.bincount(emotion[emotion >= 0], minlength=dataset.taxonomy.num_emotions)
        known, positives = (~np.isnan(action_units)).sum(axis=0), (action_units == 1).sum(axis=0)
        described[split] = {
            "num_images": len(indices),
            "classes": dict(zip(dataset.taxonomy.emotions, classes.tolist(), strict=True)),
            "action_units": {
                code: {"known": int(known[column]), "positives": int(positives[column])}
                for column, code in enumerate(dataset.taxonomy.action_unit_codes)
            },
        }
    return described


def choose_splits(dataset: Dataset, config: Config) -> Splits:
    """The rows that a run uses; GateError where train or validation has none."""
    train = dataset.indices("train")
    if config.data.drop_null_rows:
        train = train[~dataset.targets.null_row[train]]
    validation = dataset.indices("validation")
    for name, indices in (("train", train), ("validation", validation)):
        if len(indices) == 0:
            raise GateError(
                f"the {name} split has no images that can be used: training needs both train and validation. "
                f"Look at `{audit_command(config.data)}`."
            )
    gap = train
    if 0 < config.optim.gap_images < len(train):
        gap = np.sort(np.random.default_rng([config.run.seed, 1]).permutation(train)[: config.optim.gap_images])
    return Splits(train, validation, gap)


def resolve_monitor(config: Config, dataset: Dataset) -> tuple[str, str | None]:
    """The metric that chooses the best epoch, and a remark where the configured one has no trained task.

    Raises:
        GateError: the metric is undefined on this validation split.
    """
    wanted, remark, taxonomy = config.optim.monitor, None, dataset.taxonomy
    monitor = monitor_for(wanted, emotions=taxonomy.num_emotions > 0, action_units=taxonomy.num_action_units > 0)
    if monitor != wanted:
        task = "emotions" if FIGURES[wanted].task == "emotion" else "action units"
        remark = f"optim.monitor={wanted} needs {task}, which this dataset does not have: monitoring {monitor}"
    validation, targets, lack = dataset.indices("validation"), dataset.targets, ""
    if FIGURES[monitor].task == "emotion" and not (targets.emotion[validation] >= 0).any():
        lack = "an emotion label. Label some, or monitor au_f1_mean."
    if FIGURES[monitor].task == "action_units" and not (targets.action_units[validation] == 1).any():
        lack = "a positive action unit. Label some, or monitor macro_f1."
    if lack:
        raise GateError(f"optim.monitor={monitor} is undefined: no validation image has {lack}")
    return monitor, remark


def score_of(metrics: dict[str, Any], monitor: str) -> float:
    """The monitored metric with its sign set so that higher is better."""
    return FIGURES[monitor].direction * float(metrics[monitor])
