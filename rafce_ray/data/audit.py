"""What is in a dataset, what is wrong with it, and whether it may be trained on."""

from __future__ import annotations

import json
import os
import shlex
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from rafce_ray.base.console import LEVEL_STYLES, printable
from rafce_ray.base.errors import LEVELS, Evidence, Finding, GateError, Level
from rafce_ray.base.taxonomy import (
    PERHAPS_UNKNOWN_WORDS,
    RAFCE_EMOTIONS,
    SEED18,
    UNKNOWN_WORDS,
    Taxonomy,
    action_unit_code,
    label_key,
    parse_action_unit_token,
)
from rafce_ray.config import DataConfig
from rafce_ray.data import label_file
from rafce_ray.data.audit_images import image_findings
from rafce_ray.data.labels import in_label_order, read_labels, resolve_targets, resolve_taxonomy
from rafce_ray.data.records import (
    MAX_UNREADABLE_SHARE,
    SPLITS,
    Labels,
    NearImage,
    Progress,
    Targets,
    counted,
    evidence_of,
)


@dataclass(frozen=True)
class Case:
    """What every check looks at.

    ``usable`` (N,) bool marks train rows that have an image. ``train_known`` and ``train_positives`` (A,) int64 count
    the known and the present action units of these rows.
    """

    labels: Labels
    taxonomy: Taxonomy
    targets: Targets
    data: DataConfig
    usable: npt.NDArray[np.bool_]
    train_known: npt.NDArray[np.int64]
    train_positives: npt.NDArray[np.int64]

    @property
    def has_rafce_classes(self) -> bool:
        """Whether layout and classes are RAF-CE's, so that its published counts say what is natural."""
        return self.labels.layout == "rafce" and self.taxonomy.emotions == tuple(RAFCE_EMOTIONS)

    @property
    def all_images_missing(self) -> bool:
        """Whether no row has an image. That alone is refused; its consequences are not reported."""
        paths = self.labels.table["image_path"]
        return len(paths) > 0 and paths.null_count == len(paths)

    def split_sizes(self) -> dict[str, int]:
        """Labelled rows per split."""
        return {split: int((self.targets.split == code).sum()) for code, split in enumerate(SPLITS)}

    def rows(
        self, mask: npt.NDArray[np.bool_], file: str | None, line_column: str, value_column: str | None
    ) -> tuple[Evidence, ...]:
        """Evidence for the label rows marked in ``mask`` (N,) bool, with their line."""
        table = self.labels.table
        return evidence_of(
            Evidence(
                str(table["name"][row].as_py()) + (f": {table[value_column][row].as_py()!r}" if value_column else ""),
                file,
                table[line_column][row].as_py(),
            )
            for row in np.flatnonzero(mask).tolist()
        )


