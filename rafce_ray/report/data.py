"""The data of a run's report: its folder, other splits measured on the data, groups of images, and mistakes."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
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
from rafce_ray.data.label_file import csv_rows, find_name, open_text
from rafce_ray.data.loader import Dataset, open_dataset
from rafce_ray.data.store import META
from rafce_ray.doctor.evidence import Diagnosis, Evidence
from rafce_ray.doctor.rules import examine_run
from rafce_ray.metrics.calibration import Calibration, Outputs, SplitOutputs, calibrated
from rafce_ray.metrics.counts import evaluate_probabilities
from rafce_ray.run.folder import RunFolder
from rafce_ray.study.folder import StudyFolder

_LONG = ("name", "column", "value")


@dataclass(frozen=True)
class SliceFile:
    """Attributes of images ``names``: ``columns[attribute][image name]`` is a value; blank ones are left out."""

    place: str
    names: tuple[str, ...]
    columns: dict[str, dict[str, str]]


def read_slices(place: str) -> SliceFile:
    """Read a file of attributes: wide, a row an image, or long, with the columns name, column and value.

    Raises:
        UsageError: it cannot be read, or a line is not as the header says; the message names line and column.
    """
    rows = _rows(place)
    if not rows:
        raise UsageError(f"{place}: is empty. Expected a header such as name,age,gender and a row an image.")
    line, header = rows[0][0], [cell.strip() for cell in rows[0][1]]
    if (title := find_name(header, f"{place}:{line}")) is not None:
        header[title] = "name"
    _check_header(place, line, header)
    if len(rows) == 1:
        raise UsageError(f"{place}: holds a header and no row. Expected a row an image.")
    is_long = sorted(header) == sorted(_LONG)
    columns: dict[str, dict[str, str]] = {} if is_long else {name: {} for name in header if name != "name"}
    first_line: dict[tuple[str, str], int] = {}
    for line, cells in rows[1:]:
        if len(cells) != len(header):
            raise UsageError(
                f"{place}:{line}: {len(cells)} columns, but the header has {len(header)} ({', '.join(header)}). "
                "Give every row as many; put a value that holds a comma in double quotes."
            )
        values = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        name, column = values.pop("name"), values["column"] if is_long else ""
        if not name:
            raise UsageError(f"{place}:{line}: column 'name' is blank. Give the image's name.")
        if is_long and not column:
            raise UsageError(f"{place}:{line}: column 'column' is blank. Name the attribute.")
        if (name, column) in first_line:
            where, keep = (
                f"on line {first_line[name, column]} already",
                "Keep one." if is_long else "Keep one row an image.",
            )
            what = f"column 'column': {column!r} of {name!r}" if is_long else f"column 'name': {name!r}"
            raise UsageError(f"{place}:{line}: {what} is {where}. {keep}")
        first_line[name, column] = line
        for attribute, value in ({column: values["value"]} if is_long else values).items():
            of_attribute = columns.setdefault(attribute, {})
            if value:
                of_attribute[name] = value
    return SliceFile(place, tuple(dict.fromkeys(name for name, _ in first_line)), columns)


def _rows(place: str) -> list[tuple[int, list[str]]]:
    """Rows that are not blank, each with its first line."""
    file = locate(place)
    try:
        text = open_text(file.read_bytes(), file, "", key=None)
    except OSError as error:
        raise UsageError(f"{place}: cannot be read ({error.strerror or error}). Give the path of a CSV file.") from None
    rows = []
    for row in csv_rows(text, ","):
        if row.unsure:
            raise UsageError(f"{place}:{row.first}: the row {row.fault}. Remove the quote, or close it on its line.")
        if any(cell.strip() for cell in row.cells):
            rows.append((row.first, row.cells))
    return rows


def _check_header(place: str, line: int, header: list[str]) -> None:
    doubled = [name for name, count in Counter(header).items() if count > 1 and name]
    if doubled:
        raise UsageError(f"{place}:{line}: column {doubled[0]!r} is there twice. Name each column once.")
    if "name" not in header or len(header) < 2:
        raise UsageError(
            f"{place}:{line}: the header is {', '.join(map(repr, header))}. Expected comma-separated columns: name and "
            "at least one attribute, or name,column,value."
        )
    if "" in header:
        raise UsageError(f"{place}:{line}: column {header.index('') + 1} has no name. Name it, or take it out.")


MIN_GROUP = 30
"""Images that a group needs before its figures are shown: with fewer, accuracy is uncertain by 18 points or more."""

MAX_VALUES = 20
"""Distinct values, in the file, up to which a column makes groups; with more it is an identifier."""

MAX_NUMBERS = 10
"""Distinct numbers, in the file, up to which each is a group; more are cut into ranges."""

MIN_NUMBER_SHARE = 0.9
"""Share of numbers from which a column is numeric; its other values, such as NA, are groups next to the ranges."""

MAX_RANGES = 4


_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")
_IDENTIFIER = re.compile(r"(^|[^A-Za-z])id$", re.IGNORECASE)


def group_table(split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration, slices: SliceFile) -> dict[str, Any]:
    """Figures of every group of a split under a calibration, as ``rafce report --json`` gives them.

    Accuracy, macro-F1 over the classes that occur in the group, and mean F1 of the AUs that have positives in it, each
    with its bootstrap 95 % interval over the group's images; no figure of under MIN_GROUP labelled images. Of every
    column how its groups were made, or why there are none. ``without_image`` are the first names that are no image
    measured here.

    Raises:
        UsageError: the file names none of the images.
    """
    here, there = set(split.names), set(slices.names)
    unmatched = [name for name in slices.names if name not in here]
    if len(unmatched) == len(slices.names):
        raise UsageError(
            f"{slices.place}: column 'name': none of its {len(unmatched)} names ({unmatched[0]!r}, ...) is one of the "
            f"{len(here)} images measured ({split.names[0]!r}, ...). Write the names as the labels do."
        )

    def measure(value: str, rows: NDArray[np.bool_]) -> dict[str, Any]:
        return _measure(value, split.rows(rows), taxonomy, calibration)

    columns = []
    for name, values in slices.columns.items():
        found = [values.get(image) for image in split.names]
        members, remark = _groups(name, values.values(), found)
        groups = [measure(value, rows) for value, rows in members]
        columns.append({"column": name, "remark": remark, "images_without_value": found.count(None), "groups": groups})
    return {
        "file": slices.place,
        "names": len(slices.names),
        "names_without_image": len(unmatched),
        "without_image": unmatched[:3],
        "images_without_row": len(here - there),
        "overall": measure("all images", np.ones(len(split.names), dtype=bool)),
        "columns": columns,
    }


Members = list[tuple[str, NDArray[np.bool_]]]
"""Values with the mask (N,) of their images."""


def _groups(name: str, listed: Collection[str], found: Sequence[str | None]) -> tuple[Members, str]:
    """The groups of a column that lists some values, ``found`` of the images; and how they were made, or why not."""
    is_number = {value: bool(_NUMBER.fullmatch(value)) for value in listed}
    share = np.mean([is_number[value] for value in listed]) if listed else 0.0
    has_ranges = share >= MIN_NUMBER_SHARE and sum(is_number.values()) > MAX_NUMBERS
    # Each of these values would be a group.
    num_distinct = len(is_number) - (sum(is_number.values()) if has_ranges else 0)
    if all(value is None for value in found):
        return [], "left out: no image measured here has a value"
    if _IDENTIFIER.search(name):
        return [], f"left out: named as an identifier, {len(is_number)} distinct values"
    if num_distinct > MAX_VALUES:
        return [], f"left out: {num_distinct} distinct values are more than {MAX_VALUES}, as of an identifier"
    members, remark = _ranges(found) if has_ranges else ([], "")
    rest = {value for value in found if value is not None and not (has_ranges and is_number[value])}

    def place(value: str) -> tuple[bool, float, str]:
        return not is_number[value], float(value) if is_number[value] else 0.0, value.casefold()

    return members + [(value, np.array([one == value for one in found])) for value in sorted(rest, key=place)], remark


def _ranges(found: Sequence[str | None]) -> tuple[Members, str]:
    """Ranges cut near the quantiles of the images: MAX_RANGES, or fewer so that each has MIN_GROUP, but at least 2."""
    numbers = np.array([float(one) if one is not None and _NUMBER.fullmatch(one) else np.nan for one in found])
    known = numbers[~np.isnan(numbers)]
    if not len(known):
        return [], ""
    num_ranges = min(MAX_RANGES, max(2, len(known) // MIN_GROUP))
    distinct, counts = np.unique(known, return_counts=True)
    # Equal numbers stay together, so a cut goes where the count below it is nearest to the quantile.
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    nearest = [int(np.abs(below - len(known) * part / num_ranges).argmin()) for part in range(1, num_ranges)]
    edges = distinct[np.unique(nearest)]
    range_of = np.where(np.isnan(numbers), -1, np.searchsorted(edges, numbers, side="right"))
    members = []
    for number in np.unique(range_of[range_of >= 0]):
        rows = range_of == number
        low, high = numbers[rows].min(), numbers[rows].max()
        members.append((f"{low:g}" if low == high else f"{low:g} to {high:g}", rows))
    return members, f"numbers, cut at quantiles of these images into {len(members)} ranges"


def _measure(value: str, part: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration) -> dict[str, Any]:
    num_images, figures = len(part.names), {}
    if num_images >= MIN_GROUP:
        found = calibrated(part.outputs, calibration)
        measured = finite(evaluate_probabilities(found, part, taxonomy, calibration.au_thresholds))
        with_emotion = int((part.emotion >= 0).sum()) if taxonomy.num_emotions else 0
        with_units = int((~np.isnan(part.action_units)).any(axis=1).sum())
        labelled = {"accuracy": with_emotion, "macro_f1": with_emotion, "au_f1_mean": with_units}
        shown = [name for name, count in labelled.items() if count >= MIN_GROUP]
        figures = {name: {"value": measured[name], "interval": measured["intervals"][name]} for name in shown}
    return {"value": value, "images": num_images, "hidden": num_images < MIN_GROUP, "figures": figures}


Split = Literal["validation", "test", "held-out"]
SPLITS_OF: dict[str, tuple[str, ...]] = {
    "validation": ("validation",),
    "test": ("test",),
    "held-out": ("validation", "test"),
}
"""Choices of ``--split`` and the data splits that each is made of."""


@dataclass(frozen=True)
class ReportData:
    """A run as its report shows it; ``figures`` is None where nothing was measured. All numbers are finite or None.

    ``measured`` says in words how the figures were made. ``remarks`` come first on the page.
    """

    run: Evidence
    split: Split
    taxonomy: Taxonomy
    figures: dict[str, Any] | None
    measured: str
    calibration: Calibration | None
    mistakes: Mistakes | None
    groups: dict[str, Any] | None
    diagnoses: tuple[Diagnosis, ...]
    remarks: tuple[str, ...] = ()

    @property
    def cross_fitted(self) -> dict[str, Any] | None:
        """Calibration measured on images that it was not fitted on; only of validation."""
        return None if self.figures is None else self.figures.get("cross_fitted")


@dataclass
class _Measured:
    """A split's figures and raw outputs, how they were measured, and the data, if they were opened."""

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
    """Everything for the page.

    ``slices``: a CSV of attributes; ``images=False`` reads no pixel; ``store``: where the decoded images are, by
    default the one with the run's fingerprint under ``data.store_dir``; ``overrides``: ``data.key=value`` where the
    data have moved.

    Raises:
        UsageError: there is no run here, it lacks what the arguments need, or the slices file is malformed.
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
        if images:
            mistakes = mistakes.with_thumbnails(
                lambda: measured.dataset or open_stored(run.config.data, run.provenance, taxonomy, store)
            )
    elif slice_file is not None:
        lacks = "--slices needs the finished model's outputs, and the run has none"
        raise UsageError(f"{folder.location}: {lacks}. Finish it, or leave --slices out.")
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
            f"{folder.location}: is a study of {len(names)} trials. Give one of them, for example "
            f"{study.trial(names[0]).location}."
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
        f"Measured in training after epoch {run.best['epoch']}: without calibration, with thresholds of 0.5, and "
        "without intervals. There is no finished bundle."
    )
    return _Measured(record | {"num_images": record["emotion_known"] or None}, how)


def _from_data(folder: RunFolder, split: Split, overrides: Sequence[str], device: str) -> _Measured:
    """Load the bundle and measure it; its provenance identifies the data that it was trained on."""
    bundle = load_bundle(folder.place)
    dataset = open_for_bundle(bundle, data_config_for(bundle, overrides))
    on = choose_device(device)
    parts = [split_outputs(bundle, dataset, one, device=on, progress=progress_bar) for one in SPLITS_OF[split]]
    outputs = SplitOutputs(
        names=[name for part in parts for name in part.names],
        emotion=np.concatenate([part.emotion for part in parts]),
        action_units=np.concatenate([part.action_units for part in parts]),
        outputs=Outputs.concatenate([part.outputs for part in parts]),
    )
    figures = evaluate_outputs(outputs, bundle.taxonomy, bundle.calibration)
    remarks = []
    trained_on = bundle.provenance.get("data_fingerprint")
    if dataset.fingerprint != trained_on:
        remarks.append(
            f"The data have changed since training, or are others: their fingerprint is {dataset.fingerprint}, "
            f"training's was {trained_on}. Images of this split may have been trained on."
        )
    how = f"Measured on the finished bundle, with its calibration, on {' and '.join(SPLITS_OF[split])} images."
    return _Measured(figures, how, outputs, dataset, remarks)


def _with_data(run: Evidence, overrides: Sequence[str], split: Split) -> Config:
    """The run's configuration with other places of its data; of these, validation figures use the store only."""
    others = [text for text in overrides if not text.startswith("data.store_dir=")]
    if split == "validation" and others:
        raise UsageError(
            f"{others[0]!r}: validation figures are the run's own, measured on its own data. Give --split test to "
            "measure other data."
        )
    return build_config(apply_overrides(run.config.model_dump(mode="json"), overrides))


