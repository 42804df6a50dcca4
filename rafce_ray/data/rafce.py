"""RAF-CE's label files: each read line by line, joined by name into one arrow table, and every odd line reported.

``RAFCE_emolabel.txt`` (class), ``RAFCE_AUlabel.txt`` (action units present, or ``null``), ``RAFCE_partition.txt``
(0 train, 1 test, 2 validation) and, optional, ``distribution.txt`` (six shares of crowd votes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.data.label_file import LabelFile, read_label_file, unreadable_finding
from rafce_ray.data.listing import image_columns, match_images
from rafce_ray.data.records import LABEL_SCHEMA, NUM_VOTES, SPLIT_NAMES, Evidence, Finding, Labels, Level, evidence_of
from rafce_ray.errors import UsageError
from rafce_ray.storage import Location
from rafce_ray.taxonomy import parse_action_unit_token, split_action_unit_tokens

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


def read(root: Location, images: str | None) -> Labels:
    """Labels of a folder in RAF-CE's layout, rows in the order of the emotion file, then of the action-unit file.

    Raises:
        UsageError: there is neither an emotion nor an action-unit file, or a file is not text.
    """
    emotions, action_units, partition, votes = (
        read_label_file(root / name) for name in (EMOTION_FILE, ACTION_UNIT_FILE, PARTITION_FILE, VOTES_FILE)
    )
    labelled = [file for file in (emotions, action_units) if file is not None]
    if not labelled:
        raise UsageError(
            f"{root}: neither {EMOTION_FILE} nor {ACTION_UNIT_FILE} is there. Point data.root at their folder."
        )
    names = pc.unique(pa.concat_arrays([file.names for file in labelled]))
    columns: dict[str, pa.Array] = {"name": names}
    findings = [finding for file in (emotions, action_units, partition, votes) if file for finding in file.findings]
    findings += _one_sided(names, emotions, action_units, partition, votes)
    columns |= _emotion_columns(names, emotions)
    au_columns, tokens, au_findings = _action_unit_columns(names, action_units)
    columns |= au_columns
    columns["split"], split_findings = _splits(names, partition)
    columns["votes"], votes_findings = _votes(names, votes)
    matched = match_images(names, root, images)
    columns |= image_columns(matched.listing.table, matched.index)
    return Labels(
        table=pa.table([columns[name] for name in LABEL_SCHEMA.names], schema=LABEL_SCHEMA),
        layout="rafce",
        root=root,
        image_root=matched.listing.folder,
        emotion_file=emotions.file if emotions else None,
        au_file=action_units.file if action_units else None,
        au_columns=None,
        num_extra_images=matched.num_extras,
        findings=(*findings, *au_findings, *split_findings, *votes_findings, *matched.findings),
        token_counts=tokens,
        digests={file.file: file.sha256 for file in (emotions, action_units, partition, votes) if file},
    )


def _one_sided(
    names: pa.Array,
    emotions: LabelFile | None,
    action_units: LabelFile | None,
    partition: LabelFile | None,
    votes: LabelFile | None,
) -> list[Finding]:
    """Names that one file holds and another lacks."""
    findings = []
    for file, wanted, consequence in (
        (emotions, EMOTION_FILE, "their emotion is unknown"),
        (action_units, ACTION_UNIT_FILE, "their action units are unknown"),
        (partition, PARTITION_FILE, "they are in no split and are not used"),
    ):
        if file is None:
            continue
        absent = file.locate(names) < 0
        if absent.any():
            evidence = evidence_of(
                Evidence(f"{names[i].as_py()} is not in it", wanted) for i in np.flatnonzero(absent).tolist()
            )
            message = f"{wanted}: {absent.sum()} labelled names of the other files are missing; {consequence}"
            code = {EMOTION_FILE: "rows_without_emotion", ACTION_UNIT_FILE: "rows_without_action_units"}.get(
                wanted, "rows_without_split"
            )
            findings.append(
                Finding("warning", code, message, f"Add their lines to {wanted}.", int(absent.sum()), evidence)
            )
    levels: tuple[tuple[LabelFile | None, Level], ...] = ((partition, "warning"), (votes, "info"))
    for file, level in levels:
        if file is None:
            continue
        unknown = np.asarray(pc.is_null(pc.index_in(file.names, value_set=names)))
        if unknown.any():
            evidence = evidence_of(
                Evidence(f"{file.names[i].as_py()} has no label", file.file, int(file.lines[i]))
                for i in np.flatnonzero(unknown).tolist()
            )
            message = (
                f"{file.file}: {unknown.sum()} names have neither an emotion nor an action-unit label and are not used"
            )
            code = "split_without_label" if file is partition else "votes_without_label"
            findings.append(
                Finding(level, code, message, "Add their labels, or delete the lines.", int(unknown.sum()), evidence)
            )
    return findings


def _emotion_columns(names: pa.Array, file: LabelFile | None) -> dict[str, pa.Array]:
    if file is None:
        return {"emotion": pa.nulls(len(names), pa.string()), "emotion_line": pa.nulls(len(names), pa.int32())}
    row = file.locate(names)
    usable = (row >= 0) & ~file.conflicting[row]
    lines = pa.array(file.lines[row], mask=row < 0)
    return {"emotion": file.values.take(pa.array(row, mask=~usable)), "emotion_line": lines}


@dataclass(frozen=True)
class _ReadLabel:
    """One distinct action-unit label, read."""

    state: str
    positive: tuple[int, ...]
    tokens: tuple[str, ...]
    fault: str | None


def _read_label(text: str) -> _ReadLabel:
    tokens = tuple(split_action_unit_tokens(text))
    if text.strip().lower() == "null":
        return _ReadLabel("null", (), (), None)
    numbers = [parse_action_unit_token(token) for token in tokens]
    unreadable = [token for token, number in zip(tokens, numbers, strict=True) if number is None]
    if unreadable or not tokens:
        return _ReadLabel("unreadable", (), tokens, f"unreadable {', '.join(map(repr, unreadable))} in {text[:80]!r}")
    return _ReadLabel("full", tuple(sorted({number for number in numbers if number is not None})), tokens, None)


def _action_unit_columns(
    names: pa.Array, file: LabelFile | None
) -> tuple[dict[str, pa.Array], dict[str, int], list[Finding]]:
    num_rows = len(names)
    nothing = pa.array([[]], pa.list_(pa.int16())).take(pa.array(np.zeros(num_rows, np.int64)))
    if file is None:
        state = pa.array(["missing"]).take(pa.array(np.zeros(num_rows, np.int64)))
        return (
            {
                "au_state": state,
                "au_line": pa.nulls(num_rows, pa.int32()),
                "au_positive": nothing,
                "au_negative": nothing,
            },
            {},
            [],
        )
    distinct = file.values.dictionary_encode()
    labels = [_read_label(text) for text in distinct.dictionary.to_pylist()]
    labels += [_ReadLabel("unreadable", (), (), None), _ReadLabel("missing", (), (), None)]
    row = file.locate(names)
    code = np.where(row < 0, len(labels) - 1, np.asarray(distinct.indices)[row])
    code = np.where((row >= 0) & file.conflicting[row], len(labels) - 2, code)
    unreadable = np.flatnonzero(np.array([label.fault is not None for label in labels])[code])
    lines = np.where(row < 0, -1, file.lines[row])
    findings = []
    if len(unreadable):
        ordered = unreadable[np.argsort(lines[unreadable])].tolist()
        evidence = evidence_of(
            Evidence(f"{names[i].as_py()}: {labels[code[i]].fault}", file.file, int(lines[i])) for i in ordered
        )
        findings.append(unreadable_finding(file.file, len(unreadable), evidence))
    tokens: dict[str, int] = {}
    for label, count in zip(labels, np.bincount(code, minlength=len(labels)).tolist(), strict=True):
        for token in label.tokens if count else ():
            tokens[token] = tokens.get(token, 0) + count
    taken = pa.array(code)
    columns = {
        "au_state": pa.array([label.state for label in labels]).take(taken),
        "au_line": pa.array(lines.astype(np.int32), mask=lines < 0),
        "au_positive": pa.array([list(label.positive) for label in labels], pa.list_(pa.int16())).take(taken),
        "au_negative": nothing,
    }
    return columns, tokens, findings


def _splits(names: pa.Array, file: LabelFile | None) -> tuple[pa.Array, list[Finding]]:
    if file is None:
        message = f"{PARTITION_FILE} is missing: no image is in a split"
        remedy = f"Add {PARTITION_FILE} with lines such as '0001.jpg 0' (0 train, 1 test, 2 validation)."
        return pa.nulls(len(names), pa.string()), [Finding("error", "no_partition_file", message, remedy)]
    distinct = file.values.dictionary_encode()
    known = [PARTITIONS.get(text) or SPLIT_NAMES.get(text.lower()) for text in distinct.dictionary.to_pylist()]
    codes = np.asarray(distinct.indices)
    unknown = np.flatnonzero(np.array([split is None for split in known], bool)[codes])
    findings = []
    if len(unknown):
        evidence = evidence_of(
            Evidence(f"{file.names[i].as_py()}: {file.values[i].as_py()!r}", file.file, int(file.lines[i]))
            for i in unknown.tolist()
        )
        message = f"{file.file}: {len(unknown)} rows name an unknown partition and are in no split"
        findings.append(
            Finding(
                "error", "unknown_partitions", message, "Use 0 train, 1 test, 2 validation.", len(unknown), evidence
            )
        )
    row = file.locate(names)
    usable = (row >= 0) & ~file.conflicting[row]
    taken = pa.array(codes[row], mask=~usable)
    return pa.array(known, pa.string()).take(taken), findings


def _votes(names: pa.Array, file: LabelFile | None) -> tuple[pa.Array, list[Finding]]:
    kind = LABEL_SCHEMA.field("votes").type
    if file is None:
        return pa.nulls(len(names), kind), []
    row = file.locate(names)
    shares = np.full((len(names), NUM_VOTES), np.nan, np.float32)
    faults = []
    for i, where in enumerate(row.tolist()):
        if where < 0:
            continue
        text = file.values[where].as_py()
        votes = None if file.conflicting[where] else _read_votes(text)
        if votes is None:
            faults.append(Evidence(f"{names[i].as_py()}: {text[:80]!r}", file.file, int(file.lines[where])))
        else:
            shares[i] = votes
    findings = []
    if faults:
        message = f"{file.file}: votes of {len(faults)} rows are not {NUM_VOTES} shares that sum to 1; they are unknown"
        remedy = "Write six shares in the order surprise, fear, disgust, happiness, sadness, anger."
        findings.append(Finding("warning", "unreadable_votes", message, remedy, len(faults), evidence_of(faults)))
    unknown = np.isnan(shares[:, 0])
    values = pa.array(np.nan_to_num(shares).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=pa.array(unknown)), findings


def _read_votes(text: str) -> npt.NDArray[np.float32] | None:
    try:
        votes = np.array([float(part) for part in text.replace(",", " ").split()], np.float32)
    except ValueError:
        return None
    if votes.shape != (NUM_VOTES,) or not (votes >= 0).all() or abs(float(votes.sum()) - 1) > _VOTES_TOLERANCE:
        return None
    return votes
