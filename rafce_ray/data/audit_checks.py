"""Checks of a dataset's labels: each looks at one thing and returns what it found."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.config import DataConfig
from rafce_ray.data import reference
from rafce_ray.data.audit_action_units import action_unit_findings
from rafce_ray.data.audit_case import Case, audit_command, count_action_units, value_counts
from rafce_ray.data.labels import in_label_order
from rafce_ray.data.records import (
    MAX_UNREADABLE_SHARE,
    SPLITS,
    Evidence,
    Finding,
    Labels,
    Level,
    NearImage,
    Targets,
    counted,
)
from rafce_ray.taxonomy import PERHAPS_UNKNOWN_WORDS, RAFCE_EMOTIONS, UNKNOWN_WORDS, Taxonomy, label_key

MIN_CLASS_IMAGES = 10
"""A class with fewer images in a split is pointed out."""

WITHOUT_SPLITS = ("no_split_column", "no_split_folders", "no_partition_file")
"""Refusals of a dataset of which no image is in a split."""

_MAX_MISSING_SHARE = 0.05


def label_findings(labels: Labels, taxonomy: Taxonomy, targets: Targets, data: DataConfig) -> list[Finding]:
    """Everything that labels and file names alone can tell, beyond what reading them told."""
    has_image = np.asarray(pc.is_valid(labels.table["image_path"]))
    usable = (targets.split == SPLITS.index("train")) & has_image
    case = Case(labels, taxonomy, targets, data, usable, *count_action_units(targets.action_units, usable))
    checks: tuple[Callable[[Case], list[Finding]], ...] = (
        _check_tasks,
        _check_splits,
        _check_known_sizes,
        _check_files,
        _check_emotions,
        _check_spellings,
        _check_number_of_classes,
        _check_class_sizes,
        action_unit_findings,
    )
    if any(finding.code in WITHOUT_SPLITS for finding in labels.findings):
        # The other checks look at splits.
        checks = (_check_tasks, _check_files)
    return [finding for check in checks for finding in check(case)]


def _check_tasks(case: Case) -> list[Finding]:
    labels, taxonomy = case.labels, case.taxonomy
    if not taxonomy.emotions and not taxonomy.action_units:
        message = "there is neither an emotion nor an action unit to train"
        remedy = "Set data.emotions or data.action_units to what the labels hold."
        return [Finding("refusal", "nothing_to_train", message, remedy)]
    findings = []
    if not labels.has_emotions:
        level: Level = "warning" if isinstance(case.data.emotions, tuple) else "info"
        findings.append(
            Finding(level, "action_units_only", "there are no emotion labels: action units are trained alone")
        )
    if not labels.has_action_units:
        level = "warning" if isinstance(case.data.action_units, tuple) else "info"
        findings.append(Finding(level, "emotions_only", "there are no action-unit labels: emotions are trained alone"))
    return findings


def _check_splits(case: Case) -> list[Finding]:
    sizes = case.split_sizes()
    evidence = tuple(Evidence(f"{split}: {size} rows") for split, size in sizes.items())
    findings = []
    if not case.usable.any() and case.labels.table["image_path"].null_count < case.labels.table.num_rows:
        message = "no image is in the train split"
        findings.append(Finding("refusal", "no_train_images", message, "Assign images to train.", 1, evidence))
    if not sizes["validation"]:
        message = "no image is in the validation split: the best epoch cannot be chosen"
        findings.append(Finding("error", "no_validation_images", message, "Assign images to validation.", 1, evidence))
    if not sizes["test"]:
        findings.append(Finding("info", "no_test_images", "no image is in the test split", "", 1, evidence))
    if 0 < sizes["train"] < max(sizes.values()):
        message = "train is not the largest split: the partition codes look swapped"
        remedy = "In RAF-CE's files 0 is train, 1 test and 2 validation."
        findings.append(Finding("warning", "partitions_look_swapped", message, remedy, 1, evidence))
    return findings


def _check_known_sizes(case: Case) -> list[Finding]:
    """Compare with the published sizes, where the dataset is RAF-CE by its classes and its size."""
    sizes, known = case.split_sizes(), reference.SPLIT_SIZES
    close_in_size = abs(case.labels.table.num_rows - reference.NUM_LABELLED) <= 0.02 * reference.NUM_LABELLED
    two_match = len(set(sizes.values()) & set(known.values())) >= 2
    if not case.has_rafce_classes or not (close_in_size or two_match) or sizes == known:
        return []
    evidence = tuple(Evidence(f"{split}: {sizes[split]} rows, RAF-CE has {known[split]}") for split in SPLITS)
    swapped = abs(sizes["test"] - known["validation"]) + abs(sizes["validation"] - known["test"])
    straight = abs(sizes["test"] - known["test"]) + abs(sizes["validation"] - known["validation"])
    if swapped < straight and sizes["train"] == max(sizes.values()):
        message = "test and validation have each other's size: the partition codes look swapped"
        remedy = "In RAF-CE's files 1 is test (909 images) and 2 validation (931)."
        return [Finding("warning", "partitions_look_swapped", message, remedy, 1, evidence)]
    message = "the split sizes are not RAF-CE's"
    return [
        Finding(
            "warning", "split_sizes_differ", message, "Compare the label files with the published ones.", 1, evidence
        )
    ]


def _check_files(case: Case) -> list[Finding]:
    labels = case.labels
    paths = labels.table["image_path"]
    findings = []
    num_missing = paths.null_count
    if num_missing:
        missing = np.asarray(pc.is_null(paths))
        share = num_missing / len(paths)
        level: Level = "refusal" if num_missing == len(paths) else "error" if share > _MAX_MISSING_SHARE else "warning"
        message = f"{num_missing} of {len(paths)} labelled images are missing from {labels.image_root}"
        line_column = "emotion_line" if labels.has_emotions else "au_line"
        evidence = case.rows(missing, labels.emotion_file or labels.au_file, line_column, None)
        remedy = "Add the images, or name their folder with data.images=FOLDER."
        near = labels.near_images
        if near:
            kinds = Counter(image.difference for image in near.values())
            alike = ", ".join(f"{number} {difference}" for difference, number in kinds.items())
            message += f"; files of nearly these names lie there: {alike}"
            evidence = tuple(
                replace(item, detail=f"{item.detail}: {near[item.detail].path} is there")
                if item.detail in near
                else item
                for item in sorted(evidence, key=lambda item: item.detail not in near)
            )
            remedy = _near_remedy(case, near)
        findings.append(Finding(level, "missing_images", message, remedy, num_missing, evidence))
    if labels.num_extra_images:
        message = f"{labels.num_extra_images} images have no label row and are not used"
        findings.append(Finding("info", "extra_images", message, "", labels.num_extra_images))
    return findings


def _near_remedy(case: Case, near: dict[str, NearImage]) -> str:
    """The command that sets the images' folder, where only that differs; else the advice to correct the names."""
    folders = {os.path.split(image.path)[0] for image in near.values()}
    if {image.difference for image in near.values()} == {"in another folder"} and len(folders) == 1:
        [folder] = folders
        if folder and not any("/" in name or "\\" in name for name in near):
            return f"Name their folder: {audit_command(case.data, images=folder)}"
    return "Write the names as the files are named, relative to the folder of images; or rename the files."


