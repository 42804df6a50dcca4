"""All that a run's report shows, gathered from its folder and, for other splits than validation, measured on the data."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rafce_ray.base.console import finite, progress_bar
from rafce_ray.base.errors import RafceError, UsageError
from rafce_ray.base.hardware import choose_device
from rafce_ray.base.storage import locate
from rafce_ray.base.taxonomy import ACTION_UNIT_NAMES, Taxonomy, action_unit_code
from rafce_ray.bundle.bundle import load_bundle, read_taxonomy
from rafce_ray.bundle.evaluate import data_config_for, evaluate_outputs, open_for_bundle, split_outputs
from rafce_ray.config import Config, DataConfig, apply_overrides, build_config
from rafce_ray.data.loader import Dataset, open_dataset
from rafce_ray.data.store import META
from rafce_ray.doctor.evidence import Diagnosis, Evidence
from rafce_ray.doctor.rules import examine_run
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs, calibrated
from rafce_ray.report.slices import GroupTable, group_table, read_slices
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder

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


MAX_EMOTION_MISTAKES = 18
MAX_AU_MISTAKES = 12
THUMBNAIL_PX = 100
JPEG_QUALITY = 82


@dataclass(frozen=True)
class Mistake:
    """One image: its label, what was predicted and with what probability, and what the label was given.

    ``subject`` is the action unit that both speak of, empty where they are emotions.
    """

    name: str
    subject: str
    true: str
    predicted: str
    probability: float
    of_truth: float
    thumbnail: str | None = None


@dataclass(frozen=True)
class Mistakes:
    """The surest mistakes of each task, the surest first, and how many there are in all; ``why_no_images`` where there are none."""

    emotions: tuple[Mistake, ...]
    num_wrong_emotions: int
    action_units: tuple[Mistake, ...]
    num_wrong_action_units: int
    why_no_images: str = "Images were left out on request (--no-images)."

    def with_thumbnails(self, open_images: Callable[[], Dataset]) -> Mistakes:
        """The same with pictures; where the data cannot be opened, with the reason instead."""
        names = list(dict.fromkeys(one.name for one in (*self.emotions, *self.action_units)))
        if not names:
            return self
        try:
            dataset = open_images()
        except (RafceError, OSError) as error:
            return replace(self, why_no_images=f"There are no pictures here: {error}")
        row_of = {name: row for row, name in enumerate(dataset.names)}
        rows = np.array([row_of[name] for name in names if name in row_of], dtype=np.int64)
        pictures = dict(zip([name for name in names if name in row_of], dataset.images.gather(rows), strict=True))
        missing = len(names) - len(pictures)
        thumbnails = {name: _data_uri(pixels) for name, pixels in pictures.items()}

        def shown(mistakes: tuple[Mistake, ...]) -> tuple[Mistake, ...]:
            return tuple(replace(one, thumbnail=thumbnails.get(one.name)) for one in mistakes)

        return replace(
            self,
            emotions=shown(self.emotions),
            action_units=shown(self.action_units),
            why_no_images=f"{missing} of these images are not in the decoded store." if missing else "",
        )


def find_mistakes(split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration) -> Mistakes:
    """The most confident wrong emotions, and the action units decided wrongly whose probability is farthest from the truth.

    At most one action unit an image, so that one odd picture does not fill the list.
    """
    found = calibrated(split.outputs, calibration)
    emotions: list[Mistake] = []
    wrong: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    if taxonomy.num_emotions:
        predicted = found.emotion.argmax(axis=1)
        wrong = np.flatnonzero((split.emotion >= 0) & (predicted != split.emotion))
        surest = wrong[np.argsort(-found.emotion[wrong].max(axis=1), kind="stable")][:MAX_EMOTION_MISTAKES]
        emotions = [
            Mistake(
                name=split.names[row],
                subject="",
                true=taxonomy.emotions[split.emotion[row]],
                predicted=taxonomy.emotions[predicted[row]],
                probability=float(found.emotion[row].max()),
                of_truth=float(found.emotion[row, split.emotion[row]]),
            )
            for row in surest
        ]
    active = found.action_units >= np.array(calibration.au_thresholds)
    wrong_au = ~np.isnan(split.action_units) & (active != (split.action_units == 1))
    distance = np.where(wrong_au, np.abs(found.action_units - np.nan_to_num(split.action_units)), -1.0)
    action_units: list[Mistake] = []
    if taxonomy.num_action_units:
        farthest = distance.max(axis=1)
        rows = np.argsort(-farthest, kind="stable")[:MAX_AU_MISTAKES]
        action_units = [
            _au_mistake(split, found.action_units, taxonomy, int(row), int(distance[row].argmax()))
            for row in rows
            if farthest[row] >= 0
        ]
    return Mistakes(tuple(emotions), len(wrong), tuple(action_units), int(wrong_au.sum()))


def _au_mistake(
    split: SplitOutputs, probability: NDArray[np.floating], taxonomy: Taxonomy, row: int, column: int
) -> Mistake:
    number = taxonomy.action_units[column]
    is_present, of_present = split.action_units[row, column] == 1, float(probability[row, column])
    return Mistake(
        name=split.names[row],
        subject=f"{action_unit_code(number)} {ACTION_UNIT_NAMES.get(number, '')}".strip(),
        true="present" if is_present else "absent",
        predicted="absent" if is_present else "present",
        probability=1 - of_present if is_present else of_present,
        of_truth=of_present if is_present else 1 - of_present,
    )


def open_stored(
    data: DataConfig, provenance: dict[str, Any] | None, taxonomy: Taxonomy, store: str | None = None
) -> Dataset:
    """The run's decoded images, from ``store`` or from the store under ``data.store_dir`` that has the run's fingerprint.

    Nothing is decoded anew, and the original files are not looked at.

    Raises:
        RafceError: there is no such store.
    """
    fingerprint = (provenance or {}).get("data_fingerprint")
    if store is None:
        store = _find_store(data.store_dir, fingerprint)
    return open_dataset(store, taxonomy, data.null_policy, data.null_policy_in_evaluation)


def _find_store(store_dir: str, fingerprint: str | None) -> str:
    place = locate(store_dir)
    for info in place.list():
        meta = place / info.base_name / META
        try:
            if meta.exists() and json.loads(meta.read_bytes()).get("fingerprint") == fingerprint:
                return str(place / info.base_name)
        except (ValueError, OSError):
            continue
    raise RafceError(
        f"no decoded store in {place} has the run's fingerprint {fingerprint}. Name its folder with data.store_dir=FOLDER, or build it "
        "again with rafce evaluate."
    )


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