def count_action_units(
    action_units: npt.NDArray[np.float32], rows: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Known and positive elements per action unit, (A,) int64 each, among the rows (N,) bool of targets (N, A)."""
    # Column by column: copies of the whole matrix would show in the memory of large datasets.
    known = [np.count_nonzero(~np.isnan(values[rows])) for values in action_units.T]
    positives = [np.count_nonzero(values[rows] == 1) for values in action_units.T]
    return np.array(known, np.int64), np.array(positives, np.int64)


def tokens_outside(token_counts: Mapping[str, int], taxonomy: Taxonomy) -> dict[str, int]:
    """Action-unit tokens, as written, that are readable but not in the vocabulary, the most frequent first."""
    numbers = {token: parse_action_unit_token(token) for token in token_counts}
    outside = [token for token, one in numbers.items() if one is not None and one not in taxonomy.action_units]
    return {token: token_counts[token] for token in sorted(outside, key=lambda token: (-token_counts[token], token))}


def value_counts(column: pa.ChunkedArray) -> list[tuple[str, int]]:
    """Distinct values that are not null, with their counts, the most frequent first."""
    counts = pc.value_counts(pc.drop_null(column)).to_pylist()
    return sorted(((item["values"], item["counts"]) for item in counts), key=lambda pair: -pair[1])


def audit_command(data: DataConfig, root: str | None = None, **changed: str) -> str:
    """The command that audits the data as they are read here; ``root``: where they are, unless ``data.root`` says it.

    ``changed``: keys of the section ``data`` to add, with their text.
    """
    keys = ("layout", "images", "encoding", "au_threshold")
    given = {key: getattr(data, key) for key in keys if getattr(data, key) != DataConfig.model_fields[key].default}
    given |= changed
    return shlex.join(["rafce", "data", "audit", root or str(data.root), *(f"data.{k}={v}" for k, v in given.items())])


MIN_CLASS_IMAGES = 10
"""A class with fewer images in a split is pointed out."""

WITHOUT_SPLITS = ("no_split_column", "no_split_folders", "no_partition_file")
"""Refusals of a dataset of which no image is in a split."""

_MAX_MISSING_SHARE = 0.05


def label_findings(labels: Labels, taxonomy: Taxonomy, targets: Targets, data: DataConfig) -> list[Finding]:
    """All findings of labels and file names that reading them did not report."""
    has_image = np.asarray(pc.is_valid(labels.table["image_path"]))
    usable = (targets.split == SPLITS.index("train")) & has_image
    case = Case(labels, taxonomy, targets, data, usable, *count_action_units(targets.action_units, usable))
    checks: tuple[Callable[[Case], Iterator[Finding]], ...] = (
        _check_tasks,
        _check_splits,
        _check_known_sizes,
        _check_files,
        _check_emotions,
        _check_spellings,
        _check_number_of_classes,
        _check_class_sizes,
        _check_targets,
        _check_unreadable,
        _check_vocabulary,
        _check_each,
        _check_token_shapes,
    )
    if any(finding.code in WITHOUT_SPLITS for finding in labels.findings):
        # The other checks look at splits.
        checks = (_check_tasks, _check_files)
    return [finding for check in checks for finding in check(case)]


def _check_tasks(case: Case) -> Iterator[Finding]:
    labels, taxonomy = case.labels, case.taxonomy
    if not taxonomy.emotions and not taxonomy.action_units:
        remedy = "Set data.emotions or data.action_units to what the labels contain."
        yield Finding("refusal", "nothing_to_train", "there is neither an emotion nor an action unit to train", remedy)
        return
    if not labels.has_emotions:
        level: Level = "warning" if isinstance(case.data.emotions, tuple) else "info"
        yield Finding(level, "action_units_only", "there are no emotion labels: action units are trained alone")
    if not labels.has_action_units:
        level = "warning" if isinstance(case.data.action_units, tuple) else "info"
        yield Finding(level, "emotions_only", "there are no action-unit labels: emotions are trained alone")


def _check_splits(case: Case) -> Iterator[Finding]:
    sizes = case.split_sizes()
    evidence = tuple(Evidence(f"{split}: {size} rows") for split, size in sizes.items())
    if not case.usable.any() and case.labels.table["image_path"].null_count < case.labels.table.num_rows:
        remedy = "Assign images to train."
        yield Finding("refusal", "no_train_images", "no image is in the train split", remedy, 1, evidence)
    if not sizes["validation"]:
        message = "no image is in the validation split: the best epoch cannot be chosen"
        yield Finding("error", "no_validation_images", message, "Assign images to validation.", 1, evidence)
    if not sizes["test"]:
        yield Finding("info", "no_test_images", "no image is in the test split", "", 1, evidence)
    if 0 < sizes["train"] < max(sizes.values()):
        message = "train is not the largest split: the partition codes look swapped"
        remedy = "In RAF-CE's files 0 is train, 1 test and 2 validation."
        yield Finding("warning", "partitions_look_swapped", message, remedy, 1, evidence)


def _check_known_sizes(case: Case) -> Iterator[Finding]:
    """Compare with the published sizes, where the dataset is RAF-CE by its classes and its size."""
    sizes, known = case.split_sizes(), label_file.SPLIT_SIZES
    close_in_size = abs(case.labels.table.num_rows - label_file.NUM_LABELLED) <= 0.02 * label_file.NUM_LABELLED
    two_match = len(set(sizes.values()) & set(known.values())) >= 2
    if not case.has_rafce_classes or not (close_in_size or two_match) or sizes == known:
        return
    evidence = tuple(Evidence(f"{split}: {sizes[split]} rows, RAF-CE has {known[split]}") for split in SPLITS)
    swapped = abs(sizes["test"] - known["validation"]) + abs(sizes["validation"] - known["test"])
    straight = abs(sizes["test"] - known["test"]) + abs(sizes["validation"] - known["validation"])
    if swapped < straight and sizes["train"] == max(sizes.values()):
        message = "test and validation have each other's size: the partition codes look swapped"
        remedy = "In RAF-CE's files 1 is test (909 images) and 2 validation (931)."
        yield Finding("warning", "partitions_look_swapped", message, remedy, 1, evidence)
        return
    remedy = "Compare the label files with the published ones."
    yield Finding("warning", "split_sizes_differ", "the split sizes are not RAF-CE's", remedy, 1, evidence)


def _check_files(case: Case) -> Iterator[Finding]:
    labels = case.labels
    paths = labels.table["image_path"]
    num_missing = paths.null_count
    if num_missing:
        missing = np.asarray(pc.is_null(paths))
        share = num_missing / len(paths)
        level: Level = "refusal" if num_missing == len(paths) else "error" if share > _MAX_MISSING_SHARE else "warning"
        message = f"{num_missing} of {len(paths)} labelled images are missing from {labels.image_root}"
        line_column = "emotion_line" if labels.has_emotions else "au_line"
        evidence = case.rows(missing, labels.emotion_file or labels.au_file, line_column, None)
        remedy = "Add the images, or name their folder with data.images=FOLDER."
        if near := labels.near_images:
            kinds = Counter(image.difference for image in near.values())
            alike = ", ".join(f"{number} {difference}" for difference, number in kinds.items())
            message += f"; files of nearly these names lie there: {alike}"
            found = [item for item in evidence if item.detail in near]
            shown = [replace(item, detail=f"{item.detail}: {near[item.detail].path} is there") for item in found]
            evidence = (*shown, *(item for item in evidence if item.detail not in near))
            remedy = _near_remedy(case, near)
        yield Finding(level, "missing_images", message, remedy, num_missing, evidence)
    if labels.num_extra_images:
        message = f"{labels.num_extra_images} images have no label row and are not used"
        yield Finding("info", "extra_images", message, "", labels.num_extra_images)


def _near_remedy(case: Case, near: dict[str, NearImage]) -> str:
    """The command that sets the images' folder, where only that differs; else the advice to correct the names."""
    folders = {os.path.split(image.path)[0] for image in near.values()}
    if {image.difference for image in near.values()} == {"in another folder"} and len(folders) == 1:
        [folder] = folders
        if folder and not any("/" in name or "\\" in name for name in near):
            return f"Name their folder: {audit_command(case.data, images=folder)}"
    return "Write the names as the files are named, relative to the folder of images; or rename the files."


def _check_emotions(case: Case) -> Iterator[Finding]:
    labels, taxonomy = case.labels, case.taxonomy
    if not taxonomy.emotions:
        return
    written = labels.table["emotion"]
    words = UNKNOWN_WORDS | PERHAPS_UNKNOWN_WORDS
    says_unknown = pa.array([text for text, _ in value_counts(written) if label_key(text) in words], pa.string())
    is_unknown = (case.targets.emotion < 0) & np.asarray(pc.is_in(written, says_unknown))
    num_written = len(written) - written.null_count - int(is_unknown.sum())
    unknown = np.asarray(pc.is_valid(written)) & (case.targets.emotion < 0) & ~is_unknown
    yield from _unknown_findings(case, is_unknown)
    if unknown.any():
        count = int(unknown.sum())
        share = count / num_written
        few = taxonomy.num_emotions <= 4
        names = ", ".join(taxonomy.emotions) if few else f"the {taxonomy.num_emotions} of the taxonomy"
        level: Level = "refusal" if share > MAX_UNREADABLE_SHARE else "warning"
        labels_found = f"{count} of {num_written} emotion labels ({share:.1%})"
        message = f"{labels_found} name no known class; these emotions are unknown"
        remedy = f"Known are {names}, or their numbers from 0. Set data.emotions=[...] if the dataset has others."
        evidence = case.rows(unknown, labels.emotion_file, "emotion_line", "emotion")
        yield Finding(level, "unknown_classes", message, remedy, count, evidence)
    if not (case.targets.emotion[case.usable] >= 0).any() and not case.all_images_missing:
        message = "there are emotion labels, but no train image has a known one"
        remedy = "Check data.emotions and the split column; data.emotions=none leaves the task out."
        evidence = tuple(Evidence(f"{count} rows say {text!r}") for text, count in value_counts(written)[:10])
        yield Finding("refusal", "no_emotion_targets", message, remedy, 1, evidence)
    codes = {int(text) for text, _ in value_counts(written) if text.isdecimal()}
    are_names = not set(map(str, codes)).isdisjoint(taxonomy.emotions)
    if codes and not are_names and (min(codes), max(codes)) == (1, taxonomy.num_emotions):
        message = f"class numbers run from 1 to {max(codes)}: they look as if they started at 1, not at 0"
        yield Finding("error", "classes_look_one_based", message, "Subtract 1 from every class number.")


def _unknown_findings(case: Case, is_unknown: npt.NDArray[np.bool_]) -> Iterator[Finding]:
    """Words that stand for no label. A word that may also be a class is refused if data.emotions lists no classes."""
    counts = value_counts(case.labels.table["emotion"].filter(pa.array(is_unknown)))
    may_be_class = [(text, count) for text, count in counts if label_key(text) in PERHAPS_UNKNOWN_WORDS]
    if case.data.emotions != "auto" or case.taxonomy.emotions == tuple(RAFCE_EMOTIONS):
        may_be_class = []
    if may_be_class:
        classes = _class_names(case)
        with_them = _with_emotions(case, in_label_order([*classes, *(text for text, _ in may_be_class)]))
        remedy = f"If it is unknown: `{_with_emotions(case, classes)}`. If it is a class: `{with_them}`."
        meaning = "that may be a class, or say that the emotion is unknown"
        yield _words_finding(case, may_be_class, "refusal", "class_or_unknown", meaning, remedy)
    if sure := [pair for pair in counts if pair not in may_be_class]:
        remedy = "If that is a class, list it in data.emotions."
        yield _words_finding(case, sure, "info", "emotions_unknown", "read as unknown", remedy)


def _words_finding(
    case: Case, words: list[tuple[str, int]], level: Level, code: str, meaning: str, remedy: str
) -> Finding:
    total = sum(count for _, count in words)
    listed = repr(words[0][0]) if len(words) == 1 else ", ".join(f"{text!r} ({count})" for text, count in words)
    message = f"{counted(total, 'emotion label')} {'says' if total == 1 else 'say'} {listed}: {meaning}"
    mask = np.asarray(pc.is_in(case.labels.table["emotion"], pa.array([text for text, _ in words])))
    evidence = case.rows(mask, case.labels.emotion_file, "emotion_line", "emotion")
    return Finding(level, code, message, remedy, total, evidence)


def _with_emotions(case: Case, names: list[str]) -> str:
    """The command that audits the data with these classes. Training takes the same option."""
    return audit_command(case.data, emotions=json.dumps(names, ensure_ascii=False))


def _spellings(case: Case) -> dict[str, list[tuple[str, int]]]:
    """Spellings of each class with their counts, the most frequent first, by :func:`label_key`."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for text, count in value_counts(case.labels.table["emotion"]):
        if label_key(text) not in UNKNOWN_WORDS | PERHAPS_UNKNOWN_WORDS:
            groups.setdefault(label_key(text), []).append((text, count))
    return groups


def _class_names(case: Case) -> list[str]:
    """The classes of the labels as they would be listed, each in its most frequent spelling."""
    return in_label_order(spellings[0][0] for spellings in _spellings(case).values())


def _check_spellings(case: Case) -> Iterator[Finding]:
    """Class names that differ only as spellings do: classes of their own where nothing says that they are one."""
    if case.data.emotions != "auto" or not case.taxonomy.emotions or case.taxonomy.emotions == tuple(RAFCE_EMOTIONS):
        return
    several = [spellings for spellings in _spellings(case).values() if len(spellings) > 1]
    if not several:
        return
    table = case.labels.table
    evidence = []
    for spellings in several:
        first = pc.index(table["emotion"], spellings[-1][0]).as_py()
        # Combining marks and no-break spaces cannot be seen in an editor: they are shown as codes.
        shown = [
            (f"'{text}'" if text == unicodedata.normalize("NFKC", text) else ascii(text), counted(count, "row"))
            for text, count in spellings
        ]
        detail = ", ".join(f"{text} ({rows})" for text, rows in shown)
        evidence.append(Evidence(detail, case.labels.emotion_file, table["emotion_line"][first].as_py()))
    names = "; ".join(item.detail for item in evidence[:3])
    message = f"classes with more than one spelling: {names}" + ("; ..." if len(several) > 3 else "")
    as_one = _with_emotions(case, _class_names(case))
    apart = _with_emotions(case, list(case.taxonomy.emotions))
    remedy = f"To train each as one class: `{as_one}`. To keep them apart: `{apart}`."
    yield Finding("refusal", "spellings_of_classes", message, remedy, len(several), tuple(evidence))


def _check_number_of_classes(case: Case) -> Iterator[Finding]:
    """Refuse a single class: there is nothing to learn."""
    known = case.targets.emotion[case.usable & (case.targets.emotion >= 0)]
    if len(np.unique(known)) != 1:
        return
    name = case.taxonomy.emotions[int(known[0])]
    message = f"all {len(known)} train images with a known emotion say {name!r}: there is nothing to learn"
    remedy = "Add images of other classes to the train split"
    if case.train_positives.any():
        remedy += "; to train the action units alone: data.emotions=none"
    counts = value_counts(case.labels.table["emotion"])[:10]
    evidence = tuple(Evidence(f"{counted(count, 'row')} of all splits: {text!r}") for text, count in counts)
    yield Finding("refusal", "one_class", message, f"{remedy}.", 1, evidence)


def _check_class_sizes(case: Case) -> Iterator[Finding]:
    """Small classes: worth knowing; a warning where the class should be larger, or where nothing is known of it."""
    sizes = case.split_sizes()
    few: dict[Level, list[tuple[str, str, int]]] = {"info": [], "warning": []}
    for code, split in enumerate(SPLITS):
        if not sizes[split]:
            continue
        known = case.targets.emotion[(case.targets.split == code) & (case.targets.emotion >= 0)]
        for label, count in enumerate(np.bincount(known, minlength=case.taxonomy.num_emotions).tolist()):
            if count >= MIN_CLASS_IMAGES:
                continue
            level: Level = "warning" if split == "train" else "info"
            if case.has_rafce_classes:
                expected = label_file.CLASS_COUNTS[split][label] * sizes[split] / label_file.SPLIT_SIZES[split]
                level = "warning" if label_file.is_surprisingly_few(count, expected) else "info"
            few[level].append((split, case.taxonomy.emotions[label], count))
    for level, found in few.items():
        if found:
            evidence = tuple(Evidence(f"{split}: {count} images of {name}") for split, name, count in found)
            classes = f"{len({name for _, name, _ in found})} of {case.taxonomy.num_emotions} classes"
            splits = " or ".join(dict.fromkeys(split for split, _, _ in found))
            message = f"{classes} have under {MIN_CLASS_IMAGES} images in {splits}: their figures mean little"
            remedy = "Add images of these classes, or look at macro-F1 over supported classes."
            yield Finding(level, "classes_under_10", message, remedy, len(evidence), evidence)


def _check_targets(case: Case) -> Iterator[Finding]:
    labels, data = case.labels, case.data
    if not labels.has_action_units or data.action_units == "none":
        return
    if not case.taxonomy.action_units:
        positives = f"{data.min_train_positives} train positives"
        wanted = positives if data.action_units == "auto" else "a column in the table"
        message = f"no action unit of the vocabulary {data.action_units!r} has {wanted}"
        remedy = "Set data.action_units to a list, to auto with a lower data.min_train_positives, or to none."
        yield Finding("refusal", "no_action_unit_positives", message, remedy)
        return
    if case.train_positives.any() or case.all_images_missing:
        return
    evidence = _unreadable(labels)
    evidence += [Evidence(f"{count} rows are {state}") for state, count in value_counts(labels.table["au_state"])]
    message = "there are action-unit labels, but no train image has a positive one: there is nothing to learn"
    written = "how the labels are written (1+4+25 in RAF-CE's file; 1, 0 or blank in a table)"
    remedy = f"Check {written} and data.action_units; data.action_units=none leaves the task out."
    yield Finding("refusal", "no_action_unit_positives", message, remedy, 1, tuple(evidence))


def _unreadable(labels: Labels) -> list[Evidence]:
    """Where reading found action-unit labels that it could not read."""
    found = (finding for finding in labels.findings if finding.code == "unreadable_action_units")
    return [evidence for finding in found for evidence in finding.evidence]


def _check_unreadable(case: Case) -> Iterator[Finding]:
    """Refuse where more than one in a hundred labels that say something cannot be read."""
    labels = case.labels
    if case.data.action_units == "none":
        return
    states = dict(value_counts(labels.table["au_state"]))
    unreadable = states.get("unreadable", 0)
    labelled = unreadable + states.get("full", 0) + states.get("partial", 0)
    if not labelled or unreadable / labelled <= MAX_UNREADABLE_SHARE:
        return
    mask = np.asarray(pc.equal(labels.table["au_state"], "unreadable"))
    evidence = tuple(_unreadable(labels)) or case.rows(mask, labels.au_file, "au_line", None)
    rows = f"{unreadable} of {labelled} non-null action-unit rows ({unreadable / labelled:.1%})"
    message = f"{rows} cannot be read; at most {MAX_UNREADABLE_SHARE:.0%} may be"
    remedy = label_file.HOW_TO_WRITE_ACTION_UNITS
    yield Finding("refusal", "too_many_unreadable_action_units", message, remedy, unreadable, evidence)


def _check_vocabulary(case: Case) -> Iterator[Finding]:
    labels, taxonomy, data = case.labels, case.taxonomy, case.data
    if not taxonomy.action_units:
        return
    chosen = data.action_units if isinstance(data.action_units, tuple) else ()
    wanted = SEED18 if data.action_units == "seed18" else chosen
    left_out = [number for number in wanted if number not in taxonomy.action_units]
    if left_out:
        level: Level = "info" if data.action_units == "seed18" else "warning"
        message = f"no column for {', '.join(map(action_unit_code, left_out))}: left out of the vocabulary"
        yield Finding(level, "action_units_without_column", message, "", len(left_out))
    if outside := tokens_outside(labels.token_counts, taxonomy):
        evidence = evidence_of(Evidence(f"{token}: {count}") for token, count in outside.items())
        message = f"{sum(outside.values())} action-unit tokens of {len(outside)} kinds are outside the vocabulary"
        remedy = f"data.action_units=auto takes every action unit with {data.min_train_positives} train positives."
        # The makers of a table chose its columns: each one that is left out is reported.
        enough = max(outside.values()) >= data.min_train_positives
        level = "warning" if enough and labels.layout == "table" and not chosen else "info"
        yield Finding(level, "tokens_outside_vocabulary", message, remedy, sum(outside.values()), evidence)


def _check_each(case: Case) -> Iterator[Finding]:
    if not case.train_positives.any():
        return
    never: dict[Level, list[Evidence]] = {"info": [], "warning": []}
    always = []
    num_reference = label_file.SPLIT_SIZES["train"] - label_file.NUM_NULL_TRAIN
    for number, count, num_known in zip(
        case.taxonomy.action_units, case.train_positives.tolist(), case.train_known.tolist(), strict=True
    ):
        code = action_unit_code(number)
        if count == 0:
            level: Level = "warning"
            if case.has_rafce_classes and case.data.action_units == "seed18":
                expected = label_file.TRAIN_POSITIVES.get(number, 0) * num_known / num_reference
                level = "warning" if label_file.is_surprisingly_few(0, expected) else "info"
            never[level].append(Evidence(f"{code}: 0 of {num_known} known train rows"))
        elif count == num_known:
            always.append(Evidence(f"{code}: all {num_known} known train rows"))
    for level, evidence in never.items():
        if evidence:
            message = f"{len(evidence)} action units of the vocabulary have no positive in train and cannot be learned"
            remedy = "Leave them out: data.action_units=auto, or a list."
            yield Finding(level, "action_units_without_positives", message, remedy, len(evidence), tuple(evidence))
    if always:
        present = f"{len(always)} action units are present in every known train row"
        message = f"{present}: the model would learn to always say yes"
        remedy = "If null means that none is there, set data.null_policy=negative; else leave them out."
        yield Finding("warning", "action_units_without_negatives", message, remedy, len(always), tuple(always))


def _check_token_shapes(case: Case) -> Iterator[Finding]:
    """Tokens that are more than a number: read as their base action unit, and counted."""
    if case.labels.layout != "rafce":
        return
    counts = Counter(case.labels.token_counts)
    shaped = [token for token in counts if not token.isdecimal() and parse_action_unit_token(token) is not None]
    if total := sum(counts[token] for token in shaped):
        shown = sorted(shaped, key=lambda token: -counts[token])
        evidence = evidence_of(Evidence(f"{token}: {counts[token]}") for token in shown)
        message = f"{total} action-unit tokens carry a side, prefix or intensity and count for their base action unit"
        yield Finding("info", "shaped_tokens", message, "", total, evidence)


_EVIDENCE_IN_MESSAGE = 5


@dataclass(frozen=True)
class SplitSummary:
    """One split: labelled rows, those of them with an image file, and its labels.

    ``classes`` are rows per class; ``au_known``, ``au_positives`` and ``au_prevalence`` go by action unit, the last as
    a share of the known, NaN where none is known.
    """

    split: str
    num_rows: int
    num_images: int
    num_null: int
    num_emotion_unknown: int
    classes: tuple[int, ...]
    au_known: tuple[int, ...]
    au_positives: tuple[int, ...]
    au_prevalence: tuple[float, ...]


@dataclass(frozen=True)
class Audit:
    """Everything that was found; the most serious of ``findings`` come first.

    Null is read by ``null_policy`` in train and by ``evaluation_null_policy`` in the other splits: so are the counts of
    ``splits``.
    """

    root: str
    layout: str
    image_folder: str
    taxonomy: Taxonomy
    null_policy: str
    evaluation_null_policy: str
    num_rows: int
    num_missing_images: int
    num_extra_images: int
    images_checked: bool
    splits: tuple[SplitSummary, ...]
    token_counts: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def may_train(self) -> bool:
        """Whether nothing refuses the dataset."""
        return not self.refusals

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Findings that keep the dataset from being trained on."""
        return tuple(finding for finding in self.findings if finding.level == "refusal")

    def to_json(self) -> dict[str, Any]:
        """Plain values; a prevalence that is unknown is NaN here and null in JSON text."""
        names, codes = self.taxonomy.emotions, self.taxonomy.action_unit_codes
        splits = {}
        for one in self.splits:
            units = zip(codes, one.au_known, one.au_positives, one.au_prevalence, strict=True)
            splits[one.split] = {
                **{key: value for key, value in vars(one).items() if key.startswith("num_")},
                "classes": dict(zip(names, one.classes, strict=True)),
                "action_units": {
                    code: {"known": known, "positives": positives, "prevalence": prevalence}
                    for code, known, positives, prevalence in units
                },
            }
        return {key: value for key, value in vars(self).items() if key != "taxonomy"} | {
            "may_train": self.may_train,
            "emotions": list(names),
            "action_units": list(codes),
            "splits": splits,
            "tokens_outside_vocabulary": tokens_outside(self.token_counts, self.taxonomy),
            "findings": [finding.to_json() for finding in self.findings],
        }


def audit(data: DataConfig, *, images: bool = True, progress: Progress | None = None) -> Audit:
    """Audit a dataset; ``images=False`` leaves the pixels alone and looks at labels and file names only.

    Raises:
        UsageError: there is no dataset, or it is not in a layout that can be read.
    """
    labels = read_labels(data)
    return audit_labels(labels, resolve_taxonomy(labels, data), data, images=images, progress=progress)


def audit_labels(
    labels: Labels, taxonomy: Taxonomy, data: DataConfig, *, images: bool = False, progress: Progress | None = None
) -> Audit:
    """:func:`audit` of labels that were read already."""
    targets = resolve_targets(labels.table, taxonomy, data.null_policy, data.null_policy_in_evaluation)
    splits = tuple(_summarise(split, labels.table, targets, taxonomy) for split in SPLITS)
    findings = [*labels.findings, *label_findings(labels, taxonomy, targets, data)]
    if images:
        findings += image_findings(labels, targets, progress)
    return Audit(
        root=str(labels.root),
        layout=labels.layout,
        image_folder=str(labels.image_root),
        taxonomy=taxonomy,
        null_policy=data.null_policy,
        evaluation_null_policy=data.null_policy_in_evaluation,
        num_rows=labels.table.num_rows,
        num_missing_images=labels.table["image_path"].null_count,
        num_extra_images=labels.num_extra_images,
        images_checked=images,
        splits=splits,
        token_counts=dict(sorted(labels.token_counts.items(), key=lambda item: (-item[1], item[0]))),
        findings=tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))),
    )