def _check_emotions(case: Case) -> list[Finding]:
    labels, taxonomy = case.labels, case.taxonomy
    if not taxonomy.emotions:
        return []
    written = labels.table["emotion"]
    words = UNKNOWN_WORDS | PERHAPS_UNKNOWN_WORDS
    says_unknown = pa.array([text for text, _ in value_counts(written) if label_key(text) in words], pa.string())
    is_unknown = (case.targets.emotion < 0) & np.asarray(pc.is_in(written, says_unknown))
    num_written = len(written) - written.null_count - int(is_unknown.sum())
    unknown = np.asarray(pc.is_valid(written)) & (case.targets.emotion < 0) & ~is_unknown
    findings = _unknown_findings(case, is_unknown)
    if unknown.any():
        count = int(unknown.sum())
        share = count / num_written
        names = (
            ", ".join(taxonomy.emotions)
            if taxonomy.num_emotions <= 4
            else f"the {taxonomy.num_emotions} of the taxonomy"
        )
        level: Level = "refusal" if share > MAX_UNREADABLE_SHARE else "warning"
        message = (
            f"{count} of {num_written} emotion labels ({share:.1%}) name no known class; these emotions are unknown"
        )
        remedy = f"Known are {names}, or their numbers from 0. Set data.emotions=[...] if the dataset has others."
        evidence = case.rows(unknown, labels.emotion_file, "emotion_line", "emotion")
        findings.append(Finding(level, "unknown_classes", message, remedy, count, evidence))
    if not (case.targets.emotion[case.usable] >= 0).any() and not case.all_images_missing:
        message = "there are emotion labels, but no train image has a known one"
        remedy = "Check data.emotions and the split column; data.emotions=none leaves the task out."
        evidence = tuple(Evidence(f"{count} rows say {text!r}") for text, count in value_counts(written)[:10])
        findings.append(Finding("refusal", "no_emotion_targets", message, remedy, 1, evidence))
    codes = {int(text) for text, _ in value_counts(written) if text.isdecimal()}
    if (
        codes
        and min(codes) == 1
        and max(codes) == taxonomy.num_emotions
        and not set(map(str, codes)) & set(taxonomy.emotions)
    ):
        message = f"class numbers run from 1 to {max(codes)}: they look as if they started at 1, not at 0"
        findings.append(Finding("error", "classes_look_one_based", message, "Subtract 1 from every class number."))
    return findings


