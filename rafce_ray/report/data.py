"""All that a run's report shows, gathered from its folder and, for other splits than validation, measured on the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from rafce_ray.bundle import load_bundle, read_taxonomy
from rafce_ray.calibration import Calibration, Outputs
from rafce_ray.config import Config, apply_overrides, build_config
from rafce_ray.console import finite, progress_bar
from rafce_ray.data.dataset import Dataset
from rafce_ray.doctor.command import Diagnosis, Evidence, examine_run
from rafce_ray.errors import RafceError, UsageError
from rafce_ray.evaluate import data_config_for, evaluate_outputs, open_for_bundle, split_outputs
from rafce_ray.hardware import choose_device
from rafce_ray.report.images import Mistakes, find_mistakes, open_stored
from rafce_ray.report.slice_file import read_slices
from rafce_ray.report.slices import GroupTable, group_table
from rafce_ray.run_folder import RunFolder
from rafce_ray.split_outputs import SplitOutputs
from rafce_ray.study_folder import StudyFolder
from rafce_ray.taxonomy import Taxonomy

Split = Literal["validation", "test", "held-out"]
SPLITS_OF: dict[str, tuple[str, ...]] = {
    "validation": ("validation",),
    "test": ("test",),
    "held-out": ("validation", "test"),
}
"""Choices of ``--split`` and the data splits that each is made of."""


@dataclass(frozen=True)
class ReportData:
    """A run as its report shows it; ``figures`` None where nothing was measured. All numbers are finite or None.

    ``measured`` says in words how the figures were made. ``remarks`` are things that a reader must know first.
    """

    run: Evidence
    split: Split
    taxonomy: Taxonomy
    figures: dict[str, Any] | None
    measured: str
    calibration: Calibration | None
    mistakes: Mistakes | None
    groups: GroupTable | None
    diagnoses: tuple[Diagnosis, ...]
    remarks: tuple[str, ...] = ()

    @property
    def cross_fitted(self) -> dict[str, Any] | None:
        """Calibration measured on images that it was not fitted on; only of validation."""
        return None if self.figures is None else self.figures.get("cross_fitted")


@dataclass
class _Measured:
    """A split's figures and raw outputs, where they come from, and the data they were measured on, if it was opened."""

    figures: dict[str, Any] | None
    how: str
    outputs: SplitOutputs | None = None
    dataset: Dataset | None = None
    remarks: list[str] = field(default_factory=list)


def gather(
    folder: RunFolder,
    *,
    split: Split = "validation",
    slices: str | None = None,
    images: bool = True,
    overrides: Sequence[str] = (),
    store: str | None = None,
    device: str = "auto",
) -> ReportData:
    """Everything for the page. ``slices``: a CSV of attributes; ``images=False`` reads no pixel; ``store``: where the decoded images are,
    by default the one with the run's fingerprint under ``data.store_dir``; ``overrides``: ``data.key=value`` where the data have moved.

    Raises:
        UsageError: there is no run here, or what is asked for cannot be had of it; the slices file is malformed.
        RafceError: the split cannot be measured.
    """
    check_run(folder)
    # Before anything is measured: a typing error in the file should not cost minutes.
    slice_file = None if slices is None else read_slices(slices)
    run = Evidence.of_run(folder)
    run = replace(run, config=_with_data(run, overrides, split))
    measured = _from_files(run) if split == "validation" else _from_data(folder, split, overrides, device)
    taxonomy, calibration = _taxonomy(folder, run), run.calibration
    mistakes = groups = None
    if measured.outputs is not None and calibration is not None:
        mistakes = find_mistakes(measured.outputs, taxonomy, calibration)
        if slice_file is not None:
            groups = group_table(measured.outputs, taxonomy, calibration, slice_file)
    elif slice_file is not None:
        raise UsageError(
            f"{folder.location}: --slices needs the finished model's outputs, and the run has none. Finish it, or leave --slices out."
        )
    if mistakes is not None and images:
        mistakes = mistakes.with_thumbnails(
            lambda: measured.dataset or open_stored(run.config.data, run.provenance, taxonomy, store)
        )
    return ReportData(
        run=run,
        split=split,
        taxonomy=taxonomy,
        figures=finite(measured.figures),
        measured=measured.how,
        calibration=calibration,
        mistakes=mistakes,
        groups=groups,
        diagnoses=tuple(examine_run(folder)),
        remarks=tuple(measured.remarks),
    )


