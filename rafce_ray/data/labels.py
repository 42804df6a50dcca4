"""From label files of any layout to targets: read, decide on the vocabulary, and turn labels into numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rafce_ray.config import DataConfig
from rafce_ray.data import class_folders, rafce, table
from rafce_ray.data.label_file import refuse_broken_link
from rafce_ray.data.records import NUM_VOTES, SPLITS, Evidence, Finding, Labels, Targets
from rafce_ray.errors import RafceError, UsageError
from rafce_ray.storage import Location, locate
from rafce_ray.taxonomy import (
    PERHAPS_UNKNOWN_WORDS,
    RAFCE_EMOTIONS,
    SEED18,
    UNKNOWN_WORDS,
    Taxonomy,
    class_named,
    label_key,
    make_taxonomy,
)

__all__ = [
    "SPLITS",
    "Evidence",
    "Finding",
    "Labels",
    "Targets",
    "read_labels",
    "resolve_targets",
    "resolve_taxonomy",
]

_MAX_ACTION_UNIT = 100


def read_labels(data: DataConfig) -> Labels:
    """The labels of ``data.root``, whatever their layout.

    Raises:
        UsageError: no root is given, nothing is there, or it is not a layout that can be read.
    """
    if data.root is None:
        raise UsageError(
            "data.root is not set: no dataset is named. Give data.root=FOLDER (RAF-CE's layout) or data.root=TABLE.csv."
        )
    try:
        return _read_labels(locate(data.root), data)
    except RafceError:
        raise
    except OSError as error:
        raise UsageError(
            f"{error.filename or data.root}: cannot be read ({error.strerror or error}). Give a file or folder that "
            "can be read, as data.root or data.images."
        ) from error


def _read_labels(root: Location, data: DataConfig) -> Labels:
    if not root.exists():
        root.check_reachable()
        refuse_broken_link(root)
        raise UsageError(
            f"data.root={data.root!r}: nothing is there. Give the folder of the label files, or a CSV or Parquet table."
        )
    found = table.find_table(root)
    in_rafce_layout = rafce.is_rafce(root)
    if data.layout == "auto" and found is not None and in_rafce_layout:
        raise UsageError(
            f"{root}: holds RAF-CE's label files and {found.name}. Choose: data.layout=rafce or data.layout=table."
        )
    if data.layout in ("auto", "table") and found is not None:
        return table.read(found, data)
    if data.layout in ("auto", "rafce") and in_rafce_layout:
        return rafce.read(root, data.images, data.encoding)
    in_folders = class_folders.read(root, data) if data.layout in ("auto", "folders") else None
    if in_folders is not None:
        return in_folders
    expected = {
        "rafce": f"{rafce.EMOTION_FILE} or {rafce.ACTION_UNIT_FILE}",
        "table": " or ".join(table.TABLE_NAMES),
        "folders": "class folders such as train/smiling/",
        "auto": f"{rafce.EMOTION_FILE}, {rafce.ACTION_UNIT_FILE}, a table {' or '.join(table.TABLE_NAMES)}, or class "
        "folders such as train/smiling/",
    }
    raise UsageError(
        f"{root}: no labels found; expected {expected[data.layout]}. Point data.root at the folder that holds them."
    )


def resolve_taxonomy(labels: Labels, data: DataConfig) -> Taxonomy:
    """The emotions and action units to train on; an empty tuple where a task has no labels or is switched off.

    Action units that a table has no column for leave the vocabulary: they could be neither learned nor checked.
    """
    return make_taxonomy(_emotions(labels, data), _action_units(labels, data))


def _emotions(labels: Labels, data: DataConfig) -> tuple[str, ...]:
    if data.emotions == "none" or not labels.has_emotions:
        return ()
    if data.emotions != "auto":
        return tuple(data.emotions)
    if labels.layout == "rafce":
        return tuple(RAFCE_EMOTIONS)
    names = [name for name in pc.unique(labels.table["emotion"]).to_pylist() if name is not None]
    names = [name for name in names if label_key(name) not in UNKNOWN_WORDS | PERHAPS_UNKNOWN_WORDS]
    if names and all(label_key(name) in RAFCE_EMOTIONS for name in names):
        return tuple(RAFCE_EMOTIONS)
    return tuple(in_label_order(names))


def in_label_order(names: Iterable[str]) -> list[str]:
    """Class names sorted; by number where all are numbers."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _action_units(labels: Labels, data: DataConfig) -> tuple[int, ...]:
    if data.action_units == "none" or not labels.has_action_units:
        return ()
    if data.action_units == "auto":
        positives = count_train_positives(labels.table)
        return tuple(np.flatnonzero(positives >= data.min_train_positives).tolist())
    wanted = SEED18 if data.action_units == "seed18" else data.action_units
    if labels.au_columns is None:
        return tuple(wanted)
    return tuple(number for number in wanted if number in labels.au_columns)