def require_trainable(audit: Audit, data: DataConfig | None = None) -> None:
    """Let a dataset pass that may be trained on; ``data``: how it was read, for the command that lists everything.

    Raises:
        GateError: it may not; the message gives each reason with its first places and its remedy.
    """
    _refuse(data or DataConfig(root=audit.root), "this data may not be trained on", audit.refusals)


def require_readable(labels: Labels, data: DataConfig) -> None:
    """Refuse labels of which some were not read with certainty. Evaluation needs this, too.

    Raises:
        GateError: they were not; the message is as of :func:`require_trainable`.
    """
    refusals = tuple(finding for finding in labels.findings if finding.level == "refusal")
    _refuse(data, "these labels cannot be used", refusals)


def _refuse(data: DataConfig, what: str, refusals: tuple[Finding, ...]) -> None:
    if not refusals:
        return
    lines = [f"{data.root}: {what}."]
    for finding in refusals:
        lines.append(f"* {finding.message}")
        lines += [f"    {evidence}" for evidence in finding.evidence[:_EVIDENCE_IN_MESSAGE]]
        if finding.count > _EVIDENCE_IN_MESSAGE < len(finding.evidence):
            lines.append(f"    ... {finding.count} in all")
        lines.append(f"  {finding.remedy}")
    lines.append(f"The whole list: {audit_command(data)}")
    raise GateError("\n".join(lines))