def _unknown_findings(case: Case, is_unknown: npt.NDArray[np.bool_]) -> list[Finding]:
    """Words that stand for no label. A word that may also be a class is refused if data.emotions lists no classes."""
    counts = value_counts(case.labels.table["emotion"].filter(pa.array(is_unknown)))
    may_be_class = [(text, count) for text, count in counts if label_key(text) in PERHAPS_UNKNOWN_WORDS]
    if case.data.emotions != "auto" or case.taxonomy.emotions == tuple(RAFCE_EMOTIONS):
        may_be_class = []
    sure = [pair for pair in counts if pair not in may_be_class]
    findings = []
    if may_be_class:
        classes = _class_names(case)
        with_them = in_label_order([*classes, *(text for text, _ in may_be_class)])
        message = f"{_counts(may_be_class)}: that may be a class, or say that the emotion is unknown"
        as_class = _with_emotions(case, with_them)
        remedy = f"If it is unknown: `{_with_emotions(case, classes)}`. If it is a class: `{as_class}`."
        findings.append(_words_finding(case, may_be_class, "refusal", "class_or_unknown", message, remedy))
    if sure:
        remedy = "If that is a class, list it in data.emotions."
        findings.append(
            _words_finding(case, sure, "info", "emotions_unknown", f"{_counts(sure)}: read as unknown", remedy)
        )
    return findings


def _words_finding(
    case: Case, words: list[tuple[str, int]], level: Level, code: str, message: str, remedy: str
) -> Finding:
    mask = np.asarray(pc.is_in(case.labels.table["emotion"], pa.array([text for text, _ in words])))
    evidence = case.rows(mask, case.labels.emotion_file, "emotion_line", "emotion")
    return Finding(level, code, message, remedy, int(mask.sum()), evidence)


def _counts(words: list[tuple[str, int]]) -> str:
    total = sum(count for _, count in words)
    listed = repr(words[0][0]) if len(words) == 1 else ", ".join(f"{text!r} ({count})" for text, count in words)
    return f"{counted(total, 'emotion label')} {'says' if total == 1 else 'say'} {listed}"


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