def count_train_positives(labels_table: pa.Table) -> npt.NDArray[np.int64]:
    """(100,) train rows that have an image and in which each action unit is present, by its number."""
    usable = labels_table.filter(
        pc.and_(pc.equal(labels_table["split"], "train"), pc.is_valid(labels_table["image_path"]))
    )
    numbers = np.asarray(usable["au_positive"].combine_chunks().flatten())
    return np.bincount(numbers, minlength=_MAX_ACTION_UNIT).astype(np.int64)


def resolve_targets(
    labels_table: pa.Table, taxonomy: Taxonomy, null_policy: str, evaluation_null_policy: str | None = None
) -> Targets:
    """Targets of every row, in the order of the table.

    ``evaluation_null_policy``: how null is read in rows that are not of the train split, as
    ``DataConfig.null_policy_in_evaluation`` has it; None: as in those that are.
    """
    split, null_row = _split_targets(labels_table), _equals(labels_table["au_state"], "null")
    in_train, evaluation = split == SPLITS.index("train"), evaluation_null_policy or null_policy
    is_negative = null_row & np.where(in_train, null_policy == "negative", evaluation == "negative")
    return Targets(
        emotion=_emotion_targets(labels_table, taxonomy),
        action_units=_action_unit_targets(labels_table, taxonomy, is_negative),
        null_row=null_row,
        votes=_vote_targets(labels_table),
        split=split,
    )


def emotion_index(text: str, taxonomy: Taxonomy) -> int:
    """The class that an emotion label means: by name, by another spelling of one name, or by number; -1 for none."""
    names = taxonomy.emotions
    found = class_named(text, names)
    # A number that is another spelling of several names means none of them.
    if found >= 0 or not text.isdecimal() or all(name.isdecimal() for name in names):
        return found
    is_spelling = any(label_key(text) == label_key(name) for name in names)
    return int(text) if int(text) < len(names) and not is_spelling else -1


def _emotion_targets(labels_table: pa.Table, taxonomy: Taxonomy) -> npt.NDArray[np.int64]:
    distinct = labels_table["emotion"].combine_chunks().dictionary_encode()
    classes = [emotion_index(text, taxonomy) for text in distinct.dictionary.to_pylist()]
    codes = np.asarray(pc.fill_null(distinct.indices, len(classes)))
    targets: npt.NDArray[np.int64] = np.array([*classes, -1], np.int64)[codes]
    return targets


def _action_unit_targets(
    labels_table: pa.Table, taxonomy: Taxonomy, is_negative: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """``is_negative`` (N,): rows whose null means that no action unit is there."""
    targets = np.full((labels_table.num_rows, taxonomy.num_action_units), np.nan, np.float32)
    targets[_equals(labels_table["au_state"], "full") | is_negative] = 0
    column_of = np.full(_MAX_ACTION_UNIT, -1)
    column_of[list(taxonomy.action_units)] = np.arange(taxonomy.num_action_units)
    for name, value in (("au_negative", 0), ("au_positive", 1)):
        lists = labels_table[name].combine_chunks()
        columns = column_of[np.asarray(lists.flatten())]
        rows = np.asarray(pc.list_parent_indices(lists))
        known = columns >= 0
        targets[rows[known], columns[known]] = value
    return targets


def _vote_targets(labels_table: pa.Table) -> npt.NDArray[np.float32]:
    votes = labels_table["votes"].combine_chunks()
    targets = np.full((len(votes), NUM_VOTES), np.nan, np.float32)
    known = np.asarray(pc.is_valid(votes))
    targets[known] = np.asarray(votes.drop_null().flatten()).reshape(-1, NUM_VOTES)
    return targets


def _split_targets(labels_table: pa.Table) -> npt.NDArray[np.int8]:
    index = pc.index_in(labels_table["split"], value_set=pa.array(SPLITS))
    return np.asarray(pc.fill_null(index, -1)).astype(np.int8)


def _equals(column: pa.ChunkedArray, value: str) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.fill_null(pc.equal(column, value), False), bool)
