"""RAF-CE's label files: each read line by line, joined by name into one arrow table, and every odd line reported.

``RAFCE_emolabel.txt`` (class), ``RAFCE_AUlabel.txt`` (action units present, or ``null``), ``RAFCE_partition.txt``
(0 train, 1 test, 2 validation) and, optional, ``distribution.txt`` (six shares of crowd votes).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.base.errors import Evidence, Finding, Level, UsageError
from rafce_ray.base.storage import Location
from rafce_ray.base.taxonomy import label_key
from rafce_ray.data.label_file import (
    AUTO,
    ActionUnitLabel,
    LabelFile,
    no_label_file,
    read_action_unit_label,
    read_label_file,
    unreadable_finding,
)
from rafce_ray.data.listing import image_columns, match_images
from rafce_ray.data.records import (
    LABEL_SCHEMA,
    NUM_VOTES,
    SPLIT_NAMES,
    EvidenceList,
    Labels,
    evidence_of,
    release_memory,
)

NUM_LABELLED = 4549
"""Labelled images of RAF-CE."""

SPLIT_SIZES = {"train": 2709, "validation": 931, "test": 909}
"""Labelled images per split of RAF-CE."""

CLASS_COUNTS = {
    "train": (394, 171, 109, 136, 71, 495, 120, 352, 24, 124, 582, 108, 6, 17),
    "validation": (156, 54, 26, 50, 24, 162, 32, 138, 6, 42, 201, 32, 4, 4),
    "test": (126, 54, 36, 44, 25, 178, 43, 113, 6, 44, 194, 37, 1, 8),
}
"""Images per class of RAF-CE, in label order."""

NUM_NULL_TRAIN = 136
"""Train rows of RAF-CE whose action-unit label is null."""

TRAIN_POSITIVES = {
    25: 1661, 4: 1060, 10: 820, 12: 732, 1: 654, 26: 647, 5: 577, 2: 480, 27: 472, 9: 449, 16: 426, 17: 337, 6: 265,
    7: 208, 22: 205, 15: 172, 20: 145, 24: 134, 43: 101, 14: 79, 18: 74, 23: 69, 28: 25, 19: 19, 29: 12, 45: 0,
}  # fmt: skip
"""Train positives of RAF-CE per action unit; those not listed have fewer than 8."""


def is_surprisingly_few(count: int, expected: float) -> bool:
    """Whether ``count`` or fewer of an event expected ``expected`` times has a chance below 1 in 1000 (Poisson)."""
    if expected <= 0 or count >= expected:
        return False
    log_terms = [k * math.log(expected) - expected - math.lgamma(k + 1) for k in range(count + 1)]
    return math.fsum(math.exp(term) for term in log_terms) < 1e-3


EMOTION_FILE = "RAFCE_emolabel.txt"
ACTION_UNIT_FILE = "RAFCE_AUlabel.txt"
PARTITION_FILE = "RAFCE_partition.txt"
VOTES_FILE = "distribution.txt"

PARTITIONS = {"0": "train", "1": "test", "2": "validation"}
"""RAF-CE's partition codes."""

_VOTES_TOLERANCE = 0.02


def is_rafce(root: Location) -> bool:
    """Whether a folder holds one of RAF-CE's label files."""
    return any((root / name).exists() for name in (EMOTION_FILE, ACTION_UNIT_FILE, PARTITION_FILE))