def _taxonomy(folder: RunFolder, run: Evidence) -> Taxonomy:
    """The taxonomy of the bundle or, without one, of the run's records."""
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
    """One image: its label, the prediction, and the probabilities of the prediction and of the label.

    ``subject`` is the action unit that was decided, empty for emotions.
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
    """The most confident mistakes of each task and how many there are; ``why_no_images`` if they have no pictures."""

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
        wanted = set(names)
        row_of = {name: row for row, name in enumerate(dataset.names) if name in wanted}
        pictures = dataset.images.gather(np.array(list(row_of.values()), dtype=np.int64))
        thumbnails = dict(zip(row_of, map(_data_uri, pictures), strict=True))
        missing = len(names) - len(thumbnails)
        emotions, action_units = (
            tuple(replace(one, thumbnail=thumbnails.get(one.name)) for one in mistakes)
            for mistakes in (self.emotions, self.action_units)
        )
        why = f"{missing} of these images are not in the decoded store." if missing else ""
        return replace(self, emotions=emotions, action_units=action_units, why_no_images=why)


def find_mistakes(split: SplitOutputs, taxonomy: Taxonomy, calibration: Calibration) -> Mistakes:
    """The most confident wrong emotions, and the wrong action units whose probability is farthest from the truth.

    At most one action unit an image, so that one unusual picture does not fill the list.
    """
    found = calibrated(split.outputs, calibration)
    names, emotions = taxonomy.emotions, list[Mistake]()
    wrong: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    if taxonomy.num_emotions:
        predicted = found.emotion.argmax(axis=1)
        wrong = np.flatnonzero((split.emotion >= 0) & (predicted != split.emotion))
        surest = wrong[np.argsort(-found.emotion[wrong].max(axis=1), kind="stable")][:MAX_EMOTION_MISTAKES]
        emotions = [
            Mistake(split.names[row], "", names[true], names[said], *found.emotion[row, [said, true]].tolist())
            for row, true, said in zip(surest, split.emotion[surest], predicted[surest], strict=True)
        ]
    active = found.action_units >= np.array(calibration.au_thresholds)
    wrong_au = ~np.isnan(split.action_units) & (active != (split.action_units == 1))
    distance = np.where(wrong_au, np.abs(found.action_units - np.nan_to_num(split.action_units)), -1.0)
    farthest = distance.max(axis=1, initial=-1.0)
    action_units = [
        _au_mistake(split, found.action_units, taxonomy, int(row), int(distance[row].argmax()))
        for row in np.argsort(-farthest, kind="stable")[:MAX_AU_MISTAKES]
        if farthest[row] >= 0
    ]
    return Mistakes(tuple(emotions), len(wrong), tuple(action_units), int(wrong_au.sum()))


def _au_mistake(
    split: SplitOutputs, probability: NDArray[np.floating], taxonomy: Taxonomy, row: int, column: int
) -> Mistake:
    number, of_present = taxonomy.action_units[column], float(probability[row, column])
    subject = f"{action_unit_code(number)} {ACTION_UNIT_NAMES.get(number, '')}".strip()
    if split.action_units[row, column] == 1:
        return Mistake(split.names[row], subject, "present", "absent", 1 - of_present, of_present)
    return Mistake(split.names[row], subject, "absent", "present", of_present, 1 - of_present)


def open_stored(
    data: DataConfig, provenance: dict[str, Any] | None, taxonomy: Taxonomy, store: str | None = None
) -> Dataset:
    """The run's decoded images, from ``store`` or the store under ``data.store_dir`` with the run's fingerprint.

    Nothing is decoded again, and the original files are not read.

    Raises:
        RafceError: there is no such store.
    """
    store = store or _find_store(data.store_dir, (provenance or {}).get("data_fingerprint"))
    return open_dataset(store, taxonomy, data.null_policy, data.null_policy_in_evaluation)


def _find_store(store_dir: str, fingerprint: str | None) -> str:
    place = locate(store_dir)
    for info in place.list():
        meta = place / info.base_name / META
        # A store that cannot be read is not the one.
        with contextlib.suppress(ValueError, OSError):
            if meta.exists() and json.loads(meta.read_bytes()).get("fingerprint") == fingerprint:
                return str(place / info.base_name)
    raise RafceError(
        f"no decoded store in {place} has the run's fingerprint {fingerprint}. Name its folder with "
        "data.store_dir=FOLDER, or build it again with rafce evaluate."
    )


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
