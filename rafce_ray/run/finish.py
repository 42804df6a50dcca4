"""The end of a run: its best epoch is calibrated and measured on validation, and becomes the bundle."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rafce_ray.bundle.bundle import load_bundle, save_bundle
from rafce_ray.bundle.evaluate import EVALUATION_BATCH, evaluate_outputs, split_outputs
from rafce_ray.bundle.model_card import model_card
from rafce_ray.data.loader import Dataset
from rafce_ray.metrics.calibration import Calibration, SplitOutputs, calibrated, cross_fitted, fit_calibration
from rafce_ray.metrics.consistency import Association, estimate_association
from rafce_ray.metrics.counts import with_score
from rafce_ray.metrics.drift import DriftReference, build_reference, light_of
from rafce_ray.run.checkpoint import Checkpoint, best_valid, local_bundle
from rafce_ray.run.state import Training


def finish(training: Training, status: str, monitor: str, reason: str | None = None) -> dict[str, Any]:
    """Write the bundle of the best epoch, measured as ``rafce evaluate`` measures it, and the run's result; rank 0
    only.

    ``reason``: why it did not come to a good end.
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
    """Calibrate the best epoch on validation, measure it there, and write the bundle; its sha256 and its figures."""
    folder, dataset = training.folder, training.dataset
    with local_bundle(best) as source, TemporaryDirectory() as scratch:
        bundle = load_bundle(source)
        outputs = split_outputs(bundle, dataset, "validation", device=training.session.device)
        calibration, metrics = _calibrate(training, outputs)
        provenance = bundle.provenance | {"best_epoch": best.epoch}
        card = model_card(
            taxonomy=bundle.taxonomy,
            architecture=bundle.architecture,
            calibration=calibration,
            metrics=metrics,
            provenance=provenance,
            audit=training.audit,
            targets=training.targets,
        )
        sha256 = save_bundle(
            Path(scratch) / "bundle",
            model=bundle.model,
            architecture=bundle.architecture,
            taxonomy=bundle.taxonomy,
            preprocessing=bundle.preprocessing,
            calibration=calibration,
            association=_association(dataset, training.splits.train),
            drift_reference=_drift_reference(training, outputs, calibration),
            metrics=metrics,
            provenance=provenance,
            model_card=card,
        )
        folder.bundle.delete()
        folder.bundle.upload(Path(scratch) / "bundle")
        folder.write_outputs("validation", outputs)
    return sha256, metrics


def _calibrate(training: Training, outputs: SplitOutputs) -> tuple[Calibration, dict[str, Any]]:
    """The calibration of a validation split's raw outputs, and its figures; what could not be done becomes a
    warning.
    """
    taxonomy, settings = training.job.taxonomy, training.config.calibration
    calibration = Calibration.uncalibrated(taxonomy.num_action_units)
    if not settings.enabled:
        return calibration, {"split": "validation", **_figures(training, outputs, calibration)}
    pos_weights = training.objective.loss.settings.pos_weights
    calibration, remarks = fit_calibration(
        outputs.outputs, outputs, pos_weights=pos_weights, max_error=settings.max_error
    )
    for remark in remarks:
        training.folder.add_event("calibration", message=remark)
    figures = _figures(training, outputs, calibration)
    held_out = cross_fitted(outputs.outputs, outputs, pos_weights=pos_weights, seed=training.config.run.seed)
    return calibration, {"split": "validation", **figures, "cross_fitted": held_out}


def _figures(training: Training, outputs: SplitOutputs, calibration: Calibration) -> dict[str, Any]:
    figures = evaluate_outputs(outputs, training.job.taxonomy, calibration)
    return with_score(figures, training.config.optim.score_au_share)


def _association(dataset: Dataset, train: np.ndarray) -> Association | None:
    """How emotions and action units go together in the train split; None where one of them is not trained."""
    taxonomy, targets = dataset.taxonomy, dataset.targets
    if not (taxonomy.num_emotions and taxonomy.num_action_units):
        return None
    return estimate_association(targets.emotion[train], targets.action_units[train], taxonomy.num_emotions)


def _drift_reference(training: Training, outputs: SplitOutputs, calibration: Calibration) -> DriftReference | None:
    """What validation's faces look like and how they are answered; None, with a warning, where an answer is no finite
    number.
    """
    dataset = training.dataset
    indices = dataset.indices("validation")
    batches = (indices[start : start + EVALUATION_BATCH] for start in range(0, len(indices), EVALUATION_BATCH))
    lights = [light_of(face) for batch in batches for face in dataset.images.gather(batch)]
    reference = build_reference(calibrated(outputs.outputs, calibration), calibration.au_thresholds, lights)
    if reference is None:
        message = (
            "the model gives values that are not finite on validation: the bundle keeps no reference, and an "
            "endpoint cannot tell drift"
        )
        training.folder.add_event("drift", message=message)
    return reference
