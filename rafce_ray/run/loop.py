"""The one epoch loop, in ordinary PyTorch; a small ``Session`` connects it to Ray or to nothing.

A resume needs only (epoch, step): every order and every random draw comes from (seed, epoch, step, rank). On a CPU an
interrupted run therefore ends with the same weights as an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from rafce_ray.base.console import finite
from rafce_ray.base.errors import RafceError
from rafce_ray.base.figures import MAIN
from rafce_ray.base.hardware import describe_hardware
from rafce_ray.bundle.evaluate import EVALUATION_BATCH
from rafce_ray.data.loader import batch_remark, step_seed, tally
from rafce_ray.data.records import counted
from rafce_ray.faces.preprocess import preprocess
from rafce_ray.metrics.counts import Counts, count_batch, summarise, with_score
from rafce_ray.model.optim import learning_rate
from rafce_ray.run.checkpoint import checkpoint_name, clear_scratch, list_checkpoints, newest_valid, prune
from rafce_ray.run.finish import finish
from rafce_ray.run.state import NUM_LOSS_SUMS, Job, Session, Training, resolve_monitor, score_of

PROGRESS_EVERY_S = 1.0
REMOTE_PROGRESS_EVERY_S = 10.0
"""On object storage, each write of the progress is a request that a training step waits for."""

PROBE_IMAGES = 32
"""Train images on which the gradients of both tasks are compared."""


AfterEpoch = Callable[[Training, list[dict[str, Any]]], None]
"""Called on rank 0 after every epoch, with the records of all epochs so far."""


def fit(job: Job, session: Session, after_epoch: AfterEpoch | None = None) -> dict[str, Any] | None:
    """Train until the epochs or the patience are used up, from the newest valid checkpoint if there is one.

    Returns the run's result (status, bundle, best_epoch, weights_sha256, metrics) on rank 0, None on the others.

    Raises:
        GateError: the data has nothing to train on or to choose the best epoch by.
    """
    training = Training(job, session)
    config, folder = training.config, training.folder
    monitor, remark = resolve_monitor(config, training.dataset)
    _announce(training, remark)
    _resume(training)
    if config.run.compile:
        training.model.compile()
    wrapped = session.wrap(training.objective)

    status, reason = "finished", None
    while training.progress.epoch < config.optim.epochs:
        if training.progress.epochs_without_improvement >= config.optim.patience:
            status = "stopped_early"
            break
        record = train_epoch(training, wrapped)
        if undefined := [name for name, value in record["train"].items() if not math.isfinite(value)]:
            status, reason = "diverged", f"not finite in epoch {record['epoch']}: {', '.join(undefined)}"
            break
        began = time.perf_counter()
        record["validation"] = _evaluate(training, "validation", training.splits.validation)
        record["train_natural"] = _evaluate(training, "gap", training.splits.gap)
        training.progress.elapsed_s += time.perf_counter() - began
        record["gap"] = {name: record["train_natural"][name] - record["validation"][name] for name in MAIN}
        score = score_of(record["validation"], monitor)
        _advance(training, score)
        if session.rank == 0 and (gradient := _probe_gradients(training)) is not None:
            record["gradient"] = gradient
        record |= {
            "score": score,
            "best_score": training.progress.best_score,
            "best_epoch": training.progress.best_epoch,
            "elapsed_s": training.progress.elapsed_s,
        }
        if session.rank == 0:
            # Metrics first: after a kill in between, the epoch is repeated and its record replaced.
            earlier = [one for one in folder.metrics() if one["epoch"] < record["epoch"]]
            folder.write_metrics([*earlier, record])
            began = time.perf_counter()
            checkpoint = training.save(record["validation"], score if math.isfinite(score) else None)
            record["checkpoint"] = {"seconds": time.perf_counter() - began, "bytes": checkpoint.num_bytes()}
            prune(folder.checkpoints, config.run.keep_checkpoints)
            if after_epoch is not None:
                after_epoch(training, [*earlier, record])
        session.report(_flat(record))
    return finish(training, status, monitor, reason) if session.rank == 0 else None


def _announce(training: Training, remark: str | None) -> None:
    session = training.session
    if session.rank != 0:
        return
    clear_scratch(training.folder.checkpoints)
    training.folder.write_targets(training.targets)
    weights = training.weights_report
    training.folder.add_event(
        "started",
        message=f"{counted(session.num_workers, 'worker')} on {session.device.type}, {training.precision}; "
        f"backbone weights: {weights.summary}",
        pid=os.getpid(),
        num_workers=session.num_workers,
        precision=training.precision,
        hardware=describe_hardware(session.device),
    )
    batches = batch_remark(len(training.splits.train), training.config.optim.batch_size)
    for message in (*weights.warnings, remark, batches):
        if message is not None:
            training.folder.add_event("warning", message=message)


def _resume(training: Training) -> None:
    """Continue from the newest valid checkpoint; every worker takes the one that rank 0 chose."""
    session, folder = training.session, training.folder
    chosen = None
    if session.rank == 0:
        checkpoint, invalid = newest_valid(folder.checkpoints)
        training.tell_invalid(invalid)
        chosen = None if checkpoint is None else checkpoint.name
        if checkpoint is not None:
            done = f"after {checkpoint.epoch} epochs" + (f" and {checkpoint.step} steps" if checkpoint.step else "")
            message = f"going on from checkpoint {chosen}, {done}"
            folder.add_event("resumed", message=message, checkpoint=chosen)
        elif invalid:
            folder.add_event("warning", message="no checkpoint can be used: starting again from the first epoch")
    chosen = session.broadcast(chosen)
    if chosen is not None:
        found, _ = list_checkpoints(folder.checkpoints)
        training.restore(next(one for one in found if one.name == chosen))


def train_epoch(training: Training, wrapped: nn.Module) -> dict[str, Any]:
    """Train one epoch, or the rest of it, with ``wrapped`` (the objective as the session wrapped it).

    Returns its record: mean losses over its steps, the images used, images/s over all workers, share of time spent
    waiting for data.

    Raises:
        RafceError: the epoch did not use each image as often as drawn.
    """
    config, progress, session, loader = training.config, training.progress, training.session, training.loader
    epoch, steps = progress.epoch, loader.steps_per_epoch
    au_weight = training.au_weight(epoch)
    sums = torch.tensor(progress.loss_sums, dtype=torch.float64, device=session.device)
    used = torch.tensor(progress.images_used, dtype=torch.int64)
    parameters = [parameter for parameter in training.objective.parameters() if parameter.requires_grad]
    clock = _Clock(training)
    wrapped.train()
    for stored in loader.batches(epoch, progress.step):
        torch.manual_seed(step_seed(config.run.seed, epoch, progress.step, session.rank))
        lr = _learning_rate(training, epoch * steps + progress.step)
        batch = training.prepare(stored)
        clock.data_ready()
        with autocast(training):
            losses, _ = wrapped(batch, au_weight)
        training.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip or math.inf)
        training.optimizer.step()
        if training.ema is not None:
            training.ema.update_parameters(training.model)
        # The total is scaled for DDP's mean over workers, and every worker has the same gradient norm.
        shared = (losses.total.detach() / session.num_workers, norm / session.num_workers)
        parts = (losses.emotion.detach(), losses.action_units.detach(), losses.votes.detach())
        sums += torch.stack([shared[0], *parts, shared[1]]).double()
        used += tally(stored.rows)
        progress.step += 1
        session.alive()
        clock.step_done(loader.batch_sizes[progress.step - 1])
        every = config.run.checkpoint_every_steps
        if every and progress.step % every == 0 and progress.step < steps:
            sums, used = _checkpoint_inside_epoch(training, sums, used, clock)
    session.share_buffers(training.evaluated_model)
    total, emotion, action_units, votes, norm = (session.sum(sums) / steps).tolist()
    train = {"loss": total, "emotion_loss": emotion, "au_loss": action_units, "grad_norm": norm}
    if config.loss.votes_weight > 0:
        train["votes_loss"] = votes
    images = _images_used(training, session.sum(used))
    progress.elapsed_s += clock.elapsed_s()
    return {
        "epoch": epoch + 1,
        "num_workers": session.num_workers,
        "images": images,
        "lr": lr,
        "au_weight": au_weight,
        "train": train,
        "images_per_s": clock.images_per_s(),
        "data_wait": clock.data_share(),
    }


def _images_used(training: Training, used: torch.Tensor) -> dict[str, Any]:
    """The number and checksum of the images that all workers ``used`` in the epoch that ended."""
    epoch = training.progress.epoch
    drawn = tally(training.loader.order(epoch))
    if not torch.equal(used, drawn):
        checkpoint = training.folder.checkpoints / checkpoint_name(epoch, 0)
        raise RafceError(
            f"epoch {epoch + 1} used {int(used[0])} images where {int(drawn[0])} were drawn, or not each as often as "
            "drawn: its figures would not be what they say. To train it again from its start, delete every checkpoint "
            f"newer than {checkpoint.name} in {training.folder.checkpoints} and give the command again."
        )
    return {"used": int(used[0]), "checksum": f"{int(used[1]) % 2**64:016x}"}


def _checkpoint_inside_epoch(
    training: Training, sums: torch.Tensor, used: torch.Tensor, clock: _Clock
) -> tuple[torch.Tensor, torch.Tensor]:
    """Save inside an epoch; rank 0 takes over the sums and the tally of all workers, as after a resume."""
    session = training.session
    everywhere, used_everywhere = session.sum(sums), session.sum(used)
    if session.rank == 0:
        training.progress.loss_sums, training.progress.images_used = everywhere.tolist(), used_everywhere.tolist()
        before = training.progress.elapsed_s
        training.progress.elapsed_s = before + clock.elapsed_s()
        records = training.folder.metrics()
        training.save(records[-1]["validation"] if records else {}, None)
        training.progress.elapsed_s = before
        prune(training.folder.checkpoints, training.config.run.keep_checkpoints)
        return everywhere.to(sums.device), used_everywhere
    return torch.zeros_like(sums), torch.zeros_like(used)


def _learning_rate(training: Training, step: int) -> float:
    """Set and return the learning rate of a step, counted from the start of the run."""
    optim, steps = training.config.optim, training.loader.steps_per_epoch
    rate = learning_rate(
        step,
        total_steps=optim.epochs * steps,
        warmup_steps=round(min(optim.warmup_epochs, optim.epochs / 2) * steps),
        lr=optim.lr,
        schedule=optim.schedule,
    )
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    return rate


def autocast(training: Training) -> AbstractContextManager[Any]:
    """bf16 autocast where the run uses it, else nothing."""
    if training.precision == "bf16":
        return torch.autocast(training.session.device.type, dtype=torch.bfloat16)
    return nullcontext()


def _evaluate(training: Training, split: str, indices: np.ndarray) -> dict[str, Any]:
    """Figures of a split in evaluation mode on natural images: counts of all workers are summed, then divided once."""
    session, targets = training.session, training.dataset.targets
    mine = indices[session.rank :: session.num_workers]
    batches = [mine[start : start + EVALUATION_BATCH] for start in range(0, len(mine), EVALUATION_BATCH)]
    model = training.evaluated_model
    model.eval()
    counts = Counts.zero(training.job.taxonomy)
    with torch.inference_mode(), autocast(training):
        for batch, images in zip(batches, training.images_of(split, indices).gather_all(batches), strict=True):
            logits = model(training.in_memory_format(preprocess(images, training.preprocessing)))
            counts += count_batch(
                logits, torch.from_numpy(targets.emotion[batch]), torch.from_numpy(targets.action_units[batch])
            )
            session.alive()
    counts = Counts.from_vector(session.sum(counts.to_vector()), training.job.taxonomy)
    return with_score(summarise(counts, training.job.taxonomy), training.config.optim.score_au_share)


def _probe_gradients(training: Training) -> dict[str, float] | None:
    """Norms of both tasks' unweighted gradients at the trunk, and their cosine; None for one task alone.

    They are measured on the same few natural train images every epoch, in evaluation mode: no random number is drawn
    and no statistics change, so the probe does not affect training.
    """
    parameters = [one for one in training.model.trunk.parameters() if one.requires_grad]
    taxonomy = training.job.taxonomy
    if not (parameters and taxonomy.num_emotions and taxonomy.num_action_units):
        return None
    stored = training.loader.batch_of(training.splits.gap[: min(PROBE_IMAGES, training.config.optim.batch_size)])
    batch = stored._replace(images=training.in_memory_format(preprocess(stored.images, training.preprocessing)))
    training.model.eval()
    with autocast(training):
        logits = training.model(batch.images)
    emotion, action_units, _ = training.objective.loss.task_losses(logits, batch)
    flat = []
    for loss in (emotion, action_units):
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        flat.append(torch.cat([part.flatten() for part in parts]).double())
    emotion_norm, au_norm = (float(one.norm()) for one in flat)
    product = emotion_norm * au_norm
    cosine = float(flat[0] @ flat[1]) / product if product > 0 else math.nan
    return {"emotion_norm": emotion_norm, "au_norm": au_norm, "cosine": cosine}


def _advance(training: Training, score: float) -> None:
    """Close an epoch: count it, and the epochs since the best one. An undefined score is no improvement."""
    progress = training.progress
    progress.epoch, progress.step = progress.epoch + 1, 0
    progress.loss_sums, progress.images_used = [0.0] * NUM_LOSS_SUMS, [0, 0]
    if math.isfinite(score) and (progress.best_score is None or score > progress.best_score):
        progress.best_score, progress.best_epoch, progress.epochs_without_improvement = score, progress.epoch, 0
    else:
        progress.epochs_without_improvement += 1


def _flat(record: dict[str, Any]) -> dict[str, float | None]:
    """The scalars of an epoch record as ``validation/macro_f1``, and ``validation/au_f1/AU12``: plain numbers, None
    where undefined.
    """
    units = record["validation"]["per_au"]
    flat: dict[str, float | None] = {f"validation/au_f1/{one['action_unit']}": finite(one["f1"]) for one in units}
    for key, value in record.items():
        scalars = {f"{key}/{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        for name, item in scalars.items():
            if isinstance(item, int | float):
                flat[name] = item if math.isfinite(item) else None
    return flat


class _Clock:
    """Times an epoch and shows rank 0's progress about once a second."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._start = self._mark = self._shown = time.perf_counter()
        self._data_s = 0.0
        self._images = 0
        local = training.folder.location.local is not None
        self._show_every_s = PROGRESS_EVERY_S if local else REMOTE_PROGRESS_EVERY_S

    def data_ready(self) -> None:
        self._data_s += time.perf_counter() - self._mark

    def step_done(self, num_images: int) -> None:
        """``num_images``: of the step, over all workers."""
        self._images += num_images
        self._mark = time.perf_counter()
        if self._training.session.rank == 0 and self._mark - self._shown >= self._show_every_s:
            self._shown = self._mark
            progress, steps = self._training.progress, self._training.loader.steps_per_epoch
            self._training.folder.write_progress(
                {
                    "epoch": progress.epoch + 1,
                    "step": progress.step,
                    "steps": steps,
                    "images_per_s": self.images_per_s(),
                    "elapsed_s": progress.elapsed_s + self.elapsed_s(),
                }
            )

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._start

    def images_per_s(self) -> float:
        return self._images / max(self.elapsed_s(), 1e-9)

    def data_share(self) -> float:
        return self._data_s / max(self.elapsed_s(), 1e-9)