def read(root: Location, images: str | None, encoding: str = AUTO) -> Labels:
    """Labels of a folder in RAF-CE's layout, rows in the order of the emotion file, then of the action-unit file.

    Raises:
        UsageError: there is neither an emotion nor an action-unit file, or a file is not text.
    """
    emotions = read_label_file(root / EMOTION_FILE, encoding)
    action_units = read_label_file(root / ACTION_UNIT_FILE, encoding)
    labelled = [file for file in (emotions, action_units) if file is not None]
    if not labelled:
        raise UsageError(
            f"{root}: neither {EMOTION_FILE} nor {ACTION_UNIT_FILE} is there. Point data.root at their folder."
        )
    names = labelled[0].names
    if len(labelled) == 2 and not names.equals(labelled[1].names):
        names = pc.unique(pa.concat_arrays([file.names for file in labelled]))
    coded = _action_units(names, action_units or no_label_file())
    columns = {"name": names, **_emotion_columns(names, emotions or no_label_file()), **coded.columns}
    findings = [
        *_file_findings(names, emotions, "rows_without_emotion", "their emotion is unknown"),
        *_file_findings(names, action_units, "rows_without_action_units", "their action units are unknown"),
        *coded.findings,
    ]
    # One file after the other: only what is kept of each stays in memory.
    partition = read_label_file(root / PARTITION_FILE, encoding)
    columns["split"], split_findings = _splits(names, partition, root)
    findings += _file_findings(names, partition, "rows_without_split", "they are in no split and are not used")
    release_memory()
    votes = read_label_file(root / VOTES_FILE, encoding)
    columns["votes"], votes_findings = _votes(names, votes)
    findings += votes.findings if votes else ()
    findings += [
        *split_findings,
        *votes_findings,
        *_spare_findings(names, partition, "warning", "split_without_label"),
        *_spare_findings(names, votes, "info", "votes_without_label"),
    ]
    digests = {file.file: file.sha256 for file in (*labelled, partition, votes) if file}
    emotion_file, au_file = (file.file if file else None for file in (emotions, action_units))
    del emotions, action_units, labelled, partition, votes
    release_memory()
    matched = match_images(names, root, images)
    columns |= image_columns(matched.listing.table, matched.index)
    return Labels(
        table=pa.table([columns[name] for name in LABEL_SCHEMA.names], schema=LABEL_SCHEMA),
        layout="rafce",
        root=root,
        image_root=matched.listing.folder,
        emotion_file=emotion_file,
        au_file=au_file,
        au_columns=None,
        num_extra_images=matched.num_extras,
        findings=(*findings, *matched.findings),
        token_counts=coded.tokens,
        digests=digests,
        near_images=matched.near,
    )


def _file_findings(names: pa.Array, file: LabelFile | None, code: str, consequence: str) -> Iterator[Finding]:
    """What was odd in a file, and labelled names that it lacks."""
    if file is None:
        return
    yield from file.findings
    absent = np.flatnonzero(file.locate(names) < 0).tolist()
    if absent:
        evidence = evidence_of(Evidence(f"{names[row].as_py()} is not in it", file.file) for row in absent)
        message = f"{file.file}: {len(absent)} labelled names of the other files are missing; {consequence}"
        yield Finding("warning", code, message, f"Add their lines to {file.file}.", len(absent), evidence)


def _spare_findings(names: pa.Array, file: LabelFile | None, level: Level, code: str) -> Iterator[Finding]:
    """Names of a file that have no label."""
    if file is not None and (unknown := file.not_among(names).tolist()):
        evidence = evidence_of(
            Evidence(f"{file.names[row].as_py()} has no label", file.file, int(file.lines[row])) for row in unknown
        )
        message = f"{file.file}: {len(unknown)} names have neither an emotion nor an action-unit label: not used"
        yield Finding(level, code, message, "Add their labels, or delete the lines.", len(unknown), evidence)


def _emotion_columns(names: pa.Array, file: LabelFile) -> dict[str, pa.Array]:
    row = file.locate(names)
    usable = (row >= 0) & ~file.conflicting_at(row)
    return {
        "emotion": file.values.combine_chunks().take(pa.array(row, mask=~usable)),
        "emotion_line": pa.array(file.lines_at(row), mask=row < 0),
    }


@dataclass(frozen=True)
class _ActionUnits:
    """The action-unit columns, how often each token was written, and what was odd."""

    columns: dict[str, pa.Array]
    tokens: dict[str, int]
    findings: list[Finding]


