"""Labels by folder: ``train/smiling/0001.jpg`` is a face of the train split whose emotion is ``smiling``."""

from __future__ import annotations

import shlex
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from rafce_ray.config import DataConfig
from rafce_ray.data.listing import image_columns, list_images
from rafce_ray.data.records import LABEL_SCHEMA, SPLIT_NAMES, Evidence, EvidenceList, Finding, Labels, counted
from rafce_ray.errors import UsageError
from rafce_ray.storage import Location

_IMAGE_FOLDERS = frozenset(["images", "aligned"])
"""Names of folders that hold the images of a table: alone they are no classes."""

_MAX_LOOKED_AT = 1000
"""Files of a folder with the name of a split that are looked at to see whether it holds classes."""


def read(root: Location, data: DataConfig) -> Labels | None:
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
    for name in ("au_positive", "au_negative"):
        columns[name] = pa.array([[]] * len(rows), LABEL_SCHEMA.field(name).type)
    for name in ("emotion_line", "au_line", "votes"):
        columns[name] = pa.nulls(len(rows), LABEL_SCHEMA.field(name).type)
    return Labels(
        table=pa.table([columns[name] for name in LABEL_SCHEMA.names], schema=LABEL_SCHEMA),
        layout="folders",
        root=root,
        image_root=root,
        emotion_file=root.name,
        au_file=None,
        au_columns=None,
        num_extra_images=0,
        findings=tuple(_findings(root, data, sorted(classes), outside, has_splits=has_splits)),
    )


def _may_hold_classes(root: Location) -> bool:
    """Takes a short look, so that a folder given by mistake is not searched as a whole."""
    if not root.is_dir():
        return False
    if root.local is not None:
        folders = [root / one.name for one in sorted(root.local.iterdir()) if one.is_dir() and one.name[0] != "."]
    else:
        folders = [root / one.base_name for one in root.list() if one.type == pafs.FileType.Directory]
    # Source code has a folder test, and a system one called dev.
    if any(folder.name.lower() in SPLIT_NAMES and _has_image_below_a_folder(folder) for folder in folders):
        return True
    with_images = (folder for folder in folders if list_images(folder, recursive=False).table.num_rows)
    return len(list(islice(with_images, 2))) == 2


def _has_image_below_a_folder(split: Location) -> bool:
    paths = list_images(split, recursive=True, limit=_MAX_LOOKED_AT).table["path"]
    return any("/" in path for path in paths.to_pylist())


def _findings(
    root: Location, data: DataConfig, classes: list[str], outside: EvidenceList, *, has_splits: bool
) -> list[Finding]:
    findings = []
    if outside:
        message = f"{counted(len(outside), 'image')} in {root} lie outside of the class folders and are not used"
        remedy = "Move them to SPLIT/CLASS/." if has_splits else "Move them to CLASS/."
        findings.append(outside.finding("warning", "images_outside_classes", message, remedy))
    if not has_splits:
        found = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        message = f"{root}: the class folders ({found}) are in no split"
        remedy = (
            f"Write a table with splits: rafce data split {shlex.quote(str(data.root))}. Or move the class folders "
            "into train/, validation/ and test/."
        )
        findings.append(Finding("refusal", "no_split_folders", message, remedy, 1, (Evidence(found, root.name),)))
    return findings