def _shown(text: str) -> str:
    """In quotes, with what cannot be seen in an editor (combining marks, no-break spaces) as its code."""
    return f"'{text}'" if text.isascii() or text == unicodedata.normalize("NFKC", text) else ascii(text)


def _check_spellings(case: Case) -> list[Finding]:
    """Class names that differ only as spellings do: classes of their own where nothing says that they are one."""
    if case.data.emotions != "auto" or not case.taxonomy.emotions or case.taxonomy.emotions == tuple(RAFCE_EMOTIONS):
        return []
    several = [spellings for spellings in _spellings(case).values() if len(spellings) > 1]
    if not several:
        return []
    table = case.labels.table
    evidence = []
    for spellings in several:
        first = pc.index(table["emotion"], spellings[-1][0]).as_py()
        told = ", ".join(f"{_shown(text)} ({counted(count, 'row')})" for text, count in spellings)
        evidence.append(Evidence(told, case.labels.emotion_file, table["emotion_line"][first].as_py()))
    names = "; ".join(item.detail for item in evidence[:3])
    message = f"classes with more than one spelling: {names}" + ("; ..." if len(several) > 3 else "")
    remedy = (
        f"To train each as one class: `{_with_emotions(case, _class_names(case))}`. "
        f"To keep them apart: `{_with_emotions(case, list(case.taxonomy.emotions))}`."
    )
    return [Finding("refusal", "spellings_of_classes", message, remedy, len(several), tuple(evidence))]


def _check_number_of_classes(case: Case) -> list[Finding]:
    """A single class cannot be told from others."""
    known = case.targets.emotion[case.usable & (case.targets.emotion >= 0)]
    if len(np.unique(known)) != 1:
        return []
    name = case.taxonomy.emotions[int(known[0])]
    message = f"all {len(known)} train images with a known emotion say {name!r}: there is nothing to learn"
    remedy = "Add images of other classes to the train split"
    if case.train_positives.any():
        remedy += "; to train the action units alone: data.emotions=none"
    counts = value_counts(case.labels.table["emotion"])[:10]
    evidence = tuple(Evidence(f"{counted(count, 'row')} of all splits: {text!r}") for text, count in counts)
    return [Finding("refusal", "one_class", message, f"{remedy}.", 1, evidence)]


def _check_class_sizes(case: Case) -> list[Finding]:
    """Small classes: worth knowing; a warning where the class should be larger, or where nothing is known of it."""
    sizes = case.split_sizes()
    few: dict[Level, list[tuple[str, str, Evidence]]] = {"info": [], "warning": []}
    for code, split in enumerate(SPLITS):
        if not sizes[split]:
            continue
        known = case.targets.emotion[(case.targets.split == code) & (case.targets.emotion >= 0)]
        for label, count in enumerate(np.bincount(known, minlength=case.taxonomy.num_emotions).tolist()):
            if count >= MIN_CLASS_IMAGES:
                continue
            level: Level = "warning" if split == "train" else "info"
            if case.has_rafce_classes:
                expected = reference.CLASS_COUNTS[split][label] * sizes[split] / reference.SPLIT_SIZES[split]
                level = "warning" if reference.is_surprisingly_few(count, expected) else "info"
            name = case.taxonomy.emotions[label]
            few[level].append((split, name, Evidence(f"{split}: {count} images of {name}")))
    findings = []
    for level, found in few.items():
        if found:
            evidence = tuple(one for _, _, one in found)
            message = (
                f"{len({name for _, name, _ in found})} of {case.taxonomy.num_emotions} classes have under {MIN_CLASS_IMAGES} images in "
                f"{' or '.join(dict.fromkeys(split for split, _, _ in found))}: their figures mean little"
            )
            remedy = "Add images of these classes, or look at macro-F1 over supported classes."
            findings.append(Finding(level, "classes_under_10", message, remedy, len(evidence), evidence))
    return findings
