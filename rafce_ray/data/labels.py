"""From label files of any layout to targets: read, decide on the vocabulary, and turn labels into numbers."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from rafce_ray.base.errors import Evidence, Finding, RafceError, UsageError
from rafce_ray.base.storage import Location, locate
from rafce_ray.base.taxonomy import (
    PERHAPS_UNKNOWN_WORDS,
    RAFCE_EMOTIONS,
    SEED18,
    UNKNOWN_WORDS,
    Taxonomy,
    class_named,
    label_key,
    make_taxonomy,
)
from rafce_ray.config import DataConfig
from rafce_ray.data import label_file, table
from rafce_ray.data.label_file import refuse_broken_link
from rafce_ray.data.listing import image_columns, list_images
from rafce_ray.data.records import (
    NUM_VOTES,
    SPLIT_NAMES,
    SPLITS,
    EvidenceList,
    Labels,
    Targets,
    counted,
    label_table,
    positions,
)

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
    in_rafce_layout = label_file.is_rafce(root)
    if data.layout == "auto" and found is not None and in_rafce_layout:
        raise UsageError(
            f"{root}: holds RAF-CE's label files and {found.name}. Choose: data.layout=rafce or data.layout=table."
        )
    if data.layout in ("auto", "table") and found is not None:
        return table.read_table(found, data)
    if data.layout in ("auto", "rafce") and in_rafce_layout:
        return label_file.read_rafce(root, data.images, data.encoding)
    in_folders = _read_class_folders(root, data) if data.layout in ("auto", "folders") else None
    if in_folders is not None:
        return in_folders
    tables, folders = " or ".join(table.TABLE_NAMES), "class folders such as train/smiling/"
    expected = {
        "rafce": f"{label_file.EMOTION_FILE} or {label_file.ACTION_UNIT_FILE}",
        "table": tables,
        "folders": folders,
        "auto": f"{label_file.EMOTION_FILE}, {label_file.ACTION_UNIT_FILE}, a table {tables}, or {folders}",
    }[data.layout]
    raise UsageError(f"{root}: no labels found; expected {expected}. Point data.root at the folder that holds them.")


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

    ``evaluation_null_policy`` says how null is read outside of the train split; None: as within.
    """
    split = positions(labels_table["split"], pa.array(SPLITS)).astype(np.int8)
    null_row = _equals(labels_table["au_state"], "null")
    in_train, evaluation = split == SPLITS.index("train"), evaluation_null_policy or null_policy
    is_negative = null_row & np.where(in_train, null_policy == "negative", evaluation == "negative")
    distinct = labels_table["emotion"].combine_chunks().dictionary_encode()
    classes = [emotion_index(text, taxonomy) for text in distinct.dictionary.to_pylist()]
    codes = np.asarray(pc.fill_null(distinct.indices, len(classes)))
    shares = labels_table["votes"].combine_chunks()
    votes = np.full((len(shares), NUM_VOTES), np.nan, np.float32)
    votes[np.asarray(pc.is_valid(shares))] = np.asarray(shares.drop_null().flatten()).reshape(-1, NUM_VOTES)
    return Targets(
        emotion=np.array([*classes, -1], np.int64)[codes],
        action_units=_action_unit_targets(labels_table, taxonomy, is_negative),
        null_row=null_row,
        votes=votes,
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


def _equals(column: pa.ChunkedArray, value: str) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.fill_null(pc.equal(column, value), False), bool)


_IMAGE_FOLDERS = frozenset(["images", "aligned"])
"""Names of folders that hold the images of a table: alone they are no classes."""

_MAX_LOOKED_AT = 1000
"""Files of a folder with the name of a split that are looked at to see whether it holds classes."""


def _read_class_folders(root: Location, data: DataConfig) -> Labels | None:
    """Labels of a folder of class folders, with or without folders of splits above them; None where there are none.

    Every image below a class folder has its label, at any depth. Without folders of splits, there must be at least two
    classes, with most of the images.

    Raises:
        UsageError: ``data.images`` is set, which has no meaning here.
    """
    if not _may_hold_classes(root):
        return None
    listing = list_images(root, recursive=True)
    parts = [path.split("/") for path in listing.table["path"].to_pylist()]
    has_splits = any(len(one) > 2 and one[0].lower() in SPLIT_NAMES for one in parts)
    depth = 1 if has_splits else 0
    usable = [len(one) > depth + 1 and (not has_splits or one[0].lower() in SPLIT_NAMES) for one in parts]
    rows = np.flatnonzero(np.array(usable, bool)).astype(np.int64)
    emotions = [parts[row][depth] for row in rows.tolist()]
    classes = set(emotions)
    if not has_splits and (len(classes) < 2 or classes <= _IMAGE_FOLDERS or 2 * len(rows) < len(parts)):
        return None
    if data.images is not None:
        raise UsageError(
            f"data.images={data.images!r}: {root} holds class folders, which say where images are. Leave it out."
        )
    outside = EvidenceList()
    for one, used in zip(parts, usable, strict=True):
        if not used:
            outside.add("in no class folder" if len(one) <= depth + 1 else f"{one[0]!r} is no split", "/".join(one))
    columns = {
        "name": listing.table["path"].combine_chunks().take(pa.array(rows)),
        "split": pa.array([SPLIT_NAMES[parts[row][0].lower()] if has_splits else None for row in rows], pa.string()),
        "emotion": pa.array(emotions, pa.string()),
        "au_state": pa.array(["missing"] * len(rows), pa.string()),
        **image_columns(listing.table, rows),
    }
    return Labels(
        table=label_table(columns),
        layout="folders",
        root=root,
        image_root=root,
        emotion_file=root.name,
        au_file=None,
        au_columns=None,
        num_extra_images=0,
        findings=tuple(_class_folder_findings(root, data, sorted(classes), outside, has_splits=has_splits)),
    )


def _may_hold_classes(root: Location) -> bool:
    """Takes a short look, so that a folder given by mistake is not searched as a whole."""
    if not root.is_dir():
        return False
    if root.local is not None:
        folders = [root / one.name for one in sorted(root.local.iterdir()) if one.is_dir() and one.name[0] != "."]
    else:
        folders = [root / one.base_name for one in root.list() if one.type == pafs.FileType.Directory]
    # Source code has a folder test, and a system one called dev: a split has images below a folder.
    for split in (folder for folder in folders if folder.name.lower() in SPLIT_NAMES):
        paths = list_images(split, recursive=True, limit=_MAX_LOOKED_AT).table["path"]
        if any("/" in path for path in paths.to_pylist()):
            return True
    with_images = (folder for folder in folders if list_images(folder, recursive=False).table.num_rows)
    return len(list(islice(with_images, 2))) == 2


def _class_folder_findings(
    root: Location, data: DataConfig, classes: list[str], outside: EvidenceList, *, has_splits: bool
) -> Iterator[Finding]:
    if outside:
        message = f"{counted(len(outside), 'image')} in {root} lie outside of the class folders and are not used"
        remedy = "Move them to SPLIT/CLASS/." if has_splits else "Move them to CLASS/."
        yield outside.finding("warning", "images_outside_classes", message, remedy)
    if not has_splits:
        found = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        message = f"{root}: the class folders ({found}) are in no split"
        command = f"rafce data split {shlex.quote(str(data.root))}"
        remedy = f"Write a table with splits: {command}. Or move the class folders into train/, validation/ and test/."
        yield Finding("refusal", "no_split_folders", message, remedy, 1, (Evidence(found, root.name),))