def _summarise(split: str, table: pa.Table, targets: Targets, taxonomy: Taxonomy) -> SplitSummary:
    rows = targets.split == SPLITS.index(split)
    emotion = targets.emotion[rows]
    known, positives = count_action_units(targets.action_units, rows)
    prevalence = np.divide(positives, known, out=np.full(len(known), np.nan), where=known > 0)
    has_image = np.asarray(pc.is_valid(table["image_path"]))
    return SplitSummary(
        split=split,
        num_rows=int(rows.sum()),
        num_images=int((rows & has_image).sum()),
        num_null=int(targets.null_row[rows].sum()),
        num_emotion_unknown=int((emotion < 0).sum()),
        classes=tuple(np.bincount(emotion[emotion >= 0], minlength=taxonomy.num_emotions).tolist()),
        au_known=tuple(known.tolist()),
        au_positives=tuple(positives.tolist()),
        au_prevalence=tuple(prevalence.tolist()),
    )


_EVIDENCE_SHOWN = 3


def render(audit: Audit, console: Console) -> None:
    """Print what is there, per split, and every finding with its first evidence and its remedy."""
    splits = audit.splits
    names = [split.split for split in splits]
    rows = [
        (one.split, *(f"{value:,}" for value in (one.num_rows, one.num_images, one.num_emotion_unknown, one.num_null)))
        for one in splits
    ]
    titles = ["split", "rows", "images", "emotion unknown", "AU label null"]
    console.print(_table(f"{audit.root} ({audit.layout} layout)", titles, rows))
    if audit.taxonomy.emotions:
        rows = [
            (f"{label} {name}", *(f"{split.classes[label]:,}" for split in splits))
            for label, name in enumerate(audit.taxonomy.emotions)
        ]
        console.print(_table("images per class", ["class", *names], rows))
    if audit.taxonomy.action_units:
        reading = f"null_policy {audit.null_policy}"
        if audit.evaluation_null_policy != audit.null_policy:
            reading += f", in validation and test {audit.evaluation_null_policy}"
        rows = [
            (
                code,
                *(
                    f"{one.au_positives[i]:,} ({one.au_prevalence[i]:.1%})" if one.au_known[i] else "unknown"
                    for one in splits
                ),
            )
            for i, code in enumerate(audit.taxonomy.action_unit_codes)
        ]
        title = f"action units: positives (share of the known; {reading})"
        console.print(_table(title, ["AU", *names], rows))
    for finding in audit.findings:
        level = (f"{finding.level}: ", LEVEL_STYLES[finding.level])
        console.print(Text.assemble(level, finding.message, (f" [{finding.code}]", "dim")))
        shown = finding.evidence[:_EVIDENCE_SHOWN]
        for evidence in shown:
            console.print(Text(f"    {printable(str(evidence))}"))
        if shown and finding.count > len(shown):
            console.print(Text("    ..."))
        if finding.remedy:
            console.print(Text(f"  {finding.remedy}"))
    if not audit.findings:
        console.print("Nothing to remark.")


def _table(title: str, columns: list[str], rows: list[tuple[str, ...]]) -> Table:
    others = (Column(name, justify="right") for name in columns[1:])
    table = Table(columns[0], *others, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table
