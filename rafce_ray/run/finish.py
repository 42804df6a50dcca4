"""Ends a run: calibrates and measures its best epoch on validation, and writes it as the bundle."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rafce_ray.bundle.bundle import load_bundle, save_bundle
from rafce_ray.bundle.evaluate import EVALUATION_BATCH, evaluate_outputs, split_outputs
from rafce_ray.bundle.model_card import model_card
from rafce_ray.metrics.calibration import Calibration, SplitOutputs, calibrated, cross_fitted, fit_calibration
from rafce_ray.metrics.consistency import estimate_association
from rafce_ray.metrics.counts import with_score
from rafce_ray.metrics.drift import DriftReference, build_reference, light_of
from rafce_ray.run.checkpoint import BUNDLE, Checkpoint, best_valid
from rafce_ray.run.state import Training


def finish(training: Training, status: str, monitor: str, reason: str | None = None) -> dict[str, Any]:
    """Write the bundle of the best epoch, measured as ``rafce evaluate`` does, and the run's result; rank 0 only.

    ``reason``: why the run failed, None if it did not.
    """
    folder, progress = training.folder, training.progress
    best, invalid = best_valid(folder.checkpoints)
    training.tell_invalid(invalid)
    result: dict[str, Any] = {
        "status": status,
        "reason": reason,
        "run_dir": str(folder.location),
        "bundle": None,
        "best_epoch": None,
        "weights_sha256": None,
        "metrics": {},
        "monitor": monitor,
        "epochs": progress.epoch,
        "elapsed_s": progress.elapsed_s,
    }
    if best is not None:
        sha256, metrics = _write_bundle(training, best)
        result |= {"bundle": str(folder.bundle), "best_epoch": best.epoch, "weights_sha256": sha256, "metrics": metrics}
    folder.write_result(result)
    said = {} if reason is None else {"message": f"diverged: {reason}"}
    folder.add_event(status, epochs=progress.epoch, best_epoch=result["best_epoch"], **said)
    return result


def _write_bundle(training: Training, best: Checkpoint) -> tuple[str, dict[str, Any]]:
    """Calibrate the best epoch on validation, measure it there and write the bundle; its sha256 and figures."""
    folder, dataset = training.folder, training.dataset
    with (best.location / BUNDLE).local_copy() as source, TemporaryDirectory() as scratch:
        bundle = load_bundle(source)
        outputs = split_outputs(bundle, dataset, "validation", device=training.session.device)
        calibration, metrics = _calibrate(training, outputs)
        association, targets, train = None, dataset.targets, training.splits.train
        if bundle.taxonomy.num_emotions and bundle.taxonomy.num_action_units:
            emotion, action_units = targets.emotion[train], targets.action_units[train]
            association = estimate_association(emotion, action_units, bundle.taxonomy.num_emotions)
        described: dict[str, Any] = {
            "taxonomy": bundle.taxonomy,
            "architecture": bundle.architecture,
            "calibration": calibration,
            "metrics": metrics,
            "provenance": bundle.provenance | {"best_epoch": best.epoch},
        }
        sha256 = save_bundle(
            Path(scratch) / "bundle",
            model=bundle.model,
            preprocessing=bundle.preprocessing,
            association=association,
            drift_reference=_drift_reference(training, outputs, calibration),
            model_card=model_card(**described, audit=training.audit, targets=training.targets),
            **described,
        )
        folder.bundle.delete()
        folder.bundle.upload(Path(scratch) / "bundle")
        folder.write_outputs("validation", outputs)
    return sha256, metrics


def _calibrate(training: Training, outputs: SplitOutputs) -> tuple[Calibration, dict[str, Any]]:
    """The calibration fitted to a validation split's raw outputs, and its figures; what failed becomes a warning."""
    taxonomy, settings = training.job.taxonomy, training.config.calibration
    calibration, held_out = Calibration.uncalibrated(taxonomy.num_action_units), {}
    if settings.enabled:
        raw, pos_weights = outputs.outputs, training.objective.loss.settings.pos_weights
        calibration, remarks = fit_calibration(raw, outputs, pos_weights=pos_weights, max_error=settings.max_error)
        for remark in remarks:
            training.folder.add_event("calibration", message=remark)
        seed = training.config.run.seed
        held_out = {"cross_fitted": cross_fitted(raw, outputs, pos_weights=pos_weights, seed=seed)}
    figures = evaluate_outputs(outputs, taxonomy, calibration)
    return calibration, {
        "split": "validation",
        **with_score(figures, training.config.optim.score_au_share),
        **held_out,
    }


def _drift_reference(training: Training, outputs: SplitOutputs, calibration: Calibration) -> DriftReference | None:
    """The light of validation's faces and the answers to them; None, with a warning, where an answer is not finite."""
    dataset = training.dataset
    indices = dataset.indices("validation")
    batches = np.split(indices, range(EVALUATION_BATCH, len(indices), EVALUATION_BATCH))
    lights = [light_of(face) for batch in batches for face in dataset.images.gather(batch)]
    reference = build_reference(calibrated(outputs.outputs, calibration), calibration.au_thresholds, lights)
    if reference is None:
        message = (
            "the model gives values that are not finite on validation: the bundle keeps no reference, and an "
            "endpoint cannot detect drift"
        )
        training.folder.add_event("drift", message=message)
    return reference