def check_run(folder: RunFolder) -> None:
    """UsageError where the folder is no run's; a study's trials are named."""
    if folder.exists():
        return
    study = StudyFolder(folder.place)
    if study.trial_names():
        names = study.trial_names()
        raise UsageError(
            f"{folder.location}: is a study of {len(names)} trials. Give one of them, for example {study.trial(names[0]).location}."
        )
    folder.location.check_reachable()
    what = "is no run folder: there is no config.yaml in it" if folder.location.exists() else "nothing is there"
    raise UsageError(f"{folder.location}: {what}. Give the folder of a run, such as runs/NAME.")


def _from_files(run: Evidence) -> _Measured:
    """Validation figures as the run left them: of the finished bundle or, before the end, of the best epoch so far."""
    if run.metrics:
        return _Measured(run.metrics, "Measured on the finished bundle, with its calibration.", run.outputs)
    record = run.best.get("validation")
    if record is None:
        return _Measured(None, "No epoch has ended yet: there are no figures.")
    how = (
        f"Measured in training after epoch {run.best['epoch']}: without calibration, with thresholds of 0.5, and without intervals. "
        "There is no finished bundle."
    )
    return _Measured(record | {"num_images": record["emotion_known"] or None}, how)


def _from_data(folder: RunFolder, split: Split, overrides: Sequence[str], device: str) -> _Measured:
    """Load the bundle and measure it. What it was trained on is found by its provenance."""
    bundle = load_bundle(folder.place)
    dataset = open_for_bundle(bundle, data_config_for(bundle, overrides))
    on = choose_device(device)
    outputs = _concatenate(
        [split_outputs(bundle, dataset, one, device=on, progress=progress_bar) for one in SPLITS_OF[split]]
    )
    figures = evaluate_outputs(outputs, bundle.taxonomy, bundle.calibration)
    remarks = []
    trained_on = bundle.provenance.get("data_fingerprint")
    if dataset.fingerprint != trained_on:
        remarks.append(
            f"The data have changed since training, or are others: their fingerprint is {dataset.fingerprint}, training's was {trained_on}. "
            "Images of this split may have been trained on."
        )
    how = f"Measured on the finished bundle, with its calibration, on {' and '.join(SPLITS_OF[split])} images."
    return _Measured(figures, how, outputs, dataset, remarks)


def _concatenate(parts: Sequence[SplitOutputs]) -> SplitOutputs:
    return SplitOutputs(
        names=[name for part in parts for name in part.names],
        emotion=np.concatenate([part.emotion for part in parts]),
        action_units=np.concatenate([part.action_units for part in parts]),
        outputs=Outputs.concatenate([part.outputs for part in parts]),
    )


def _with_data(run: Evidence, overrides: Sequence[str], split: Split) -> Config:
    """The run's configuration with other places of its data, which validation figures have no use for beyond the store."""
    others = [text for text in overrides if not text.startswith("data.store_dir=")]
    if split == "validation" and others:
        raise UsageError(
            f"{others[0]!r}: validation figures are the run's own, measured on its own data. Give --split test to measure other data."
        )
    return build_config(apply_overrides(run.config.model_dump(mode="json"), overrides))


def _taxonomy(folder: RunFolder, run: Evidence) -> Taxonomy:
    """What is trained: as the bundle says or, without one, as the run's records do."""
    try:
        return read_taxonomy(folder.bundle)
    except RafceError:
        return run.taxonomy