def _action_units(names: pa.Array, file: LabelFile) -> _ActionUnits:
    # There are far fewer distinct labels than rows: each is read once.
    distinct = file.values.combine_chunks().dictionary_encode()
    labels = [read_action_unit_label(text) for text in distinct.dictionary.to_pylist()]
    labels += [ActionUnitLabel("unreadable"), ActionUnitLabel("missing")]
    row = file.locate(names)
    code = np.append(np.asarray(distinct.indices), len(labels) - 1)[row]
    code[file.conflicting_at(row)] = len(labels) - 2
    lines = file.lines_at(row)
    faults = EvidenceList()
    faulty = np.flatnonzero(np.array([label.fault is not None for label in labels])[code])
    for i in faulty[np.argsort(lines[faulty])].tolist():
        faults.add(f"{names[i].as_py()}: {labels[code[i]].fault}", file.file, int(lines[i]))
    tokens: Counter[str] = Counter()
    for label, count in zip(labels, np.bincount(code, minlength=len(labels)).tolist(), strict=True):
        for token in label.tokens if count else ():
            tokens[token] += count
    taken = pa.array(code)
    lists = pa.list_(pa.int16())
    columns = {
        "au_state": pa.array([label.state for label in labels]).take(taken),
        "au_line": pa.array(lines, mask=row < 0),
        "au_positive": pa.array([list(label.positive) for label in labels], lists).take(taken),
        "au_negative": pa.array([[]], lists).take(pa.array(np.zeros(len(names), np.int32))),
    }
    return _ActionUnits(columns, dict(tokens), [unreadable_finding(file.file, faults)] if faults else [])


def _splits(names: pa.Array, file: LabelFile | None, root: Location) -> tuple[pa.Array, list[Finding]]:
    if file is None:
        message = f"{PARTITION_FILE} is missing: no image is in a split"
        remedy = (
            f"Add {PARTITION_FILE} with lines such as '0001.jpg 0' (0 train, 1 test, 2 validation), or draw one: "
            f"rafce data split {root.command}"
        )
        return pa.nulls(len(names), pa.string()), [Finding("refusal", "no_partition_file", message, remedy)]
    distinct = file.values.combine_chunks().dictionary_encode()
    known = [PARTITIONS.get(text) or SPLIT_NAMES.get(label_key(text)) for text in distinct.dictionary.to_pylist()]
    codes = np.asarray(distinct.indices)
    unknown = EvidenceList()
    for i in np.flatnonzero(np.array([split is None for split in known], bool)[codes]).tolist():
        unknown.add(f"{file.names[i].as_py()}: {file.values[i].as_py()!r}", file.file, int(file.lines[i]))
    row = file.locate(names)
    usable = (row >= 0) & ~file.conflicting_at(row)
    splits = pa.array(known, pa.string()).take(pa.array(np.append(codes, 0)[row], mask=~usable))
    if not unknown:
        return splits, []
    message = f"{file.file}: {len(unknown)} rows name an unknown partition and are in no split"
    remedy = "Use 0 train, 1 test, 2 validation."
    return splits, [unknown.finding("error", "unknown_partitions", message, remedy)]


def _votes(names: pa.Array, file: LabelFile | None) -> tuple[pa.Array, list[Finding]]:
    kind = LABEL_SCHEMA.field("votes").type
    if file is None:
        return pa.nulls(len(names), kind), []
    row = file.locate(names)
    usable = (row >= 0) & ~file.conflicting_at(row)
    shares = np.full((len(names), NUM_VOTES), np.nan, np.float32)
    for i in np.flatnonzero(usable).tolist():
        parts = file.values[row[i]].as_py().replace(",", " ").split()
        if len(parts) == NUM_VOTES:
            # What is no number stays NaN, and NaN fails the check below.
            with suppress(ValueError):
                shares[i] = [float(part) for part in parts]
    known = (shares >= 0).all(axis=1) & (np.abs(shares.sum(axis=1) - 1) <= _VOTES_TOLERANCE)
    shares[~known] = 0
    array = pa.FixedSizeListArray.from_arrays(pa.array(shares.reshape(-1)), type=kind, mask=pa.array(~known))
    faults = EvidenceList()
    for i in np.flatnonzero((row >= 0) & ~known).tolist():
        faults.add(f"{names[i].as_py()}: {file.values[row[i]].as_py()[:80]!r}", file.file, int(file.lines[row[i]]))
    if not faults:
        return array, []
    message = f"{file.file}: votes of {len(faults)} rows are not {NUM_VOTES} shares that sum to 1; they are unknown"
    remedy = "Write six shares in the order surprise, fear, disgust, happiness, sadness, anger."
    return array, [faults.finding("warning", "unreadable_votes", message, remedy)]
